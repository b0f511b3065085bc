"""How results show themselves in a notebook: small tables of HTML, everything in them escaped."""

from collections.abc import Iterable, Sequence
from html import escape

_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.4em 0"
_CELL = "padding:.15em .8em .15em 0;border-bottom:1px solid #8884"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table whose first column is on the left and whose others are on the right; integers get commas."""
    head = "".join(_cell("th", column, n) for n, column in enumerate(columns))
    body = "".join(f"<tr>{''.join(_cell('td', _shown(x), n) for n, x in enumerate(row))}</tr>" for row in rows)
    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    return f'<table style="{_TABLE}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html_text(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def _cell(tag: str, text: str, column: int) -> str:
    return f'<{tag} style="{_CELL};text-align:{"right" if column else "left"}">{escape(text)}</{tag}>'


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
