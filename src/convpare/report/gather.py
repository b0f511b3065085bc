"""What a report says, as plain data: from an artifact's record, an inspection, or a truncation. Nothing is drawn here.

What a record holds may have been written by anybody: it is taken for what it should be, or refused.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from convpare import __version__
from convpare.artifact import Record
from convpare.errors import ConvpareError
from convpare.importance import criteria, get_criterion
from convpare.inspection import Inspection
from convpare.planning.plan import Plan
from convpare.report.network import Network, network_of
from convpare.report.pictures import Pair
from convpare.report.reading import MALFORMED, count, items, mapping, maybe, real, text, texts
from convpare.truncate import ALL, Truncation

Facts = tuple[tuple[str, str], ...]
"""Terms and what is to be said of each."""

_STAGES = {
    "before": "original", "original": "original", "surgery": "after surgery", "given": "as given",
    "least-squares": "after calibration (least squares)", "batch-norm": "after calibration (batch norm)",
    "none": "after calibration (nothing helped)", "training": "after training",
}  # fmt: skip
_SIDES = (("macs", "MACs"), ("params", "Parameters"), ("file_bytes", "File"), ("latency_ms", "Latency"))


@dataclass(frozen=True)
class Quantity:
    """One figure: `kind` is "macs", "params", "file_bytes", "memory_bytes", "latency_ms" or "share".

    `after` is None where nothing was done; `budget` is what was asked for, as a fraction of `before`.
    """

    kind: str
    name: str
    before: float
    after: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in per cent after a step, if it was measured, and the seconds that the step took."""

    stage: str
    top1: float | None
    seconds: float


@dataclass(frozen=True)
class Check:
    """The self-check, see `convpare.graph.check.SelfCheck`; `chains`: whether it was of chains of layers, too."""

    passed: bool
    error: float
    tolerance: float
    unproved: tuple[str, ...]
    narrow: float | None
    removals: bool
    chains: bool


@dataclass(frozen=True)
class Curve:
    """Predicted error of plans against what they leave: (MACs, parameters, error), and the plan that was taken."""

    criterion: str
    points: tuple[tuple[float, float, float], ...]
    chosen: tuple[float, float, float] | None


@dataclass(frozen=True)
class Cloud:
    """Truncations along one form: (layer, depth, norm loss, top-1) of single layers; (norm loss, top-1) of all at once.

    `tolerated` has the median, least and largest norm loss of a layer that costs no more than what was tolerated.
    """

    form: str
    single: tuple[tuple[str, float, float, float], ...]
    joint: tuple[tuple[float, float], ...]
    tolerated: tuple[float, float, float] | None


@dataclass(frozen=True)
class Clouds:
    """A truncation experiment: accuracy before, the points that count as tolerated, images, and what came of it."""

    base: float
    tolerated: float
    images: int
    panels: tuple[Cloud, ...]


@dataclass(frozen=True)
class Report:
    """What one page says. Sections that are empty or None are left out.

    Attributes:
        title: the network.
        about: what was done to it, in a few words.
        lead: the result in a sentence or two.
        quantities, stages, test_images: the headline.
        notes: what the reader should be told, such as groups that were left whole.
        made: how it was made.
    """

    title: str
    about: str
    lead: str
    quantities: tuple[Quantity, ...] = ()
    stages: tuple[Accuracy, ...] = ()
    test_images: int = 0
    network: Network | None = None
    pairs: tuple[Pair, ...] = ()
    curve: Curve | None = None
    clouds: Clouds | None = None
    check: Check | None = None
    made: Facts = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_of_artifact(
    record: Record, network: Network | None = None, pairs: tuple[Pair, ...] = (), sweep: object = None
) -> Report:
    """The report of a network that was made smaller.

    Args:
        network: the original's, where it is at hand; else what the record holds of it.
        sweep: the trade-off, as `convpare plan --sweep --json` writes it; else what the figures hold of it.

    Raises:
        ConvpareError: the record has no plan, or figures of another kind than `compress` writes; the sweep is none, or
            of another network.
    """
    plan = record.plan
    if plan is None:
        raise ConvpareError("the artifact was saved without a plan: there is nothing to report of it")
    if network is None and "network" in record.origin:
        network = Network.from_json(record.origin["network"])
    try:
        figures, origin = dict(record.figures), dict(record.origin)
        stages, quantities = _stages(figures), _quantities(figures, plan)
        notes = () if network else ("This artifact does not hold its layers: give the original with --teacher.",)
        excluded = texts(figures.get("excluded", ()))
        if excluded:
            notes = (*notes, "Left whole, because their surgery failed the self-check: " + ", ".join(excluded) + ".")
        sweep = figures.get("sweep") if sweep is None else sweep
        return Report(
            title=plan.model, about=_about(record, plan), lead=_lead(quantities, stages), quantities=quantities,
            stages=stages, test_images=count(figures.get("test_images", 0)), network=network, pairs=pairs,
            curve=None if sweep is None else curve_of(sweep, plan), check=_check(figures, plan),
            made=tuple(_made(record, plan, figures, origin)), notes=notes,
        )  # fmt: skip
    except MALFORMED as error:
        raise ConvpareError(
            f"the artifact's figures are not those that convpare writes ({type(error).__name__}: {str(error)[:100]}); "
            "compress again, or carry the plan out with `convpare apply`"
        ) from error


def report_of_inspection(found: Inspection, pairs: tuple[Pair, ...] = (), made: Facts = ()) -> Report:
    """The report of a network as it is."""
    total, graph = found.count.total, found.graph
    quantities = [
        Quantity("macs", "MACs", total.macs), Quantity("params", "Parameters", total.params),
        Quantity("share", "MACs on removable channels", found.prunable),
        Quantity("share", f"MACs that chains save at {100 * found.energy:g} % of the norm", found.factorizable),
    ]  # fmt: skip
    if found.complexity is not None:
        superfluous = 1 - found.complexity.d_sample / max(found.complexity.d_naive, 1)
        quantities.append(Quantity("share", "Weights that K/R points at", superfluous))
    groups = "1 group" if len(graph.groups) == 1 else f"{len(graph.groups):,} groups"
    lead = (
        f"{graph.channels:,} channels in {groups} can be removed, and {100 * found.prunable:.1f} % of the MACs hang on "
        f"them. {100 * found.factorizable:.1f} % of the MACs go when every layer is the chain of two that saves most "
        f"while it keeps {100 * found.energy:g} % of the kernel's squared norm."
    )
    notes = []
    if graph.not_counted:
        notes.append("Not counted in MACs: " + ", ".join(f"{name} ×{n}" for name, n in graph.not_counted.items()) + ".")
    if graph.unreached:
        notes.append("Not reached in evaluation mode: " + ", ".join(graph.unreached) + ".")
    return Report(
        title=graph.model, about=f"as it is, on {_shapes(graph.inputs)}", lead=lead, quantities=tuple(quantities),
        network=network_of(found), pairs=pairs, made=made, notes=tuple(notes),
    )  # fmt: skip


def report_of_truncation(found: Truncation, made: Facts = ()) -> Report:
    """The report of a truncation experiment."""
    panels = tuple(_cloud(found, form) for form in dict.fromkeys(point.form for point in found.points))
    known = [panel for panel in panels if panel.tolerated is not None]
    best = max(known, key=lambda panel: (panel.tolerated or (0.0,))[0], default=None)
    lead = f"{len(found.points):,} truncations, without training. The network is right {found.base:.2f} % of the time."
    if best is not None and best.tolerated is not None:
        lead += (
            f" Half of the layers, each truncated alone, bear a norm loss of {100 * best.tolerated[0]:.1f} % along "
            f"{best.form} for at most {_points(found.tolerated)} of accuracy; that is the form which they bear best."
        )
    clouds = Clouds(found.base, found.tolerated, found.images, panels)
    notes = tuple(
        f"Trained again: all layers at {r.fraction:g} of {r.form}, as {r.kind}, {r.epochs} epochs: "
        f"{r.before:.2f} → {r.top1:.2f} %." for r in found.retrained
    )  # fmt: skip
    return Report(found.model, "truncated along the cuts of its kernels", lead, clouds=clouds, made=made, notes=notes)


def curve_of(sweep: object, plan: Plan | None = None) -> Curve:
    """The trade-off of a sweep, and where a plan stands.

    Raises:
        ConvpareError: it is no sweep, or of another network or criterion than the plan.
    """
    try:
        data = mapping(sweep)
        criterion = text(data["criterion"])
        steps = [step for step in items(data["steps"]) if step["achieved"] is not None]
        points = [(*_shares(mapping(step["achieved"])), real(step["error"])) for step in steps]
        macs = count(mapping(data["before"])["macs"])
        chosen = None if plan is None else (plan.achieved["macs"], plan.achieved["params"], real(plan.error))
    except MALFORMED as error:
        raise ConvpareError(
            f"that is no sweep ({type(error).__name__}: {str(error)[:100]}); give the file that "
            "`convpare plan --sweep --json` writes"
        ) from error
    if plan is None:
        return Curve(criterion, tuple(points), None)
    if criterion != plan.criterion or macs != plan.before.macs:
        raise ConvpareError(
            f"the sweep is of another network or criterion ({criterion}) than the plan ({plan.criterion}, "
            f"{plan.before.macs:,} MACs); their errors do not compare"
        )
    return Curve(criterion, tuple(points), chosen)


def _shares(achieved: Mapping[str, Any]) -> tuple[float, float]:
    return real(achieved["macs"]), real(achieved["params"])


def _stages(figures: Mapping[str, Any]) -> tuple[Accuracy, ...]:
    """Those of `compress`, and those of `recover` after it."""
    rows = [mapping(row) for row in items(figures.get("stages", ()))]
    regained = mapping(figures.get("regained") or {})
    rows += [mapping(row) for row in items(regained.get("stages", ()))][2:]
    found = []
    for row in rows:
        name = text(row["name"])
        found.append(Accuracy(_STAGES.get(name, name), maybe(real, row["top1"]), real(row["seconds"])))
    return tuple(found)


def _quantities(figures: Mapping[str, Any], plan: Plan) -> tuple[Quantity, ...]:
    before = {**plan.before.to_json(), **mapping(figures.get("before") or {})}
    after = {**plan.after.to_json(), **mapping(figures.get("after") or {})}
    known = [(kind, name) for kind, name in _SIDES if before.get(kind) is not None and after.get(kind) is not None]
    found = [Quantity(kind, name, real(before[kind]), real(after[kind]), plan.requested.get(kind))
             for kind, name in known]  # fmt: skip
    if plan.memory:
        found.append(Quantity("memory_bytes", "Memory, of tensors", *plan.memory, plan.requested.get("memory")))
    if figures.get("latency") is not None:
        target = mapping(figures["latency"])
        old, new = (real(ms) for ms in items(target["ms"]))
        name = f"Latency in {text(target['runtime'])}, a batch of {count(target['batch'])}"
        found.append(Quantity("latency_ms", name, old, new, plan.requested.get("latency")))
    return tuple(found)


def _check(figures: Mapping[str, Any], plan: Plan) -> Check | None:
    if "self_check" not in figures:
        return None
    found = mapping(figures["self_check"])
    return Check(
        found["passed"] is True, real(found["max_relative_error"]), real(found["tolerance"]), texts(found["unproved"]),
        maybe(real, found["narrow"]), bool(plan.edits), bool(plan.factorizations),
    )  # fmt: skip


def _about(record: Record, plan: Plan) -> str:
    done = [
        *(["layers merged"] if plan.merges else []),
        *(["channels removed"] if plan.edits else []),
        *(["layers replaced by chains"] if plan.factorizations else []),
    ]
    of = "" if record.spec is None else f"{record.spec}: "
    return f"{of}{', '.join(done) or 'nothing removed'}; criterion {plan.criterion}; on {_shapes(plan.inputs)}"


def _lead(quantities: Sequence[Quantity], stages: Sequence[Accuracy]) -> str:
    gone = {q.kind: 1 - (q.after or 0.0) / max(q.before, 1) for q in quantities if q.after is not None}
    lead = f"{100 * gone['macs']:.1f} % of the MACs and {100 * gone['params']:.1f} % of the parameters are gone."
    known = [stage.top1 for stage in stages if stage.top1 is not None]
    if len(known) > 1:
        change = known[-1] - known[0]
        way = "lower" if change < 0 else "higher"
        went = f"went from {known[0]:.2f} to {known[-1]:.2f} %: {abs(change):.2f} points {way}."
        lead += f" Accuracy {went}" if round(change, 2) else f" Accuracy is as before, {known[-1]:.2f} %."
    return lead


def _made(record: Record, plan: Plan, figures: Mapping[str, Any], origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    options, rows = plan.options, []
    rows += [("Command", command) for command in texts(origin.get("commands", ()))]
    rows.append(("Model", f"{record.kind}" + (f", built from {record.spec}" if record.spec else "")))
    if "weights" in origin:
        weights = mapping(origin["weights"])
        rows.append(("Weights", f"{text(weights['file'])}, SHA-256 {text(weights['sha256'])}"))
    if "images" in origin:
        rows.append(("Images", text(origin["images"])))
    rows.append(("Planned", _planned(plan)))
    looks = plan.criterion in criteria() and get_criterion(plan.criterion).needs_images
    if looks and "images" in options:
        rows.append(("Criterion", f"{plan.criterion}, on at most {count(options['images']):,} images, without labels"))
    if "seed" in options:
        rows.append(("Seed", f"{count(options['seed'])}"))
    for what, found in (("Recovery", figures), ("Recovery later", mapping(figures.get("regained") or {}))):
        if found.get("recovery") is not None:
            rows.append((what, _recovery(mapping(found["recovery"]))))
    if "measured_on" in figures:
        on = mapping(figures["measured_on"])
        rows.append(("Latency measured on", f"{text(on['device'])}, {text(on['processor'])}, a batch of "
                     f"{count(on['batch'])}, threads: {count(on['threads'])}"))  # fmt: skip
        rows.append(("Versions", f"convpare {text(on['convpare'])}, torch {text(on['torch'])}"))
    rows.append(("This page", f"convpare {__version__}"))
    return rows


def _planned(plan: Plan) -> str:
    asked = ", ".join(f"{name} × {fraction:g}" for name, fraction in plan.requested.items()) or "by a threshold"
    methods = " and ".join(texts(plan.options.get("methods", ("prune",))))
    return f"{methods} under {asked}; criterion {plan.criterion}; predicted error {plan.error:.3g}; {plan.form} form"


def _recovery(found: Mapping[str, Any]) -> str:
    labels = "with labels" if found["labels"] is True else "without labels"
    passes = count(found["gradient_passes"])
    said = f"{text(found['method'])} on {count(found['images']):,} images, {labels}, "
    return said + (f"{passes:,} gradients of images" if passes else "without gradients")


def _cloud(found: Truncation, form: str) -> Cloud:
    points = [p for p in found.points if p.form == form]
    single = tuple((p.layer, p.depth, p.norm_loss, p.top1) for p in points if p.layer != ALL)
    joint = sorted((p.norm_loss, p.top1) for p in points if p.layer == ALL)
    borne = sorted(found.tolerates(layer, form) for layer in dict.fromkeys(row[0] for row in single))
    summary = (statistics.median(borne), borne[0], borne[-1]) if borne else None
    return Cloud(form, single, tuple(joint), summary)


def _points(value: float) -> str:
    return "1 point" if value == 1 else f"{value:g} points"


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " ".join("×".join(map(str, shape)) for shape in shapes)
