"""Tables, progress and messages for people. Results go to standard output, everything else to standard error."""

import contextlib
import ctypes
import itertools
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from convpare.bench import Bench
from convpare.compress import Compression, Stage
from convpare.export import Export
from convpare.inspection import SIMILAR, Inspection
from convpare.measurement import Measured
from convpare.planning.cost import Cost
from convpare.planning.plan import Plan
from convpare.prospect import Prospect, TradeOff
from convpare.recovery import Recovered
from convpare.redundancy.activations import GroupActivations
from convpare.redundancy.kernels import KernelRedundancy
from convpare.regain import Regained
from convpare.truncate import ALL, Truncation

TELLING = 5.0  # seconds of a step after which its end is foretold
_WIDTH = 120  # of tables in files and pipes, unless COLUMNS says otherwise
_NARROW = 80
_NARROWEST = 60  # below, numbers would be cut off; lines that break are better
_SAVES = ("saves MACs", "parameters")
_LEFT = frozenset({"network", "after it", "kind", "weight", "made by", "read by", "because of", "removed"})
_NAMES = frozenset(
    {
        "network",
        "layer",
        "block",
        "group",
        "channels that stay",
        "marked groups",
        "made by",
        "read by",
        "because of",
        "after it",
        "file",
    }
)  # give way

_SILENT = threading.Event()

Tell = Callable[[str, int, int], None]


def silence() -> None:
    """From here on only `fail` with `anyway` says anything: another process speaks for this one."""
    _SILENT.set()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def show(text: str) -> None:
    """A sentence of the result: wrapped at words in a terminal, one line in a file."""
    console = _console()
    _print(console, escape(text), soft_wrap=console.width == _WIDTH and not console.is_terminal)


def warn(text: str) -> None:
    _console(error=True).print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def fail(text: str, *, anyway: bool = False) -> None:
    console = _console(error=True)
    console.quiet &= not anyway
    console.print(f"[red]error:[/] {escape(text)}", soft_wrap=True)


@contextmanager
def progress() -> Iterator[Tell]:
    """What is being done, on standard error: a bar that is gone afterwards, or lines where that is no terminal.

    What libraries print meanwhile goes there, too (the solver's, in C, cannot be told to be silent).
    """
    with _results_alone(), _progress() as tell:
        yield tell


@contextmanager
def _results_alone() -> Iterator[None]:
    """Keep standard output for results: what is written to its file descriptor goes to standard error."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of the two is closed
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # where the C library is found by another name
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _progress() -> Iterator[Tell]:
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
        current, pace = "", _Pace()

        def tell(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                bar.reset(task)
                current = what
            known = total > 1
            part = f"{done:,}/{total:,}{pace.left(what, done, total)}" if known else ""
            bar.update(task, description=what, completed=done, total=total if known else None, part=part)

        yield tell


class _Pace:
    """How long a step that counts will take, from how fast it went so far."""

    def __init__(self) -> None:
        self._what, self._first, self._started = "", 0, 0.0

    def left(self, what: str, done: int, total: int) -> str:
        """Such as ", 9 min left"; nothing where that is soon, or cannot be told yet."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._first, self._started = what, done, now
        spent = now - self._started
        if spent < TELLING or done == self._first:
            return ""
        minutes = (total - done) * spent / (done - self._first) / 60
        if minutes < 1:
            return ""
        hours = f"{int(minutes // 60)} h " if minutes >= 60 else ""
        return f", {hours}{math.ceil(minutes % 60)} min left"


class _Lines:
    """Progress for logs: a line for a step once it has taken a second, and another every ten seconds."""

    def __init__(self, console: Console, first: float = 1.0, later: float = 10.0) -> None:
        self._console, self._first, self._later = console, first, later
        self._what, self._done, self._total, self._left = "", 0, 0, ""
        self._due, self._pace = float("inf"), _Pace()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def tell(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._due = time.monotonic() + self._first
        self._what, self._done, self._total = what, done, total
        self._left = self._pace.left(what, done, total)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + self._later
                part = f" {self._done:,}/{self._total:,}{self._left}" if self._total > 1 else " …"
                self._console.print(escape(self._what + part), soft_wrap=True)


def show_inspection(found: Inspection) -> None:
    """Layers with their costs, groups, and what is frozen and why."""
    graph, total = found.graph, found.count.total
    comma = ", " if _console().width >= _NARROW else "\n"
    if graph.layers:
        _show_table(_layers(found))
        show(_legend(found) + "\n")
    if found.blocks:
        _show_table(_blocks(found))
        show(
            "K channels leave a block, made from R: K/R above 1 is redundancy, exactly where nothing stands after it\n"
            f"rank: across the output channels of its last layer's weight, at {100 * found.energy:g} % of the energy\n"
        )
        if merging := [layer for block in found.blocks for layer in block.mergeable]:
            show(f"the layers after {', '.join(merging)} can take them in exactly (--merge)\n")
    if graph.groups:
        _show_table(_groups(found, comma))
    if found.activations is not None:
        show(
            f"similar: channels that go when of every two whose feature maps have an SSIM of {SIMILAR} or more one is "
            "dropped\nrank: effective rank of the activations, in % of the channels; dead: channels of one value\n"
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
        crossing = "" if graph.form == "linked" else " (--form linked takes channels that one hands to another)"
        show(f"captured in parts ({', '.join(names)}); what runs between them is left as it is{crossing}")
    if graph.unreached:
        show("not reached in evaluation mode (left as they are): " + ", ".join(graph.unreached))
    show(
        f"{graph.model} on {_shapes(graph.inputs)}: {total.macs:,} MACs, {total.params:,} parameters, "
        f"{total.activations:,} activations"
    )
    groups = "1 group" if len(graph.groups) == 1 else f"{len(graph.groups)} groups"
    show(f"{graph.channels:,} channels in {groups} can be removed" if graph.groups else "no channel can be removed")
    show(f"{100 * found.prunable:.1f} % of the MACs hang on channels that can be removed exactly" + _elsewhere(found))
    if found.complexity is not None:
        stored, needed = found.complexity.d_naive, found.complexity.d_sample
        share = 100 * (1 - needed / max(stored, 1))
        show(f"{stored:,} weights, sample complexity {needed:,}: K/R points at {share:.1f} % of them")
    if found.kernels:
        show(f"{100 * found.factorizable:.1f} % of the MACs go when every layer is the chain that saves most")


def show_truncation(found: Truncation) -> None:
    """What each form tolerates, all layers at once, training again, and what it says about the paper's claims."""
    claims = found.claims
    if claims.depth:
        table = _table("form", "tolerated norm loss", "least", "most", "ρ with depth", "p", "ρ norm, accuracy")
        for form, (rho, p) in claims.depth.items():
            layers = dict.fromkeys(x.layer for x in found.points if x.form == form and x.layer != ALL)
            tolerated = sorted(found.tolerates(layer, form) for layer in layers)
            shares = [f"{100 * t:.1f} %" for t in (statistics.median(tolerated), tolerated[0], tolerated[-1])]
            table.add_row(form, *shares, _number(rho), _number(p, 3), _number(claims.within[form]))
        _show_table(table)
        show(
            "tolerated: the largest norm loss of a layer, truncated alone, that costs at most "
            f"{found.tolerated:.1f} points (median over layers)\n"
        )
    joint = [p for p in found.points if p.layer == ALL]
    if joint:
        fractions = sorted({p.fraction for p in joint}, reverse=True)
        table = _table("all layers, top-1 %", *(f"{f:g}" for f in fractions))
        for form in dict.fromkeys(p.form for p in joint):
            known = {p.fraction: p.top1 for p in joint if p.form == form}
            table.add_row(form, *(f"{known[f]:.2f}" if f in known else "" for f in fractions))
        _show_table(table)
    if found.retrained:
        table = _table("trained again", "fraction", "as", "epochs", "before", "top-1 %")
        for r in found.retrained:
            table.add_row(r.form, f"{r.fraction:g}", r.kind, f"{r.epochs}", f"{r.before:.2f}", f"{r.top1:.2f}")
        _show_table(table)
    if claims.depth:
        low, high = claims.spread
        show(
            f"norm loss and accuracy loss of a layer, over all forms: ρ = {_number(claims.across)}; at a norm loss of "
            f"10 % the forms cost {_number(low)} to {_number(high)} points (means over layers)"
        )
    show(f"{found.model}: {found.base:.2f} % of {found.images:,} images before; {len(found.points)} truncations")


def show_compression(done: Compression, figures: Measured, output: Path, note: str | None) -> None:
    """The plan, the stages, and before beside after. `note`: how the images were split, if there were any."""
    plan = done.plan
    _show_plan(plan, ())
    _show_table(_stages(done.stages))
    _show_table(_before_and_after(done, figures.content))
    on = figures.content["measured_on"]
    threads = "1 thread" if on["threads"] == 1 else f"{on['threads']} threads"
    show(f"latency: the median at a batch of {on['batch']}, {threads}")
    if done.latency:
        old, new = done.latency
        show(f"latency under the budget of × {plan.requested['latency']:g}: {old:.3f} → {new:.3f} ms "
             f"({_ratio(new, old)}), measured in turn, {_target(plan)}")  # fmt: skip
        if new > plan.requested["latency"] * old:
            warn("it is slower than the budget asks for; compress makes plans anew until it is met")
    if done.stages[0].top1 is not None:
        show(f"accuracy: of {done.test_images:,} test images")
    if note is not None:
        show(f"images: {note}")
    show(str(done.check))
    if done.recovered is not None:
        _show_recovered(done.recovered)
    if done.tried:
        show("tried: " + ", ".join(f"{name} {error:.3g}" for name, error in done.tried.items()) + " (the same error)")
    if done.excluded:
        warn("left whole, their surgery failed the self-check: " + ", ".join(done.excluded))
    if not plan.edits and not plan.factorizations:
        warn("nothing was removed: all channels are within the budget or beyond the threshold")
    show(f"saved to {output}")


def _show_recovered(found: Recovered) -> None:
    tried = ", ".join(f"{name} {error:.3g}" for name, error in found.errors.items())
    show(f"recovery: {found.method}, from {found.images:,} images without labels, no gradients "
         f"(relative output error: {tried})")  # fmt: skip
    if found.tuned is not None:
        show(f"training: {found.tuned}")


def show_regained(done: Regained, output: Path) -> None:
    """The stages, and how they came."""
    _show_table(_stages(done.stages))
    if done.stages[0].top1 is not None:
        show(f"accuracy: of {done.test_images:,} test images")
    _show_recovered(done.recovered)
    show(f"saved to {output}")


def show_prospect(found: Prospect) -> None:
    """The plan, what each edit saves and adds, and what the budgets cost."""
    plan = found.plan
    _show_plan(plan, found.savings)
    table = _table("", "before", "after", "change", "budget", "one % more takes back")
    for key, name in (("macs", "MACs"), ("params", "parameters")):
        old, new = getattr(plan.before, key), getattr(plan.after, key)
        budget = f"× {plan.requested[key]:g}" if key in plan.requested else ""
        price = f"{found.prices[key]:.2g} of the error" if key in found.prices else ""
        table.add_row(name, f"{old:,}", f"{new:,}", _ratio(new, old), budget, price)
    if plan.memory:
        old, new = plan.memory
        price = f"{found.prices['memory']:.2g} of the error" if "memory" in found.prices else ""
        table.add_row(
            "memory, bytes", f"{old:,}", f"{new:,}", _ratio(new, old), f"× {plan.requested['memory']:g}", price
        )
    if (asked := plan.requested.get("latency")) is not None:
        old, new = plan.options["latency_ms"]
        price = f"{found.prices['latency']:.2g} of the error" if "latency" in found.prices else ""
        table.add_row("latency, ms", f"{old:.3f}", f"{new:.3f}", _ratio(new, old), f"× {asked:g}", price)
    _show_table(table)
    if asked is not None:
        show(f"latency: predicted from the times of layers, {_target(plan)}")
    if not plan.edits and not plan.factorizations:
        show("nothing would change: all channels are within the budget or beyond the threshold")
        return
    show(f"saves: what an edit alone saves beside all others, in % of the whole; predicted error: {plan.error:.3g}")
    if (gap := plan.options.get("gap", 0.0)) > 1e-3:
        show(f"the chains are within {100 * gap:.1f} % of the best choice, by the solver's bound")


def _target(plan: Plan) -> str:
    """Where a network is to run."""
    on = plan.options["target"]
    threads = "" if on["threads"] is None else f", threads: {on['threads']}"
    return f"{on['runtime']}, batch of {on['batch']}{threads}"


def show_trade_off(found: TradeOff) -> None:
    """A row for each budget on the way."""
    asked = list(found.steps[0][0].fractions)
    timed = ["latency"] if "latency" in asked else []
    held = ["memory"] if "memory" in asked else []
    columns = ["MACs", "parameters", *held, *timed, "error", "channels gone", "chains", "scope"]
    table = _table(*(f"{m} asked" for m in asked), *columns)
    for budget, plan, _ in found.steps:
        row = [f"× {fraction:.3f}" for fraction in budget.fractions.values()]
        if plan is None:
            table.add_row(*row, *["-"] * len(columns))
            continue
        gone = sum(edit.removed for edit in plan.edits)
        shares = [f"× {plan.achieved[metric]:.4f}" for metric in ("macs", "params", *held)]
        shares += [f"× {plan.options['latency_ms'][1] / plan.options['latency_ms'][0]:.4f}" for _ in timed]
        chains = f"{len(plan.factorizations):,}"
        table.add_row(*row, *shares, f"{plan.error:.3g}", f"{gone:,}", chains, plan.options["scope"])
    _show_table(table)
    for reason in dict.fromkeys(reason for _, _, reason in found.steps if reason):
        show(reason)
    show(f"predicted errors of {found.model}, criterion {found.criterion}")


def show_bench(found: Bench) -> None:
    """A row for each setting and network: medians with quartiles, and speed-ups beside the ratio of the MACs."""
    table = _table("runtime", "batch", "threads", "network", "ms", "quartiles", "speed-up", "MACs", "share")
    for setting in found.settings:
        for number, name in enumerate(found.names):
            ms, speedup = setting.milliseconds[number], setting.speedups[number]
            first = [setting.runtime, f"{setting.batch:,}", f"{setting.threads}"] if number == 0 else [""] * 3
            ratio = found.costs[0].macs / max(found.costs[number].macs, 1)
            compared = [f"× {speedup.median:.2f}", f"÷ {ratio:.2f}", f"{found.share(setting, number):.2f}"]
            table.add_row(
                *first, escape(name), f"{ms.median:.3f}", f"{ms.lower:.3f}–{ms.upper:.3f}",
                *(compared if number else [""] * 3),
            )  # fmt: skip
    _show_table(table)
    if len(found.names) > 1:
        show("speed-up over the first, round by round; share: of the ratio of the MACs")
    on = found.machine
    show(f"{on['processor']}, torch {on['torch']}, in turn, {min(s.rounds for s in found.settings)} rounds or more")


def show_export(found: Export) -> None:
    """A row for each file, below one for the network where its accuracy is known."""
    known = found.top1[0] is not None
    table = _table("file", "bytes", "made by", "largest difference", "images", *(["top-1 %"] if known else []))
    if known:
        table.add_row(escape(found.model), "", "torch", "", "", _percent(found.top1[0]))
    for file, top1 in zip(found.files, found.top1[1:], strict=True):
        row = [escape(str(file.path)), f"{file.size:,}", file.exporter, f"{file.difference:.2g}", f"{file.images:,}"]
        table.add_row(*row, *([_percent(top1)] if known else []))
    _show_table(table)
    first, *others = found.files
    opset = "" if first.opset is None else f"; opset {first.opset}"
    noise = " of noise, for want of --data" if first.noise else ""
    sizes = " and ".join(map(str, first.batches[:2]))
    show(
        f"largest difference: from torch's outputs, as a share of the largest one, in batches of {sizes}{noise}{opset}"
    )
    for reason in first.tried:
        show(f"tried before: {reason}")
    for file in others:
        agreed = "" if file.agreement is None else f"; the same class as in float on {file.agreement:.2f} %"
        show(
            f"int8: {file.size / first.size:.3f} of the bytes; its outputs differ from those in float by "
            f"{file.error:.3g} of their norm{agreed} of {file.images:,} images"
        )
    if known:
        show(f"accuracy: of {found.test_images:,} test images, each file in its own runtime")


def _show_plan(plan: Plan, savings: Sequence[Cost]) -> None:
    scope = f", scope {plan.options['scope']}" if "scope" in plan.options else ""
    form = "" if plan.form == "module" else f", {plan.form} form"
    show(f"plan for {plan.model} on {_shapes(plan.inputs)}, criterion {plan.criterion}{scope}{form}\n")
    shares = [[f"{100 * x / max(whole, 1):.2f} %" for x, whole in zip(cost, plan.before, strict=True)][:2]
              for cost in savings] or [[] for _ in (*plan.edits, *plan.factorizations)]  # fmt: skip
    if plan.edits:
        _show_table(_removals(plan, shares[: len(plan.edits)]))
    if plan.factorizations:
        _show_table(_factorizations(plan, shares[len(plan.edits) :]))


def _layers(found: Inspection) -> Table:
    wide = _console().width >= _WIDTH
    ranks = {layer.name: _effective(found.kernels.get(layer.name)) if wide else {} for layer in found.graph.layers}
    sides = [side for side in ("o", "i", "oi", "oh", "ow") if any(side in shown for shown in ranks.values())]
    table = _table("layer", "kind", "weight", "MACs", "parameters", *sides, "saves")
    for layer in found.graph.layers:
        cost, kernel = found.count.layers[layer.name], found.kernels.get(layer.name)
        shape = "×".join(map(str, found.graph.shapes[layer.weight]))
        shown = [ranks[layer.name].get(side, "") for side in sides]
        saves = "" if kernel is None or kernel.cut is None else f"{100 * kernel.saved:.0f} % {kernel.cut}"
        table.add_row(escape(layer.name), layer.kind, shape, f"{cost.macs:,}", f"{cost.params:,}", *shown, saves)
    return table


def _legend(found: Inspection) -> str:
    saves = f"saves: MACs that the best chain of two layers saves which keeps {100 * found.energy:g} % of ‖kernel‖²"
    names = sorted((s.cut.name for k in found.kernels.values() for s in k.spectra.values()), key=len)
    cuts = {name.partition("|")[0]: name for name in names}  # that of the kernel with the most dimensions
    shown = [side for side in ("o", "i", "oi", "oh", "ow") if side in cuts]
    if _console().width < _WIDTH or not shown:
        return saves
    across = ", ".join(cuts[side] for side in shown)
    return f"{', '.join(shown)}: effective rank across {across}, in % of the full rank\n{saves}"


def _effective(kernel: KernelRedundancy | None) -> dict[str, str]:
    """Effective rank in per cent of the full rank, by the cut's first side; of cuts that are one matrix the first."""
    shown: dict[str, str] = {}
    seen: list[Tensor] = []
    for found in kernel.spectra.values() if kernel else ():
        if found.full_rank > 1 and not any(found.values is values for values in seen):
            shown[found.cut.left] = f"{100 * found.effective_rank / found.full_rank:.0f}"
        seen.append(found.values)
    return shown


def _blocks(found: Inspection) -> Table:
    """One row for blocks that follow each other and are alike."""
    table = _table("block", "K", "R", "K/R", "rank", "after it")
    for _, alike in itertools.groupby(found.blocks or (), lambda b: (b.k, b.r, b.after)):
        blocks = list(alike)
        first = blocks[0]
        name = first.name if len(blocks) == 1 else f"{first.name} … {blocks[-1].name} ({len(blocks)})"
        ranks = sorted({b.trained_rank for b in blocks if b.trained_rank is not None})
        rank = "–".join(f"{r:,}" for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else ""
        table.add_row(escape(name), f"{first.k:,}", f"{first.r:,}", f"{first.k_over_r:.3g}", rank, first.after)
    return table


def _groups(found: Inspection, comma: str) -> Table:
    measures = ["similar", "rank", "dead"] if found.activations is not None else []
    table = _table("group", "channels", *measures, "made by", "read by")
    for group in found.graph.groups:
        measured = [] if found.activations is None else _activity(found, found.activations[group.name])
        made, read = _names(group.producers, comma), _names(group.consumers, comma)
        table.add_row(escape(group.name), f"{group.channels:,}", *measured, made, read)
    return table


def _activity(found: Inspection, of: GroupActivations) -> list[str]:
    rank = of.ranks.effective_rank / of.channels
    return [f"{100 * found.similar(of.group):.0f} %", f"{100 * rank:.0f} %", f"{len(of.dead)}"]


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


def _removals(plan: Plan, shares: Sequence[Sequence[str]]) -> Table:
    table = _table("group", "channels", "kept", "removed", *(_SAVES if shares[0] else ()), "adds error")
    for edit, saved in zip(plan.edits, shares, strict=True):
        share = edit.removed / edit.channels
        filled = round(10 * share)
        bar = "█" * filled + "░" * (10 - filled)
        row = [escape(edit.group), f"{edit.channels:,}", f"{len(edit.keep):,}", f"{bar} {100 * share:5.1f} %"]
        table.add_row(*row, *saved, _error(edit.error))
    return table


def _factorizations(plan: Plan, shares: Sequence[Sequence[str]]) -> Table:
    table = _table("layer", "weight", "becomes", "rank", *(_SAVES if shares[0] else ()), "adds error")
    for edit, saved in zip(plan.factorizations, shares, strict=True):
        row = [escape(edit.layer), _shapes((edit.shape,)), escape(edit.form), ", ".join(map(str, edit.ranks))]
        table.add_row(*row, *saved, _error(edit.error))
    return table


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.2g}"


def _stages(stages: Sequence[Stage]) -> Table:
    known = any(stage.top1 is not None for stage in stages)
    table = _table("stage", *(["top-1 %"] if known else []), "seconds")
    for stage in stages:
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
    if held := done.plan.memory:
        budget = f"× {done.plan.requested['memory']:g}"
        table.add_row("memory, bytes", f"{held[0]:,}", f"{held[1]:,}", _ratio(held[1], held[0]), budget)
    old, new = before["latency_ms"], after["latency_ms"]
    table.add_row("latency, ms", f"{old:.3f}", f"{new:.3f}", _ratio(new, old), "")
    return table


def _console(*, error: bool = False) -> Console:
    """Made anew each time: the streams and the environment may have changed."""
    console = Console(file=sys.stderr if error else sys.stdout, highlight=False, emoji=False, quiet=_SILENT.is_set())
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


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(after: float, before: float) -> str:
    return f"× {after / before:.4f}" if before else "-"


def _shapes(inputs: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("×".join(map(str, shape)) for shape in inputs)


def _names(names: tuple[str, ...], comma: str, limit: int = 3) -> str:
    more = [f"… {len(names)} in all"] if len(names) > limit else []
    return escape(comma.join([*names[:limit], *more]))
