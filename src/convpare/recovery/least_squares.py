"""Compensation without labels or gradients: layers that read changed inputs are re-fitted by least squares.

The compressed network and the original run side by side over calibration images. Before a convolution or linear layer
of the compressed one runs, its weights are replaced by those that bring what follows nearest to the original:

    minimise  Σ ‖ρ(s ⊙ (W x + c) + t + o) − ρ(z)‖² + λ ‖W − W₀‖²    over W and c, over images and positions

x is what the layer reads *now*, z the original's value after the layer's batch norm (scale s, shift t) and, where the layer
then joins a branch o that is known already (a shortcut), after the addition: so that each block corrects the error of
the stream instead of handing it on. ρ is the rectifier that follows, if one does: where the original is negative, any
negative value will do. It is minimised by a few least-squares fits, each to targets that the one before makes harmless;
the loss never rises.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph, Layer
from convpare.graph.trace import operator_name
from convpare.redundancy.patches import Geometry, columns, draw_places, split_groups
from convpare.recovery.lockstep import Run, check_aligned

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
TRANSPARENT = ("aten.dropout", "aten.dropout_", "aten.contiguous")
ADDITIONS = ("aten.add", "aten.add_")
RECTIFIERS = ("aten.relu", "aten.relu_")


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


@dataclass(frozen=True)
class Fitted:
    """Layers that were re-fitted, and layers that keep their weights although their inputs changed, with the reason."""

    layers: tuple[str, ...]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Site:
    """A layer in the running graph: its node, what follows it linearly, and whether a rectifier comes then."""

    layer: Layer
    node: Node
    norm: Node | None
    end: Node  # the node at which the output is compared: the layer itself, its norm, or the sum
    other: Node | None  # the other operand of the sum
    rectified: bool


def compensate_(
    student: nn.Module,
    teacher: nn.Module,
    graph: Graph,
    keep: np.ndarray,
    images: Tensor,
    options: LeastSquares = LeastSquares(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Re-fit `student` in place.

    Args:
        student: `teacher` without the channels that the mask `keep` (channels of `graph`,) drops.
        images: (n, …) calibration images; both networks' activations for all of them are held in memory, layer by layer.
        on_progress: called with (layers done, layers in all).

    Raises:
        ConvpareError: the two networks run different operators, or the images contain NaN.
    """
    batches = _equal_batches(images)
    left, right = Run(teacher, batches), Run(student, batches)
    check_aligned(left, right)
    sites, kept = _sites(right, graph, keep, options)
    twins = [left.nodes[right.position[s.end]] for s in sites]
    left.snapshot(twins)
    tensors = {**dict(student.named_parameters(remove_duplicate=False)), **dict(student.named_buffers(remove_duplicate=False))}
    generator = torch.Generator().manual_seed(options.seed)
    for number, (site, twin) in enumerate(zip(sites, twins, strict=True)):
        right.advance(right.position[site.node])
        left.advance(right.position[site.end] + 1)
        channels = torch.as_tensor(graph.kept(site.layer.out, keep))
        problem = _Problem.gather(site, right, left.value(twin), channels, tensors, options, generator)
        problem.solve(options)
        left.forget(twin)
        if on_progress is not None:
            on_progress(number + 1, len(sites))
    return Fitted(tuple(s.layer.name for s in sites), kept)


def _equal_batches(images: Tensor, size: int = 64) -> list[Tensor]:
    """Batches of one size, for the captured graph has the batch size in it; up to size − 1 images are left out."""
    if not torch.isfinite(images).all():
        raise ConvpareError("the calibration images contain NaN or infinite values")
    size = min(size, len(images))
    return list(images[: len(images) // size * size].split(size))


def _sites(run: Run, graph: Graph, keep: np.ndarray, options: LeastSquares) -> tuple[list[Site], dict[str, str]]:
    """The layers to fit in the order of execution: all from the first on that reads fewer channels."""
    layers = {layer.weight: layer for layer in graph.layers}
    calls: dict[str, list[Node]] = {}
    for node in run.nodes:
        name = _weight_name(run, node)
        if name in layers:
            calls.setdefault(name, []).append(node)
    found, kept, changed = [], {}, False
    for name, nodes in calls.items():
        layer = layers[name]
        changed = changed or len(graph.kept(layer.into, keep)) < graph.shapes[name][layer.in_axis]
        if not changed:
            continue
        reason = _why_not(layer, nodes, graph, options)
        if reason:
            kept[layer.name] = reason
        else:
            found.append(_site(run, layer, nodes[0]))
    return found, kept


def _weight_name(run: Run, node: Node) -> str:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return run.tensors.get(weight, "") if isinstance(weight, Node) else ""


def _why_not(layer: Layer, nodes: list[Node], graph: Graph, options: LeastSquares) -> str | None:
    unknowns = math.prod(graph.shapes[layer.weight][1:])
    if layer.kind == "conv_transpose":
        return "transposed convolutions are not fitted"
    if len(nodes) > 1:
        return "it runs several times with one weight"
    if unknowns > options.widest:
        return f"{unknowns} unknowns per output channel are more than {options.widest}"
    return None


def _site(run: Run, layer: Layer, node: Node) -> Site:
    norm, here = None, node
    while len(here.users) == 1:
        user = next(iter(here.users))
        name = operator_name(user)
        if name == "aten.batch_norm" and norm is None and here.meta["val"].shape == node.meta["val"].shape:
            norm = user
        elif name in ADDITIONS:
            other = _known_operand(run, user, here, run.position[node])
            if other is None:
                break
            return Site(layer, node, norm, user, other, _is_rectified(user))
        elif name not in TRANSPARENT:
            break
        here = user
    return Site(layer, node, norm, norm or node, None, _is_rectified(here))


def _known_operand(run: Run, addition: Node, mine: Node, position: int) -> Node | None:
    """The other operand of an addition, if it is an activation of the same shape that is known before the layer runs."""
    others = [a for a in addition.args if isinstance(a, Node) and a is not mine]
    if len(others) != 1 or addition.kwargs or run.position.get(others[0], position) >= position:
        return None
    return others[0] if others[0].meta["val"].shape == addition.meta["val"].shape else None


def _is_rectified(node: Node) -> bool:
    return bool(node.users) and all(operator_name(user) in RECTIFIERS for user in node.users)


@dataclass
class _Problem:
    """One layer's fit. For each of its groups: inputs x (groups, unknowns, samples), targets z and branch o
    (groups, out_channels per group, samples), scale s and shift t (groups, out_channels per group, 1)."""

    x: Tensor
    z: Tensor
    o: Tensor | None
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None  # of the batch norm that follows, which takes the intercept where there is no bias
    rectified: bool

    @staticmethod
    def gather(
        site: Site, run: Run, targets: list[Tensor], channels: Tensor, tensors: Mapping[str, Tensor],
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
            wanted_z.append(split_groups(_flat(z.index_select(axis, channels.to(z.device)), axis)[:, :, places], groups))
            if o is not None:
                branch.append(split_groups(_flat(o, axis)[:, :, places], groups))
        scale, shift, mean = _affine(site, run, tensors, weight)
        per_group = [v.reshape(groups, -1, 1) for v in (scale, shift)]
        return _Problem(
            torch.cat(seen, 2), torch.cat(wanted_z, 2), torch.cat(branch, 2) if branch else None,
            per_group[0], per_group[1], weight, tensors[site.layer.bias] if site.layer.bias else None, mean,
            site.rectified,
        )  # fmt: skip

    def solve(self, options: LeastSquares) -> None:
        """Write the minimiser into the weight, and the intercept into the bias or the batch norm's mean."""
        old = self.weight.detach().double().reshape(*self.z.shape[:2], -1)
        intercept = self.bias is not None or self.mean is not None
        centre = self.x.mean(2, keepdim=True) if intercept else torch.zeros_like(self.x[:, :, :1])
        x = self.x - centre
        moment = (x @ x.mT).double() / x.shape[2]
        ridge = options.ridge * moment.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        eye = torch.eye(moment.shape[1], dtype=torch.float64, device=moment.device) * ridge[:, None, None]
        factor = torch.linalg.cholesky(moment + eye)
        alive = self.scale.abs() > 1e-6 * self.scale.abs().max()
        safe = torch.where(alive, self.scale, torch.ones_like(self.scale))
        fixed = self.shift if self.o is None else self.shift + self.o
        z, fitted = self.z, None
        for _ in range(1 + (options.rectifier_steps if self.rectified else 0)):
            if fitted is not None:  # where the original is negative, any negative value is as good
                z = torch.where(self.z > 0, self.z, (self.scale * fitted + fixed).clamp_max(0))
            y = (z - fixed) / safe
            mean = y.mean(2, keepdim=True) if intercept else torch.zeros_like(y[:, :, :1])
            cross = ((y - mean) @ x.mT).double() / x.shape[2]
            weight = torch.cholesky_solve((cross + old @ eye).mT, factor).mT
            fitted = weight.to(x.dtype) @ x + mean
        weight = torch.where(alive, weight, old)
        self._write(weight, mean.double() - weight @ centre.double(), alive)

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
    if site.layer.kind == "linear":
        return Geometry()
    given = dict(zip(("stride", "padding", "dilation"), site.node.args[3:6], strict=False)) | dict(site.node.kwargs)
    return Geometry.of(
        tuple(weight.shape[2:]), given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
    )


def _affine(
    site: Site, run: Run, tensors: Mapping[str, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale and shift (out_channels,) of the batch norm that follows, 1 and 0 without one, and its running mean."""
    out = weight.shape[0]
    ones, zeros = weight.new_ones(out), weight.new_zeros(out)
    if site.norm is None:
        return ones, zeros, None
    gamma, beta, mean, variance = (
        tensors[run.tensors[a]].detach() if isinstance(a, Node) else None for a in site.norm.args[1:5]
    )
    if mean is None or variance is None:
        raise ConvpareError(f"the batch norm after {site.layer.name} keeps no running statistics")
    eps = float(site.norm.args[7])  # type: ignore[arg-type]
    scale = (variance + eps).rsqrt() * (ones if gamma is None else gamma)
    return scale, (zeros if beta is None else beta) - mean * scale, mean
