"""The page: a report as one file of HTML with all that it needs."""

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from convpare.optional import import_extra
from convpare.replacing import replaced_file
from convpare.report import drawing
from convpare.report.gather import Quantity, Report
from convpare.report.network import Sheet

_DONE = {
    "same": "as it was", "removed": "channels removed", "chain": "became a chain",
    "both": "channels removed, then a chain", "merged": "merged into the next", "unplanned": "",
}  # fmt: skip
_INDICES = {"o": "output channels", "i": "input channels", "d": "depth", "h": "height", "w": "width"}


def render(report: Report) -> str:
    """The page of a report. It asks no network for anything, and runs no script but its own.

    Raises:
        ConvpareError: Jinja2 is missing.
    """
    jinja = import_extra("jinja2", "report")
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True,
                                    lstrip_blocks=True)  # fmt: skip
    environment.filters |= {
        "exact": exact, "percent": percent, "amount": amount, "power": power, "cut": cut_in_words,
    }  # fmt: skip
    script = _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = environment.from_string(_file("report.html")).render(
        report=report, drawing=drawing, style=_file("report.css"), script=script, digest=digest, done=_DONE,
        tip=tip, kernel=kernel,
    )  # fmt: skip
    return page


def write_report(report: Report, path: str | Path) -> None:
    """Write the page of a report, whole or not at all.

    Raises:
        ConvpareError: Jinja2 is missing, or the file cannot be written.
    """
    page = render(report)
    with replaced_file(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def si(value: float) -> str:
    """Three figures and a letter: 40,551,040 is 40.6 M."""
    for power_of_ten, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power_of_ten * 0.9995:
            scaled = value / power_of_ten
            return f"{scaled:.{_decimals(scaled)}f}\u00a0{letter}"
    return f"{value:.{0 if value == int(value) else _decimals(value)}f}"


def _decimals(value: float) -> int:
    return 0 if value >= 99.95 else 1 if value >= 9.995 else 2


def exact(value: float) -> str:
    """With commas at thousands."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def amount(value: float, of: Quantity) -> str:
    """A quantity's value with its unit."""
    if of.kind == "share":
        return percent(value)
    if of.kind == "latency_ms":
        return f"{value:.3g}\u00a0ms" if value < 1000 else f"{value:,.0f}\u00a0ms"
    if of.kind.endswith("_bytes"):
        return f"{si(value)}B" if value >= 999.5 else f"{si(value)}\u00a0B"
    return si(value)


def power(value: float, digits: int = 1) -> str:
    """With a power of ten, such as 1.3e-15."""
    number, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{number}e{int(exponent)}" if value else "0"


def cut_in_words(name: str) -> str:
    """`oi|hw` as output and input channels against height and width."""
    return " against ".join(", ".join(_INDICES.get(letter, letter) for letter in side) for side in name.split("|"))


def kernel(sheet: Sheet) -> str:
    """A layer in a few words, such as 3×3 convolution, 64 → 128 channels, in 2 groups."""
    extent = "×".join(map(str, sheet.weight[2:]))
    names = {"conv": "convolution", "conv_transpose": "transposed convolution", "linear": "linear layer"}
    what = f"{extent} {names.get(sheet.kind, sheet.kind)}".strip()
    if len(sheet.weight) < 2:
        return what
    first, second = sheet.weight[:2]
    into, out = (first, second * sheet.groups) if sheet.kind == "conv_transpose" else (second * sheet.groups, first)
    return f"{what}, {into:,} → {out:,} channels" + (f", in {sheet.groups:,} groups" if sheet.groups > 1 else "")


def tip(sheet: Sheet) -> str:
    """What a pointer over a layer's tile is told."""
    lines = [sheet.name, kernel(sheet)]
    if sheet.macs_after is None:
        lines.append(f"{si(sheet.macs)} MACs")
    else:
        share = percent(sheet.macs_after / max(sheet.macs, 1), 0)
        lines += [f"{si(sheet.macs)} → {si(sheet.macs_after)} MACs ({share})", _DONE[drawing.done(sheet)]]
    if sheet.redundancy is not None:
        lines.append(f"redundancy {percent(sheet.redundancy, 0)}")
    return "\n".join(lines)


def _file(name: str) -> str:
    found: Any = resources.files("convpare.report").joinpath("templates", name)
    text: str = found.read_text(encoding="utf-8")
    return text
