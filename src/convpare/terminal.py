"""Tables, progress and messages for people. Results go to standard output, everything else to standard error."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from convpare.compress import Compression
from convpare.inspection import SIMILAR, Inspection
from convpare.measurement import Measured
from convpare.planning.plan import Plan

_WIDTH = 120  # of tables in files and pipes, unless COLUMNS says otherwise
_NARROW = 80
_NARROWEST = 60  # below, numbers would be cut off; lines that break are better
_LEFT = frozenset({"kind", "weight", "made by", "read by", "because of", "removed"})
_NAMES = frozenset(
    {"layer", "group", "channels that stay", "marked groups", "made by", "read by", "because of"}
)  # give way

Tell = Callable[[str, int, int], None]


def show(text: str) -> None:
    """A sentence of the result: wrapped at words in a terminal, one line in a file."""
    console = _console()
    _print(console, escape(text), soft_wrap=console.width == _WIDTH and not console.is_terminal)


def warn(text: str) -> None:
    _console(error=True).print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def fail(text: str) -> None:
    _console(error=True).print(f"[red]error:[/] {escape(text)}", soft_wrap=True)


@contextmanager
def progress() -> Iterator[Tell]:
    """What is being done, on standard error: a bar that is gone afterwards, or lines where that is no terminal."""
    console = _console(error=True)
    if not console.is_terminal:
        lines = _Lines(console)
        try:
            yield lines.tell
        finally:
            lines.stop()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[part]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, part="")
        current = ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                bar.reset(task)
                current = what
            known = total > 1
            part = f"{done:,}/{total:,}" if known else ""
            bar.update(task, description=what, completed=done, total=total if known else None, part=part)

        yield tell


class _Lines:
    """Progress for logs: a line for a step once it has taken a second, and another every ten seconds."""

    def __init__(self, console: Console, first: float = 1.0, later: float = 10.0) -> None:
        self._console, self._first, self._later = console, first, later
        self._what, self._done, self._total = "", 0, 0
        self._due = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def tell(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._due = time.monotonic() + self._first
        self._what, self._done, self._total = what, done, total

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + self._later
                part = f" {self._done:,}/{self._total:,}" if self._total > 1 else " …"
                self._console.print(escape(self._what + part), soft_wrap=True)


def show_inspection(found: Inspection) -> None:
    """Layers with their costs, groups, and what is frozen and why."""
    graph, total = found.graph, found.count.total
    comma = ", " if _console().width >= _NARROW else "\n"
    if graph.layers:
        _show_table(_layers(found))
    if graph.groups:
        _show_table(_groups(found, comma))
    if found.similar is not None:
        show(
            f"similar: the share of a group's channels that goes when of every two whose feature maps have an SSIM of "
            f"{SIMILAR} or more one is dropped\n"
        )
    if graph.frozen:
        _show_table(_frozen(found, comma))
    if any(group.inexact for group in graph.groups):
        _show_table(_marked(found, comma))
        show("marked groups stay whole unless --inexact is given: without some of their channels the others change\n")
    if graph.not_counted:
        show("not counted in MACs: " + ", ".join(f"{name} ×{n}" for name, n in graph.not_counted.items()))
    if graph.parts:
        names = list(dict.fromkeys(call.name for call in graph.parts))
        show(f"captured in parts ({', '.join(names)}); what runs between them is left as it is")
    if graph.unreached:
        show("not reached in evaluation mode (left as they are): " + ", ".join(graph.unreached))
    show(
        f"{graph.model} on {_shapes(graph.inputs)}: {total.macs:,} MACs, {total.params:,} parameters, "
        f"{total.activations:,} activations"
    )
    groups = "1 group" if len(graph.groups) == 1 else f"{len(graph.groups)} groups"
    show(f"{graph.channels:,} channels in {groups} can be removed" if graph.groups else "no channel can be removed")
    show(f"{100 * found.prunable:.1f} % of the MACs hang on channels that can be removed exactly" + _elsewhere(found))


def show_compression(done: Compression, figures: Measured, output: Path, note: str | None) -> None:
    """The plan, the stages, and before beside after. `note`: how the images were split, if there were any."""
    plan = done.plan
    scope = f", scope {plan.options['scope']}" if "scope" in plan.options else ""
    form = ", graph form" if plan.form == "graph" else ""
    show(f"plan for {plan.model} on {_shapes(plan.inputs)}, criterion {plan.criterion}{scope}{form}\n")
    if plan.edits:
        _show_table(_removals(plan))
    _show_table(_stages(done))
    _show_table(_before_and_after(done, figures.content))
    on = figures.content["measured_on"]
    threads = "1 thread" if on["threads"] == 1 else f"{on['threads']} threads"
    show(f"latency: the median at a batch of {on['batch']}, {threads}")
    if done.stages[0].top1 is not None:
        show(f"accuracy: of {done.test_images:,} test images")
    if note is not None:
        show(f"images: {note}")
    show(str(done.check))
    if done.recovered is not None:
        tried = ", ".join(f"{name} {error:.3g}" for name, error in done.recovered.errors.items())
        show(f"recovery: {done.recovered.method}, from {done.recovered.images:,} images without labels, no gradients "
             f"(relative output error: {tried})")  # fmt: skip
    if done.excluded:
        warn("left whole, their surgery failed the self-check: " + ", ".join(done.excluded))
    if not plan.edits:
        warn("nothing was removed: all channels are within the budget or beyond the threshold")
    show(f"saved to {output}")


def _layers(found: Inspection) -> Table:
    table = _table("layer", "kind", "weight", "MACs", "parameters")
    for layer in found.graph.layers:
        cost = found.count.layers[layer.name]
        shape = "×".join(map(str, found.graph.shapes[layer.weight]))
        table.add_row(escape(layer.name), layer.kind, shape, f"{cost.macs:,}", f"{cost.params:,}")
    return table


def _groups(found: Inspection, comma: str) -> Table:
    similar = found.similar
    table = _table("group", "channels", *(["similar"] if similar is not None else []), "made by", "read by")
    for group in found.graph.groups:
        share = [f"{100 * similar[group.name]:.0f} %"] if similar is not None else []
        made, read = _names(group.producers, comma), _names(group.consumers, comma)
        table.add_row(escape(group.name), f"{group.channels:,}", *share, made, read)
    return table


def _frozen(found: Inspection, comma: str) -> Table:
    """One row a reason; --json names every layer."""
    table = _table("channels that stay", "channels", "because of")
    for reason in dict.fromkeys(row.reason for row in found.graph.frozen):
        rows = [row for row in found.graph.frozen if row.reason == reason]
        names = _names(tuple(row.layer for row in rows), comma)
        table.add_row(names, f"{sum(row.channels for row in rows):,}", escape(reason))
    return table


def _marked(found: Inspection, comma: str) -> Table:
    """Groups whose removal by nature changes the others, one row a reason."""
    table = _table("marked groups", "channels", "because of")
    for reason in dict.fromkeys(group.inexact for group in found.graph.groups if group.inexact):
        groups = [group for group in found.graph.groups if group.inexact == reason]
        names = _names(tuple(group.name for group in groups), comma)
        table.add_row(names, f"{sum(group.channels for group in groups):,}", escape(str(reason)))
    return table


def _elsewhere(found: Inspection) -> str:
    return "" if found.graph_form is None else f", {100 * found.graph_form:.1f} % in the graph form (--form graph)"


def _removals(plan: Plan) -> Table:
    table = _table("group", "channels", "kept", "removed")
    for edit in plan.edits:
        share = edit.removed / edit.channels
        filled = round(10 * share)
        bar = "█" * filled + "░" * (10 - filled)
        table.add_row(escape(edit.group), f"{edit.channels:,}", f"{len(edit.keep):,}", f"{bar} {100 * share:5.1f} %")
    return table


def _stages(done: Compression) -> Table:
    known = any(stage.top1 is not None for stage in done.stages)
    table = _table("stage", *(["top-1 %"] if known else []), "seconds")
    for stage in done.stages:
        seconds = f"{stage.seconds:.1f}" if stage.seconds else "-"
        table.add_row(stage.name, *([_percent(stage.top1)] if known else []), seconds)
    return table


def _before_and_after(done: Compression, content: dict[str, Any]) -> Table:
    before, after = content["before"], content["after"]
    table = _table("", "before", "after", "change", "budget")
    if before["top1"] is not None:
        points = f"{after['top1'] - before['top1']:+.2f}"
        table.add_row("top-1 %", _percent(before["top1"]), _percent(after["top1"]), points, "")
    for key, name in (("macs", "MACs"), ("params", "parameters"), ("file_bytes", "file, bytes")):
        asked = done.plan.requested.get(key)
        budget = "" if asked is None else f"× {asked:g}"
        table.add_row(name, f"{before[key]:,}", f"{after[key]:,}", _ratio(after[key], before[key]), budget)
    old, new = before["latency_ms"], after["latency_ms"]
    table.add_row("latency, ms", f"{old:.3f}", f"{new:.3f}", _ratio(new, old), "")
    return table


def _console(*, error: bool = False) -> Console:
    """Made anew each time: the streams and the environment may have changed."""
    console = Console(file=sys.stderr if error else sys.stdout, highlight=False, emoji=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _WIDTH
    if console.width < _NARROWEST:  # noqa: PLR1730 - an assignment would keep it from following the terminal's width
        console.width = _NARROWEST
    return console


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for number, column in enumerate(columns):
        right = number > 0 and column not in _LEFT
        justify: Literal["right", "left"] = "right" if right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in _NAMES)
    return table


def _show_table(table: Table) -> None:
    console = _console()
    _print(console, table)
    console.print()


def _print(console: Console, content: Table | str, *, soft_wrap: bool = False) -> None:
    """Print without the blanks that rich leaves at the end of lines."""
    with console.capture() as captured:
        console.print(content, soft_wrap=soft_wrap)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(after: float, before: float) -> str:
    return f"× {after / before:.4f}" if before else "-"


def _shapes(inputs: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("×".join(map(str, shape)) for shape in inputs)


def _names(names: tuple[str, ...], comma: str, limit: int = 3) -> str:
    more = [f"… {len(names)} in all"] if len(names) > limit else []
    return escape(comma.join([*names[:limit], *more]))
