"""Compensation without labels or gradients: layers that read changed inputs are re-fitted by least squares.

The compressed network and the original run side by side over calibration images. Before a convolution or linear layer
of the compressed one runs, its weights are replaced by those that bring what follows nearest to the original:

    minimise  Σ ‖W x + c − y‖² + λ ‖W − W₀‖²,  y = (z − t − o) / s,  over W and c, over images and positions

x is what the layer reads *now*, z the original's value after the layer's batch norm (scale s, shift t) and, where the
layer then joins a branch o that is known already (a shortcut), after the addition: so that each block corrects the
error of the stream instead of handing it on. Where a rectifier follows and clips z, any value beyond the clip is as
good: only what is on this side of it counts there. That is minimised by a few least-squares fits, each to targets that
the one before makes harmless; this loss never rises.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.factorize.edit import Factorize, layer_of
from convpare.factorize.forms import get_form
from convpare.factorize.graph_edit import is_operator
from convpare.factorize.metric import Metric
from convpare.graph.structure import Graph, Layer
from convpare.graph.tracer import operator_name
from convpare.recovery.lockstep import Run, aligned
from convpare.redundancy.cuts import Kernel
from convpare.redundancy.gram import gram
from convpare.redundancy.patches import Geometry, columns, draw_places, second_moment, split_groups

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
TRANSPARENT = ("aten.dropout", "aten.dropout_", "aten.contiguous")
ADDITIONS = ("aten.add", "aten.add_")


@dataclass(frozen=True)
class LeastSquares:
    """How layers are re-fitted.

    Attributes:
        ridge: λ, relative to the mean second moment of the layer's inputs.
        samples: image positions per unknown of an output channel; positions are drawn at random.
        least_samples: at least so many positions for a layer, where there are as many.
        rectifier_steps: further fits where a rectifier follows.
        memory: bytes of inputs that one fit may hold.
        widest: layers with more unknowns per output channel than this keep their weights.
        seed: of the drawing of positions.
    """

    ridge: float = 1e-4
    samples: int = 64
    least_samples: int = 4096
    rectifier_steps: int = 3
    memory: int = 2**29
    widest: int = 6144
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ridge", "rectifier_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConvpareError(f"{name} is {getattr(self, name)}; expected a number of 0 or more")
        for name in ("samples", "least_samples", "memory", "widest"):
            if getattr(self, name) < 1:
                raise ConvpareError(f"{name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class Fitted:
    """Layers that were re-fitted, and layers that keep their weights although their inputs changed, with the reason."""

    layers: tuple[str, ...]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Site:
    """A layer in the running graph: its node, what follows it linearly, and where a rectifier clips what comes then."""

    layer: Layer  # of a chain, the last one
    name: str
    channels: Tensor  # of the original's output that it puts out
    node: Node
    norm: Node | None
    end: Node  # the node at which the output is compared: the layer itself, its norm, or the sum
    other: Node | None  # the other operand of the sum
    clips: tuple[float, float]
    bias: str | None  # the bias and the norm's running mean, where they are this layer's alone
    mean: str | None
    geometry: Geometry | None = None  # of the layer that a chain stands for; else the node's own


def compensate_(
    student: nn.Module,
    teacher: nn.Module,
    graph: Graph,
    keep: np.ndarray,
    images: Tensor,
    options: LeastSquares = LeastSquares(),
    on_progress: Callable[[int, int], None] | None = None,
    chains: Sequence[Factorize] = (),
) -> Fitted:
    """Re-fit `student` in place.

    Args:
        student: `teacher` without the channels that the mask `keep` (channels of `graph`,) drops.
        chains: layers that the student has as chains. Of those that are cut in two the layer itself is fitted, and
            factorized anew for what it reads and puts out now; the last layer of every chain is fitted after that.
        images: (n, …) calibration images; both networks' activations for all of them are in memory, layer by layer.
        on_progress: called with (layers done, layers in all).

    Raises:
        ConvpareError: the two networks run different operators, `keep` does not lead from one to the other, they are in
            half precision, or the images or inputs of a layer contain NaN.
    """
    tensors: dict[str, Tensor] = dict(student.named_parameters(remove_duplicate=False))
    tensors.update(student.named_buffers(remove_duplicate=False))
    edits = {edit.layer: edit for edit in chains}
    chained = {name: str(len(list(student.get_submodule(name).children())) - 1) for name in edits}
    _check_student(tensors, graph, keep, chained)
    batches = _equal_batches(images)
    left, right = Run(teacher, batches), Run(student, batches)
    twin_of = aligned(left, right, edits, by_weights=any(is_operator(student, name) for name in edits))
    sites, kept = _sites(right, graph, keep, tensors, chained, options)
    twins = [twin_of[s.end] for s in sites]
    left.snapshot(twins)
    generator = torch.Generator().manual_seed(options.seed)
    for number, (site, twin) in enumerate(zip(sites, twins, strict=True)):
        left.advance(left.position[twin] + 1)
        if site.name in edits and (whole := _whole(site, right, teacher, edits[site.name], options)) is not None:
            right.advance(right.position[whole.node])
            dense = _slice(teacher, graph, site.name, keep)
            known = {**tensors, whole.layer.weight: dense}
            fit = _Problem.gather(whole, right, left.value(twin), known, options, generator)
            links = [tensors[f"{site.name}.{n}.weight"] for n in range(int(chained[site.name]) + 1)]
            fit.factorize(edits[site.name], links, options)
        right.advance(right.position[site.node])
        problem = _Problem.gather(site, right, left.value(twin), tensors, options, generator)
        problem.solve(options)
        left.forget(twin)
        if on_progress is not None:
            on_progress(number + 1, len(sites))
    return Fitted(tuple(s.name for s in sites), kept)


def _check_student(tensors: Mapping[str, Tensor], graph: Graph, keep: np.ndarray, chained: Mapping[str, str]) -> None:
    replaced = {f"{name}.{kind}" for name in chained for kind in ("weight", "bias")}
    for name, shape in graph.shapes.items():
        if name in replaced:
            continue
        expected = tuple(len(graph.kept((name, axis), keep)) for axis in range(len(shape)))
        if name not in tensors or tensors[name].shape != expected:
            got = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ConvpareError(f"the plan makes {name} {expected} of {shape}, but in this network it is {got}")
        if tensors[name].dtype in (torch.float16, torch.bfloat16):
            raise ConvpareError(
                f"{name} is {tensors[name].dtype}, which is too coarse for least squares; recover networks in float32, "
                "or choose batch-norm recalibration"
            )


def _equal_batches(images: Tensor, size: int = 64) -> list[Tensor]:
    """Batches of one size, for the captured graph has the batch size in it; up to size − 1 images are left out."""
    if not torch.isfinite(images).all():
        raise ConvpareError("the calibration images contain NaN or infinite values")
    size = min(size, len(images))
    return list(torch.split(images[: len(images) // size * size], size))


def _sites(
    run: Run, graph: Graph, keep: np.ndarray, tensors: Mapping[str, Tensor], chained: Mapping[str, str],
    options: LeastSquares,
) -> tuple[list[Site], dict[str, str]]:  # fmt: skip
    """The layers to fit in the order of execution: all from the first on that reads fewer channels or is a chain."""
    layers = {_last(layer, chained).weight: layer for layer in graph.layers}
    calls: dict[str, list[Node]] = {}
    for node in run.nodes:
        name = _weight_name(run, node)
        if name in layers:
            calls.setdefault(name, []).append(node)
    found, kept, changed = [], {}, False
    for name, nodes in calls.items():
        layer = layers[name]
        narrower = len(graph.kept(layer.into, keep)) < graph.shapes[layer.weight][layer.in_axis]
        changed = changed or narrower or layer.name in chained
        if not changed:
            continue
        channels, layer = torch.as_tensor(graph.kept(layer.out, keep)), _last(layer, chained)
        reason = _why_not(layer, run, tensors[name], options)
        if reason:
            kept[layers[name].name] = reason
        else:
            found.append(_site(run, layer, layers[name].name, channels, nodes[0]))
    return found, kept


def _whole(site: Site, run: Run, teacher: nn.Module, edit: Factorize, options: LeastSquares) -> Site | None:
    """The layer that a chain of two stands for, as a site at the chain's first layer, where it can be fitted as one."""
    module = layer_of(teacher, edit.layer)
    first = next(n for n in run.nodes if _weight_name(run, n) == f"{edit.layer}.0.weight")
    padded = getattr(module, "padding_mode", "zeros") != "zeros"
    late = site.other is not None and run.position.get(site.other, -1) >= run.position[first]
    wide = math.prod(edit.shape[1:]) > options.widest
    if padded or late or wide or "|" not in edit.form:
        return None
    layer = replace(site.layer, name=edit.layer, weight=edit.layer)
    return replace(site, layer=layer, node=first, geometry=Geometry.of_module(module))


def _slice(teacher: nn.Module, graph: Graph, name: str, keep: np.ndarray) -> Tensor:
    """The weight of the original's layer without what removals take, a copy."""
    layer = graph.layer(name)
    weight = teacher.get_parameter(layer.weight).detach()
    for axis in (0, 1):
        index = torch.as_tensor(graph.kept((layer.weight, axis), keep), device=weight.device)
        weight = weight.index_select(axis, index)
    return weight.clone()


def _last(layer: Layer, chained: Mapping[str, str]) -> Layer:
    """The last layer of the chain that a layer has become, if it has."""
    if layer.name not in chained:
        return layer
    name = f"{layer.name}.{chained[layer.name]}"
    return replace(layer, name=name, weight=f"{name}.weight", bias=layer.bias and f"{name}.bias")


def _weight_name(run: Run, node: Node) -> str:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return run.tensors.get(weight, "") if isinstance(weight, Node) else ""


def _why_not(layer: Layer, run: Run, weight: Tensor, options: LeastSquares) -> str | None:
    unknowns = math.prod(weight.shape[1:])
    if layer.kind == "conv_transpose":
        return "transposed convolutions are not fitted"
    if run.uses[layer.weight] > 1:
        return "its weight is used several times"
    if unknowns > options.widest:
        return f"{unknowns} unknowns per output channel are more than {options.widest}"
    return None


def _site(run: Run, layer: Layer, name: str, channels: Tensor, node: Node) -> Site:
    norm, here, end, other = None, node, node, None
    while len(here.users) == 1:
        user = next(iter(here.users))
        operator = operator_name(user)
        if operator == "aten.batch_norm" and norm is None and _is_affine(run, user, node, layer):
            norm = end = user
        elif operator in ADDITIONS:
            other = _known_operand(run, user, here, run.position[node])
            if other is not None:
                end = here = user
            break
        elif operator not in TRANSPARENT:
            break
        here = user
    mean = run.tensors[norm.args[3]] if norm is not None else None  # type: ignore[index]
    own = [name if name is not None and run.uses[name] == 1 else None for name in (layer.bias, mean)]
    return Site(layer, name, channels, node, norm, end, other, _clips_after(here), own[0], own[1])


def _is_affine(run: Run, norm: Node, node: Node, layer: Layer) -> bool:
    """Whether a batch norm scales and shifts the output channels of a layer by fixed numbers."""
    tensors, training = norm.args[1:5], norm.args[5]
    fixed = not training and None not in tensors[2:] and all(a is None or a in run.tensors for a in tensors)
    shape = node.meta["val"].shape
    return fixed and norm.meta["val"].shape == shape and (layer.kind == "conv" or len(shape) == 2)


def _known_operand(run: Run, addition: Node, mine: Node, position: int) -> Node | None:
    """The other operand of an addition, if it is an activation of the same shape, known before the layer runs."""
    others = [a for a in addition.args if isinstance(a, Node) and a is not mine]
    if len(others) != 1 or addition.kwargs or run.position.get(others[0], position) >= position:
        return None
    return others[0] if others[0].meta["val"].shape == addition.meta["val"].shape else None


def _clips_after(node: Node) -> tuple[float, float]:
    """Below and above which the rectifier that follows (ReLU, ReLU6) makes all values equal; infinite without one."""
    bounds = {_bounds(user) for user in node.users}
    return bounds.pop() if len(bounds) == 1 else (-math.inf, math.inf)


def _bounds(node: Node) -> tuple[float, float]:
    name = operator_name(node).rstrip("_")
    if name == "aten.relu":
        return 0.0, math.inf
    if name == "aten.relu6":
        return 0.0, 6.0
    if name == "aten.hardtanh":
        given = dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | dict(node.kwargs)
        return float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))  # type: ignore[arg-type]
    return -math.inf, math.inf


@dataclass
class _Problem:
    """One layer's fit. For each of its groups: inputs x (groups, unknowns, samples), targets z and branch o
    (groups, out_channels per group, samples), scale s and shift t (groups, out_channels per group, 1)."""

    name: str
    x: Tensor
    z: Tensor
    o: Tensor | None
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None  # of the batch norm that follows, which takes the intercept where there is no bias
    clips: tuple[float, float]

    @staticmethod
    def gather(
        site: Site, run: Run, targets: list[Tensor], tensors: Mapping[str, Tensor],
        options: LeastSquares, generator: torch.Generator,
    ) -> "_Problem":  # fmt: skip
        weight = tensors[site.layer.weight]
        inputs: list[Tensor] = run.value(site.node.args[0])  # type: ignore[arg-type]
        axis = site.node.meta["val"].ndim - 1 if site.layer.kind == "linear" else 1
        groups = inputs[0].shape[axis] // weight.shape[1] if site.layer.kind == "conv" else 1
        others = run.value(site.other) if site.other is not None else [None] * len(inputs)
        total = sum(math.prod(t.shape) // t.shape[axis] for t in targets)
        unknowns = math.prod(weight.shape[1:])
        wanted = min(max(options.samples * unknowns, options.least_samples), options.memory // (4 * unknowns * groups))
        share = min(1.0, wanted / total)
        geometry = _geometry(site, weight)
        seen: list[Tensor] = []
        wanted_z: list[Tensor] = []
        branch: list[Tensor] = []
        for x, z, o in zip(inputs, targets, others, strict=True):
            places = draw_places(math.prod(z.shape[1:]) // z.shape[axis], share, generator).to(z.device)
            seen.append(columns(x.movedim(axis, 1), geometry, places, groups))
            alike = _flat(z.index_select(axis, site.channels.to(z.device)), axis)
            wanted_z.append(split_groups(alike[:, :, places], groups))
            if o is not None:
                branch.append(split_groups(_flat(o, axis)[:, :, places], groups))
        scale, shift = (v.reshape(groups, -1, 1) for v in _affine(site, run, tensors, weight))
        return _Problem(
            site.name, torch.cat(seen, 2), torch.cat(wanted_z, 2), torch.cat(branch, 2) if branch else None,
            scale, shift, weight, tensors[site.bias] if site.bias else None, tensors[site.mean] if site.mean else None,
            site.clips,
        )  # fmt: skip

    def solve(self, options: LeastSquares) -> None:
        """Write the minimiser into the weight, and the intercept into the bias or the batch norm's mean."""
        old = self.weight.detach().double().reshape(*self.z.shape[:2], -1)
        intercept = self.bias is not None or self.mean is not None
        centre = self.x.mean(2, keepdim=True) if intercept else torch.zeros_like(self.x[:, :, :1])
        x = self.x - centre
        moment = (gram(x).double() if intercept else second_moment(x)) / x.shape[2]
        ridge = options.ridge * moment.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        eye = torch.eye(moment.shape[1], dtype=torch.float64, device=moment.device) * ridge[:, None, None]
        factor, failed = torch.linalg.cholesky_ex(moment + eye)
        alive = self.scale.abs() > 1e-6 * self.scale.abs().max()
        safe = torch.where(alive, self.scale, torch.ones_like(self.scale))
        fixed = self.shift if self.o is None else self.shift + self.o
        z, fitted = self.z, None
        low, high = self.clips
        rectified = self.clips != (-math.inf, math.inf)
        for _ in range(1 + (options.rectifier_steps if rectified else 0)):
            if fitted is not None:  # where the original is clipped, any value beyond the clip is as good
                now = self.scale * fitted + fixed
                z = torch.where(self.z <= low, now.clamp_max(low), self.z)
                z = torch.where(self.z >= high, now.clamp_min(high), z)
            y = (z - fixed) / safe
            mean = y.mean(2, keepdim=True) if intercept else torch.zeros_like(y[:, :, :1])
            cross = ((y - mean) @ x.mT).double() / x.shape[2]
            weight = torch.cholesky_solve((cross + old @ eye).mT, factor).mT
            fitted = weight.to(x.dtype) @ x + mean
        if failed.any() or not torch.isfinite(weight).all():
            raise ConvpareError(
                f"the inputs of layer {self.name!r} are linearly dependent, or contain NaN or infinite values; give a "
                f"ridge above {options.ridge:g}, or choose batch-norm recalibration"
            )
        weight = torch.where(alive, weight, old)
        self._write(weight, mean.double() - weight @ centre.double(), alive)

    def factorize(self, edit: Factorize, links: Sequence[Tensor], options: LeastSquares) -> None:
        """Fit this layer, and write the chain that costs least at its inputs and outputs into `links`."""
        own = [None if t is None else t.detach().clone() for t in (self.bias, self.mean)]
        replace(self, bias=own[0], mean=own[1]).solve(options)
        x = self.x - self.x.mean(2, keepdim=True)
        moment = (x @ x.mT).double() / x.shape[2]
        metric = Metric(moment, torch.diag_embed(self.scale[..., 0].double().square()))
        kernel = Kernel.of(self.weight.double(), len(moment))
        fit = get_form(edit.form).fit_to(kernel, edit.ranks, False, metric)
        with torch.no_grad():
            for tensor, link in zip(links, fit.links, strict=True):
                tensor.copy_(link.weight())

    def _write(self, weight: Tensor, intercept: Tensor, alive: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(weight.reshape(self.weight.shape))
            if self.bias is not None:
                self.bias.copy_(torch.where(alive.flatten(), intercept.flatten(), self.bias.double()))
            elif self.mean is not None:
                self.mean.sub_(torch.where(alive.flatten(), intercept.flatten(), torch.zeros_like(intercept.flatten())))


def _flat(y: Tensor, axis: int) -> Tensor:
    """(b, …) with channels on `axis` → (b, channels, positions)."""
    y = y.movedim(axis, 1)
    return y.reshape(*y.shape[:2], -1)


def _geometry(site: Site, weight: Tensor) -> Geometry:
    if site.geometry is not None:
        return site.geometry
    if site.layer.kind == "linear":
        return Geometry()
    given = dict(zip(("stride", "padding", "dilation"), site.node.args[3:6], strict=False)) | dict(site.node.kwargs)
    return Geometry.of(
        tuple(weight.shape[2:]), given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
    )


def _affine(site: Site, run: Run, tensors: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (out_channels,) of W x: by the batch norm that follows and by a bias that is not fitted."""
    ones, zeros = weight.new_ones(weight.shape[0]), weight.new_zeros(weight.shape[0])
    fixed = zeros if site.bias or not site.layer.bias else tensors[site.layer.bias].detach()
    if site.norm is None:
        return ones, fixed
    arguments = [tensors[run.tensors[a]].detach() if isinstance(a, Node) else None for a in site.norm.args[1:5]]
    gamma, beta, mean, variance = arguments
    assert mean is not None and variance is not None
    scale = (variance + float(site.norm.args[7])).rsqrt() * (ones if gamma is None else gamma)  # type: ignore[arg-type]
    return scale, (zeros if beta is None else beta) + (fixed - mean) * scale
