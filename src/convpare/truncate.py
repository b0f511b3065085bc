"""The truncation experiment: how much of its kernels a trained network can lose along every cut (arXiv 2403.14379)."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from convpare.data import Data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.factorize import Factors, Ranks, chain, factorize, get_form
from convpare.factorize.chain import kernel_of
from convpare.graph.capture import Inputs
from convpare.graph.structure import Graph
from convpare.graph.trace import trace
from convpare.jsonable import finite
from convpare.notebook import html_table
from convpare.points import PointStore
from convpare.recovery.training import TrainOptions, train_
from convpare.redundancy.cuts import cuts_of

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
ALL = "all layers"
As = Literal["dense", "factors"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TruncateOptions:
    """What is truncated and what is measured.

    Attributes:
        forms: cuts (`oi|hw`) or formats (`tucker`, `tt:oihw`, `cp`), see `convpare.factorize`; default: all cuts of the
            network's convolutions.
        fractions: of the full ranks, what is kept.
        layers: names of the convolutions; default: all.
        each: truncate every layer alone.
        joint: truncate all layers at once.
        images: labelled images that accuracy is measured on, a fixed random choice; None for all.
        retrain: fractions at which the network with all layers truncated is trained again.
        retrain_as: "dense" trains the truncated kernels, which may leave the low rank; "factors" chains of layers.
        retrain_images: labelled training images of that; None for all.
        training: how that is done.
        tolerated: loss of accuracy, in points, up to which a truncation counts as tolerated.

    Raises:
        ConvpareError: a value makes no sense.
    """

    forms: tuple[str, ...] | None = None
    fractions: tuple[float, ...] = FRACTIONS
    layers: tuple[str, ...] | None = None
    each: bool = True
    joint: bool = True
    images: int | None = 1000
    retrain: tuple[float, ...] = ()
    retrain_as: tuple[As, ...] = ("dense", "factors")
    retrain_images: int | None = None
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=0.01, schedule="cosine"))
    tolerated: float = 1.0

    def __post_init__(self) -> None:
        for name in self.forms or ():
            get_form(name)
        if not self.fractions or not all(0 < f <= 1 for f in (*self.fractions, *self.retrain)):
            raise ConvpareError(
                f"fractions are {self.fractions} and {self.retrain}; expected shares of the full rank, in (0, 1]"
            )
        if not set(self.retrain_as) <= set(get_args(As)):
            raise ConvpareError(f"retrain_as is {self.retrain_as}; choose of {', '.join(get_args(As))}")
        if not (self.each or self.joint):
            raise ConvpareError("neither each layer alone nor all at once is to be truncated; choose one or both")


@dataclass(frozen=True)
class Truncated:
    """One truncation.

    Attributes:
        layer: or "all layers".
        depth: of the layer in the order of execution, from 0 to 1; nan for all.
        form: cut or format.
        fraction: of the full rank that was asked for.
        ranks: of the layer; none for all.
        norm_loss: 1 - ‖T_χ‖/‖T‖; for all layers the mean over them. Not the same scale as `relative_error`.
        relative_error: ‖T - T_χ‖/‖T‖, likewise.
        params: what the factors hold, as a share of the kernels; nan where the form has no chain.
        top1: accuracy in per cent, without training.
    """

    layer: str
    depth: float
    form: str
    fraction: float
    ranks: tuple[int, ...]
    norm_loss: float
    relative_error: float
    params: float
    top1: float


@dataclass(frozen=True)
class Retrained:
    """All layers truncated, and trained again; `form` "none" is the network as it was, with the same training."""

    form: str
    fraction: float
    kind: As
    epochs: int
    before: float
    top1: float


@dataclass(frozen=True)
class Claims:
    """The paper's claims on these points.

    Attributes:
        depth: by form, Spearman's ρ of the depth of a layer and the largest norm loss it tolerates, with its p-value:
            positive if deeper layers tolerate more.
        within: by form, the mean over layers of ρ between norm loss and accuracy loss along that form alone.
        across: ρ between norm loss and accuracy loss over the points of one layer along all forms, a mean over layers.
        spread: accuracy losses, in points, at a norm loss of 10 %: (smallest, largest) over the forms, a mean over
            layers; nan where no layer has two forms that reach it.
    """

    depth: Mapping[str, tuple[float, float]]
    within: Mapping[str, float]
    across: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Truncation:
    """The experiment's points, and what they say about the paper's claims."""

    model: str
    images: int
    base: float
    tolerated: float
    points: tuple[Truncated, ...]
    retrained: tuple[Retrained, ...]

    @property
    def claims(self) -> Claims:
        return _claims(self)

    def tolerates(self, layer: str, form: str) -> float:
        """The largest norm loss of a layer along a form before accuracy falls by more than was tolerated."""
        points = sorted((p for p in self.points if (p.layer, p.form) == (layer, form)), key=lambda p: p.norm_loss)
        largest = 0.0
        for point in points:
            if self.base - point.top1 > self.tolerated:
                break
            largest = point.norm_loss
        return largest

    def to_json(self) -> dict[str, Any]:
        content = asdict(self) | {"claims": asdict(self.claims)}
        found: dict[str, Any] = finite(content)
        return found

    def _repr_html_(self) -> str:
        """As a notebook shows it: what each form costs in all layers at once, and what training won back."""
        joint = {(p.form, p.fraction): f"{p.top1:.2f}" for p in self.points if p.layer == ALL}
        forms, fractions = dict.fromkeys(form for form, _ in joint), sorted({f for _, f in joint}, reverse=True)
        rows = [(form, *(joint.get((form, f), "") for f in fractions)) for form in forms]
        title = f"{self.model}: {self.base:.2f} % of {self.images:,} images before; {len(self.points):,} truncations"
        shown = html_table(("all layers, top-1 %", *(f"{f:g}" for f in fractions)), rows, title)
        again = [
            (r.form, f"{r.fraction:g}", r.kind, r.epochs, f"{r.before:.2f}", f"{r.top1:.2f}") for r in self.retrained
        ]
        columns = ("trained again", "fraction", "as", "epochs", "before", "top-1 %")
        return shown + (html_table(columns, again) if again else "")


def truncate(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data,
    options: TruncateOptions = TruncateOptions(),
    *,
    store: Path | None = None,
    on_progress: Progress | None = None,
) -> Truncation:
    """Truncate kernels of `model` along cuts, each layer alone and all at once, and measure norm loss and accuracy.

    The model stays as it is. Batch-norm statistics are left alone, as in the paper.

    Args:
        store: a file of JSON lines that every point goes to as it comes; what it holds already is not measured again.

    Raises:
        ConvpareError: the model cannot be captured, has no convolution that can be truncated, the images have no
            labels, a form does not suit any layer, or the store holds something else.
    """
    tell = on_progress or (lambda *_: None)
    tell("tracing", 0, 1)
    graph = trace(model, example_inputs)
    layers = _layers(model, graph, options)
    forms = options.forms or tuple(c.name for n in sorted({_dimensions(model, x) for x in layers}) for c in cuts_of(n))
    test = data.evaluation
    batches = list(test.batches(256, limit=options.images, seed=None if options.images is None else 0))
    run = _Run(copy.deepcopy(model), layers, batches, PointStore(store, "truncation", _is_point))
    jobs = [
        *(([name], f) for f in forms for name in layers if options.each),
        *((layers, f) for f in forms if options.joint),
    ]
    base = run.accuracy()
    points: list[Truncated] = []
    for done, (names, form) in enumerate(jobs):
        tell("truncating", done, len(jobs))
        points += run.sweep(names, form, options.fractions)
    if not points:
        raise ConvpareError(
            f"none of {', '.join(forms)} truncates a layer of {type(model).__name__} at these fractions"
        )
    retrained = tuple(_retrained(run, model, data, forms, options, tell)) if options.retrain else ()
    seen = sum(len(x) for x, _ in batches)
    return Truncation(type(model).__name__, seen, base, options.tolerated, tuple(points), retrained)


class _Run:
    """A copy of the model in which kernels are replaced for a moment."""

    def __init__(self, model: nn.Module, layers: Sequence[str], batches: list[Any], store: PointStore) -> None:
        self.model, self.layers, self.batches, self.store = model, layers, batches, store
        self.of = {"model": _digest(model.state_dict().values()), "images": _digest(x for x, _ in batches)}

    def accuracy(self) -> float:
        return float(self._top1({"form": "none"}, {})["top1"])

    def sweep(self, names: Sequence[str], form: str, fractions: Sequence[float]) -> Iterator[Truncated]:
        """One layer or several along one form, from the largest fraction on; equal ranks are measured once."""
        seen = set()
        for fraction in sorted(fractions, reverse=True):
            ranks = {name: r for name in names if (r := self._ranks(name, form, fraction)) is not None}
            if not ranks or tuple(ranks.items()) in seen:
                continue
            seen.add(tuple(ranks.items()))
            yield self._point(names, form, fraction, ranks)

    def factors(self, form: str, fraction: float) -> dict[str, Factors]:
        """Every layer that the form truncates, as factors."""
        ranks = {name: r for name in self.layers if (r := self._ranks(name, form, fraction)) is not None}
        return {name: factorize(self.model.get_submodule(name), form, r) for name, r in ranks.items()}

    def _ranks(self, name: str, form: str, fraction: float) -> tuple[int, ...] | None:
        """The ranks of a layer; None where the form does not suit it, or nothing would be cut off."""
        chosen, kernel = get_form(form), kernel_of(self.model.get_submodule(name))
        try:
            full = Ranks.of(1.0).resolve(chosen, kernel)
            ranks = Ranks.of(fraction).resolve(chosen, kernel)
        except ConvpareError:
            return None
        return None if ranks == full else ranks

    def _point(
        self, names: Sequence[str], form: str, fraction: float, ranks: Mapping[str, tuple[int, ...]]
    ) -> Truncated:
        single = len(names) == 1
        settings = {"form": form, "ranks": {name: list(r) for name, r in ranks.items()}}
        found = self.store.get(self.of | settings)
        if found is None:
            made = {name: factorize(self.model.get_submodule(name), form, r) for name, r in ranks.items()}
            errors = [f.relative_error for f in made.values()]
            measures = {
                "norm_loss": float(np.mean([self._norm_loss(name, f) for name, f in made.items()])),
                "relative_error": float(np.mean(errors)),
                "params": self._params(made),
            }
            with self._truncated(made):
                found = self._top1(settings, measures)
        layer = names[0] if single else ALL
        depth = self.layers.index(layer) / max(len(self.layers) - 1, 1) if single else math.nan
        params = math.nan if found["params"] is None else found["params"]
        return Truncated(
            layer, depth, form, fraction, ranks[layer] if single else (), found["norm_loss"], found["relative_error"],
            params, found["top1"],
        )  # fmt: skip

    def _norm_loss(self, name: str, factors: Factors) -> float:
        whole = kernel_of(self.model.get_submodule(name)).tensor.double().norm()
        return float(1 - factors.kernel().tensor.double().norm() / whole)

    def _params(self, made: Mapping[str, Factors]) -> float | None:
        if not all(f.links for f in made.values()):
            return None
        whole = sum(kernel_of(self.model.get_submodule(name)).tensor.numel() for name in made)
        return sum(f.params - f.bias for f in made.values()) / whole

    @contextmanager
    def _truncated(self, made: Mapping[str, Factors]) -> Iterator[None]:
        before = {name: _weight(self.model, name).detach().clone() for name in made}
        put_kernels_(self.model, made)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    _weight(self.model, name).copy_(weight)

    def _top1(self, settings: Mapping[str, Any], measures: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy of the model as it is now, with what else was measured; from the store if it is there."""
        known = self.store.get(self.of | dict(settings))
        if known is not None:
            return known
        return self.store.add(self.of | dict(settings), {**measures, "top1": evaluate(self.model, self.batches).top1})


def put_kernels_(model: nn.Module, made: Mapping[str, Factors]) -> None:
    """Give layers of `model` their truncated kernels."""
    with torch.no_grad():
        for name, factors in made.items():
            _weight(model, name).copy_(factors.kernel().weight(factors.transposed))


def _weight(model: nn.Module, layer: str) -> nn.Parameter:
    return cast(nn.Parameter, model.get_submodule(layer).weight)


def put_chains_(model: nn.Module, made: Mapping[str, Factors]) -> None:
    """Put chains of plain layers in the place of layers of `model`. Raises ConvpareError if a form has none."""
    for name, factors in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, chain(model.get_submodule(name), factors))


def _retrained(
    run: _Run, model: nn.Module, data: Data, forms: Sequence[str], options: TruncateOptions, tell: Progress
) -> Iterator[Retrained]:
    """The network as it was and all truncated ones, after the same training."""
    jobs: list[tuple[str, float, As]] = [("none", 1.0, "dense")]
    jobs += [(form, f, kind) for f in options.retrain for form in forms for kind in options.retrain_as]
    limit = options.retrain_images
    images = labels = None
    for done, (form, fraction, kind) in enumerate(jobs):
        tell("training again", done, len(jobs))
        made = {} if form == "none" else run.factors(form, fraction)
        if form != "none" and not made:
            continue
        settings = {
            "form": form, "ranks": {name: list(f.ranks) for name, f in made.items()}, "kind": kind,
            "images_seen": limit, **asdict(options.training),
        }  # fmt: skip
        found = run.store.get(run.of | settings)
        if found is None:
            if images is None:
                images, labels = next(data.train.batches(len(data.train), limit=limit, seed=0))
                if labels is None:
                    raise ConvpareError("training again needs labels, and these images have none; leave retrain out")
            assert labels is not None
            net = copy.deepcopy(model)
            (put_kernels_ if kind == "dense" else put_chains_)(net, made)
            before = evaluate(net, run.batches).top1
            train_(net, images, labels, options.training)
            found = run.store.add(run.of | settings, {"before": before, "top1": evaluate(net, run.batches).top1})
        yield Retrained(form, fraction, kind, options.training.epochs, found["before"], found["top1"])


def _layers(model: nn.Module, graph: Graph, options: TruncateOptions) -> list[str]:
    """The convolutions, in the order of execution."""
    known = [x.name for x in graph.layers if x.kind.startswith("conv") and not x.computed and x.weight != x.name]
    if options.layers is not None and (missing := sorted(set(options.layers) - set(known))):
        raise ConvpareError(f"{missing[0]!r} is no convolution of {graph.model}; choose of {', '.join(known)}")
    chosen = [name for name in known if options.layers is None or name in options.layers]
    if not chosen:
        raise ConvpareError(f"{graph.model} has no convolution that could be truncated")
    return chosen


def _dimensions(model: nn.Module, layer: str) -> int:
    return kernel_of(model.get_submodule(layer)).dimensions


def _claims(found: Truncation) -> Claims:
    single = [p for p in found.points if p.layer != ALL]
    forms = list(dict.fromkeys(p.form for p in single))
    layers = list(dict.fromkeys(p.layer for p in single))
    by = {(x, f): [p for p in single if (p.layer, p.form) == (x, f)] for x in layers for f in forms}
    depths = {p.layer: p.depth for p in single}
    depth = {}
    for form in forms:
        mine = [x for x in layers if by[x, form]]
        depth[form] = _rho([depths[x] for x in mine], [found.tolerates(x, form) for x in mine])
    within = {f: _mean([_loss_rho(found, by[x, f]) for x in layers]) for f in forms}
    across = _mean([_loss_rho(found, [p for f in forms for p in by[x, f]]) for x in layers])
    spreads = [
        at for x in layers if len(at := [v for f in forms if (v := _loss_at(found, by[x, f], 0.1)) is not None]) > 1
    ]
    return Claims(depth, within, across, (_mean([min(s) for s in spreads]), _mean([max(s) for s in spreads])))


def _loss_rho(found: Truncation, points: Sequence[Truncated]) -> float:
    return _rho([p.norm_loss for p in points], [found.base - p.top1 for p in points])[0]


def _loss_at(found: Truncation, points: Sequence[Truncated], norm_loss: float) -> float | None:
    """Accuracy loss at a norm loss between two points, along a straight line; None outside them."""
    ordered = sorted((p.norm_loss, found.base - p.top1) for p in points)
    if not ordered or not ordered[0][0] <= norm_loss <= ordered[-1][0]:
        return None
    norm_losses, losses = np.array(ordered).T
    return float(np.interp(norm_loss, norm_losses, losses))


def _rho(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's ρ and its p-value; nan for fewer than three points, or where all are alike."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    from scipy.stats import spearmanr  # half a second to import

    result = spearmanr(x, y)
    return float(result.statistic), float(result.pvalue)


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _is_point(found: Mapping[str, Any]) -> bool:
    numbers = [value for key, value in found.items() if not (key == "params" and value is None)]
    return "top1" in found and all(type(x) in (int, float) and math.isfinite(x) for x in numbers)


def _digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of tensors, so that stored points are never taken for another network's or other images'."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(str((tuple(x.shape), x.dtype)).encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
