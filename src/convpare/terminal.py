"""Tables, progress and messages for people. Results go to standard output, everything else to standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from convpare.compress import Compression
from convpare.inspection import Inspection
from convpare.measurement import Measured

_out = Console(highlight=False, soft_wrap=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def show(text: str) -> None:
    _out.print(escape(text))


def warn(text: str) -> None:
    _err.print(f"[yellow]warning:[/] {escape(text)}")


def fail(text: str) -> None:
    _err.print(f"[red]error:[/] {escape(text)}")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for the step that runs now; gone afterwards."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("", total=None)
        current = ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                bar.reset(task)
                current = what
            bar.update(task, description=what, completed=done, total=total if total > 1 else None)

        yield tell


def show_inspection(found: Inspection) -> None:
    """Layers with their costs, groups, and what is frozen and why."""
    graph, total = found.graph, found.count.total
    layers = _table("layer", "kind", "weight", "MACs", "parameters")
    for layer in graph.layers:
        cost = found.count.layers[layer.name]
        shape = "×".join(map(str, graph.shapes[layer.weight]))
        layers.add_row(escape(layer.name), layer.kind, shape, f"{cost.macs:,}", f"{cost.params:,}")
    _out.print(layers)
    groups = _table("group", "channels", "made by", "read by", *(["similar"] if found.similar else []))
    for group in graph.groups:
        share = [f"{100 * found.similar[group.name]:.0f} %"] if found.similar else []
        groups.add_row(
            escape(group.name), str(group.channels), _names(group.producers), _names(group.consumers), *share
        )
    _out.print(groups)
    if graph.frozen:
        frozen = _table("channels that stay", "channels", "because of")
        for row in graph.frozen:
            frozen.add_row(escape(row.layer), str(row.channels), escape(row.reason))
        _out.print(frozen)
    show(
        f"{graph.model}: {total.macs:,} MACs, {total.params:,} parameters, {total.activations:,} activations on "
        f"{' '.join('×'.join(map(str, s)) for s in graph.inputs)}; {graph.channels:,} channels in {len(graph.groups)} groups may go"
    )
    if graph.not_counted:
        show("not counted in MACs: " + ", ".join(f"{name} ×{n}" for name, n in graph.not_counted.items()))
    if graph.unreached:
        show("not reached in evaluation mode (left as they are): " + ", ".join(graph.unreached))


def show_compression(done: Compression, figures: Measured, output: Path) -> None:
    """The plan, the stages, and before beside after."""
    show(str(done.plan))
    stages = _table("stage", "top-1 %", "seconds")
    for stage in done.stages:
        stages.add_row(stage.name, _percent(stage.top1), f"{stage.seconds:.1f}")
    _out.print(stages)
    table = _table("", "before", "after", "after / before")
    before, after = figures.content["before"], figures.content["after"]
    table.add_row(f"top-1 % ({done.test_images:,} test images)", _percent(before["top1"]), _percent(after["top1"]), _change(before, after))
    for key, name in (("macs", "MACs"), ("params", "parameters"), ("file_bytes", "file size in bytes")):
        table.add_row(name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.4f}")
    on = figures.content["measured_on"]
    latency = f"latency ms (batch {on['batch']}, {on['threads']} threads)"
    ratio = after["latency_ms"] / before["latency_ms"]
    table.add_row(latency, f"{before['latency_ms']:.3f}", f"{after['latency_ms']:.3f}", f"{ratio:.4f}")
    _out.print(table)
    show(str(done.check))
    if done.recovered is not None:
        tried = ", ".join(f"{name} {error:.4f}" for name, error in done.recovered.errors.items())
        show(f"recovery: {done.recovered.method}, {done.recovered.images:,} images without labels, no gradients "
             f"(relative output error: {tried})")  # fmt: skip
    if done.excluded:
        warn("left whole, their surgery failed the self-check: " + ", ".join(done.excluded))
    show(f"saved to {output}")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        right = number and column not in ("kind", "weight", "made by", "read by", "because of")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(before: dict[str, float], after: dict[str, float]) -> str:
    return "-" if before["top1"] is None else f"{after['top1'] - before['top1']:+.2f} points"


def _names(names: tuple[str, ...], limit: int = 3) -> str:
    return escape(", ".join(names[:limit]) + (f", … {len(names)} in all" if len(names) > limit else ""))
