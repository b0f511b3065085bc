"""Random convolutional networks, on which zeroed == removed must hold: the generator, the check, and a command.

python tests/graph/fuzz.py --graphs 2000 --seed 0

A network is a list of steps, built while it is run on zeros, so that every step knows the shapes it gets. Sizes in the
forward are computed from `x.shape` or written out as numbers: the first must be exact, the second exact or frozen.
"""

import argparse
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checks import assert_attributes_true, calibrate, outputs, randomise, relative_difference
from torch import Tensor, nn

from convpare.graph import Graph, culprits, removed, self_check, trace
from convpare.planning.cost import count, total_cost

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "elu": F.elu,
    "leaky": F.leaky_relu, "cos": torch.cos, "hardswish": F.hardswish, "softplus": F.softplus, "relu6": F.relu6,
}  # fmt: skip
PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
    "add_": lambda x, y: x.clone().add_(y), "where": lambda x, y: torch.where(x > y, x, torch.tanh(y)),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3), "stack": lambda x, y: torch.stack([x, y], 1).amax(1),
    "beside": lambda x, y: torch.cat([x, y], 2), "interleave": lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
}  # fmt: skip
LITERALS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda x, number: x[:, :number], "step": lambda x, number: x[:, ::2], "flip": lambda x, number: x.flip(1),
    "roll": lambda x, number: x.roll(number, 1), "split": lambda x, number: torch.cat(x.split(number, 1)[::-1], 1),
}  # fmt: skip


class RandomNet(nn.Module):
    """`size` random steps from `seed`; the same pair always gives the same network."""

    def __init__(self, seed: int, size: int = 12) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.parts = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        self.steps: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
        self.dims = self.rng.choice([1, 2, 2, 2, 3])
        side = {1: 12, 2: 8, 3: 5}[self.dims]
        inputs = self.rng.choice([1, 1, 1, 2])
        self.shapes = [(2, self.rng.choice([1, 2, 3]), *[side] * self.dims) for _ in range(inputs)]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self._values: list[Tensor] = [torch.zeros(shape) for shape in self.shapes]
            self._grow(size)
            del self._values, self.rng
            calibrate(randomise(self, seed), self.shapes)

    # ------------------------------------------------------------------------------------------------- generation

    def _grow(self, size: int) -> None:
        for number, shape in enumerate(self.shapes):
            stem = CONV[self.dims](shape[1], self.rng.choice([4, 6, 8, 12]), 3, padding=1)
            self._add("layer", [number], part=self._part(stem))
        while len(self.steps) < size:
            makers: list[tuple[Callable[[int], None], int]] = [
                (self._conv, 6), (self._depthwise, 2), (self._transposed, 2), (self._norm, 4), (self._act, 4),
                (self._pair, 6), (self._cat, 3), (self._parts_of, 3), (self._shuffle, 2), (self._gate, 2),
                (self._linear, 2), (self._resize, 3), (self._scale, 2), (self._literal, 1), (self._again, 2),
                (self._tied, 1), (self._reduce, 1), (self._pixels, 1),
            ]  # fmt: skip
            maker = self.rng.choices([m for m, _ in makers], [w for _, w in makers])[0]
            maker(self._pick())
        self.heads: list[tuple[int, str, str]] = []
        used = {i for _, sources, _ in self.steps for i in sources}
        unused = [i for i in range(len(self.shapes), len(self._values)) if i not in used]
        if self.rng.random() < 0.2:
            unused = unused[-1:]  # the others run for nothing
        for number, source in enumerate([*unused, *([self._pick()] if self.rng.random() < 0.3 else [])]):
            kind = self.rng.choice([*["flatten", "pool", "conv"] * 4, "map"])
            x = self._values[source]
            name = f"head{number}"
            if kind == "conv":
                self.parts[name] = CONV[self.dims](x.shape[1], 2, 1)
            elif kind != "map":
                self.parts[name] = nn.Linear(x.flatten(1).shape[1] if kind == "flatten" else x.shape[1], 3)
            self.heads.append((source, kind, name))
        self.packing = self.rng.choice(["bare", "dict", "nested"])

    def _pick(self) -> int:
        """Mostly late values, so that networks get deep, and seldom an input."""
        last = len(self._values) - 1
        first = len(self.shapes) if self.rng.random() < 0.97 else 0
        return max(self.rng.randint(first, last), self.rng.randint(first, last))

    def _add(self, op: str, sources: Sequence[int], **options: Any) -> int:
        """Append a step and run it; the number of its (first) result."""
        self.steps.append((op, tuple(sources), options))
        result = getattr(self, op)(*[self._values[i] for i in sources], **options)
        first = len(self._values)
        self._values.extend(result if isinstance(result, tuple) else [result])
        return first

    def _part(self, module: nn.Module) -> str:
        name = f"p{len(self.parts)}"
        self.parts[name] = module.eval()
        return name

    def _like(self, shape: torch.Size) -> list[int]:
        return [i for i, x in enumerate(self._values) if x.shape == shape]

    def _conv(self, i: int, c_out: int | None = None) -> int:
        x = self._values[i]
        c_in, side = x.shape[1], min(x.shape[2:])
        groups = self.rng.choice([g for g in (1, 1, 1, 2, 3, 4) if c_in % g == 0])
        c_out = c_out or groups * self.rng.choice([1, 2, 3, 4, 4, 6, 8])
        groups = groups if c_out % groups == 0 else 1
        kernel = self.rng.choice([k for k in (1, 2, 3) if k <= side])
        options: dict[str, Any] = {"groups": groups, "bias": self.rng.random() < 0.6}
        if kernel == 3 and self.rng.random() < 0.6:
            options.update(padding=1, padding_mode=self.rng.choice(["zeros", "reflect", "circular", "replicate"]))
            if self.rng.random() < 0.3:
                options.update(padding="same", padding_mode="zeros", dilation=self.rng.choice([1, 2]))
            elif side > 3:
                options["stride"] = self.rng.choice([1, 2])
        return self._add("layer", [i], part=self._part(CONV[self.dims](c_in, c_out, kernel, **options)))

    def _depthwise(self, i: int) -> None:
        c = self._values[i].shape[1]
        c_out, bias = c * self.rng.choice([1, 1, 2, 3]), self.rng.random() < 0.5
        conv = CONV[self.dims](c, c_out, 3, groups=c, padding=1, bias=bias)
        if self.rng.random() < 0.3:
            self._add("functional", [i], part=self._part(conv), groups=c if self.rng.random() < 0.3 else None)
        else:
            self._add("layer", [i], part=self._part(conv))

    def _transposed(self, i: int) -> None:
        x = self._values[i]
        c = x.shape[1]
        if x[0, 0].numel() > 300:
            return
        groups = self.rng.choice([g for g in (1, 1, 2, 4, c) if c % g == 0])
        c_out = groups * self.rng.choice([1, 1, 2, 3])
        stride = self.rng.choice([1, 2])
        conv = TRANSPOSED[self.dims](c, c_out, self.rng.choice([1, 2, 3]), stride=stride, groups=groups)
        self._add("layer", [i], part=self._part(conv))

    def _norm(self, i: int) -> None:
        x = self._values[i]
        c, affine = x.shape[1], self.rng.random() < 0.7
        kinds = [BATCH_NORM[self.dims](c, affine=affine), nn.PReLU(c)]
        if x[0, 0].numel() > 3:
            kinds += [INSTANCE_NORM[self.dims](c, affine=affine, track_running_stats=self.rng.random() < 0.3)]
            kinds += [BATCH_NORM[self.dims](c, affine=affine, track_running_stats=False)]
        if self.rng.random() < 0.1:
            kinds = [nn.GroupNorm(1, c, affine=affine)]
        self._add("layer", [i], part=self._part(self.rng.choice(kinds)))

    def _act(self, i: int) -> None:
        self._add("act", [i], kind=self.rng.choice(list(ACTIVATIONS)))

    def _pair(self, i: int) -> None:
        x = self._values[i]
        others = [j for j in self._like(x.shape) if j != i]
        if not others or self.rng.random() < 0.3:
            j = self._add("layer", [i], part=self._part(CONV[self.dims](x.shape[1], x.shape[1], 3, padding=1)))
        else:
            j = self.rng.choice(others)
        self._add("pair", [i, j], kind=self.rng.choice([*PAIRWISE, "add", "add", "add"]))

    def _cat(self, i: int) -> None:
        x = self._values[i]
        fitting = [j for j, y in enumerate(self._values) if y.shape[2:] == x.shape[2:]]
        chosen = [i, *self.rng.choices(fitting, k=self.rng.choice([1, 1, 2]))]
        if sum(self._values[j].shape[1] for j in chosen) <= 40:
            self._add("cat", chosen)

    def _parts_of(self, i: int) -> None:
        c = self._values[i].shape[1]
        n = self.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        if n == 1:
            return
        first = self._add(self.rng.choice(["chunk", "split", "unbound"]), [i], n=n)
        order = list(range(first, first + n))
        self.rng.shuffle(order)
        j = self._add("act", [order[0]], kind="tanh")
        if self.rng.random() < 0.5:
            self._add("cat", [j, *order[1:]])
        elif n > 1:
            self._add("pair", [j, order[1]], kind="mul")

    def _shuffle(self, i: int) -> None:
        c = self._values[i].shape[1]
        g = self.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        if g > 1 and self.rng.random() < 0.3:
            self._add("layer", [i], part=self._part(nn.ChannelShuffle(g)))
        else:
            how = self.rng.choice(["computed", "computed", "open", "open", "written", "slots", "slots open"])
            self._add("shuffle", [i], g=g, slots=c // g, how=how)

    def _gate(self, i: int) -> None:
        c = self._values[i].shape[1]
        kind = self.rng.choice(["squeeze", "squeeze", "spatial"])
        if kind == "spatial":
            self._add("spatial_gate", [i], part=self._part(CONV[self.dims](c, 1, 1)), expand=self.rng.random() < 0.3)
        else:
            down = nn.Linear(c, self.rng.choice([1, 2, 3]))
            up = nn.Linear(down.out_features, c)
            self._add("gate", [i], down=self._part(down), up=self._part(up), expand=self.rng.random() < 0.4)

    def _linear(self, i: int) -> None:
        c = self._values[i].shape[1]
        linear = nn.Linear(c, self.rng.choice([1, 2, 4, c]), bias=self.rng.random() < 0.5)
        self._add("channels_last", [i], part=self._part(linear))

    def _resize(self, i: int) -> None:
        x = self._values[i]
        side = min(x.shape[2:])
        kind = self.rng.choice(["pool", "adaptive", "up", "pad", "cut", "stride", "flip", "mean"])
        if kind == "pool" and side >= 2:
            self._add("layer", [i], part=self._part(self.rng.choice([MAX_POOL, AVG_POOL])[self.dims](2)))
        elif kind == "adaptive":
            self._add("layer", [i], part=self._part(ADAPTIVE_MAX[self.dims](min(side, 2))))
        elif kind == "up" and x[0, 0].numel() <= 150:
            self._add("layer", [i], part=self._part(nn.Upsample(scale_factor=2)))
        elif kind == "pad" and side >= 2:
            self._add("spatial_pad", [i], mode=self.rng.choice(["constant", "reflect", "circular", "replicate"]))
        elif kind in ("cut", "stride", "flip") and side >= 2:
            self._add("spatial_pick", [i], kind=kind)
        elif kind == "mean":
            self._add("centred", [i])

    def _scale(self, i: int) -> None:
        name = f"s{len(self.scales)}"
        shape = [self._values[i].shape[1], *[1] * self.dims]
        self.scales[name] = nn.Parameter(torch.rand(self.rng.choice([shape, [1, *shape]])) + 0.5)
        self._add("scaled", [i], name=name, kind=self.rng.choice(["mul", "add", "clamp"]))

    def _literal(self, i: int) -> None:
        c = self._values[i].shape[1]
        kind = self.rng.choice(["slice", "step", "roll", "pad", "fill", "split", "flip", "write"])
        if kind in ("pad", "fill") or c > 1:
            number = self.rng.randint(1, max(1, c - 1))
            self._add("literal", [i], kind=kind, number=c + number if kind == "fill" else number)

    def _again(self, i: int) -> None:
        """A convolution that stands in the network already, run once more."""
        x = self._values[i]
        fitting = [
            name
            for name, m in self.parts.items()
            if isinstance(m, nn.modules.conv._ConvNd) and m.in_channels == x.shape[1] > 3
            and min(x.shape[2:]) > 2 * m.dilation[0] and x[0, 0].numel() <= 300
        ]  # fmt: skip
        if fitting:
            self._add("layer", [i], part=self.rng.choice(fitting))

    def _tied(self, i: int) -> None:
        """A new convolution with the kernel of another."""
        x = self._values[i]
        side = min(x.shape[2:])
        for m in list(self.parts.values()):
            if isinstance(m, CONV[self.dims]) and m.in_channels == x.shape[1] > 3 and m.kernel_size[0] <= side:
                twin = CONV[self.dims](m.in_channels, m.out_channels, m.kernel_size, groups=m.groups)
                twin.weight = m.weight
                self._add("layer", [i], part=self._part(twin))
                return

    def _reduce(self, i: int) -> None:
        c = self._values[i].shape[1]
        g = self.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        self._add("reduced", [i], g=g, axis=self.rng.choice([1, 1, 2]))

    def _pixels(self, i: int) -> None:
        x = self._values[i]
        if self.dims != 2:
            return
        if x.shape[1] % 4 == 0 and self.rng.random() < 0.6 and x[0, 0].numel() <= 150:
            self._add("layer", [i], part=self._part(nn.PixelShuffle(2)))
        elif x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 and x.shape[1] <= 8:
            self._add("layer", [i], part=self._part(nn.PixelUnshuffle(2)))

    # ------------------------------------------------------------------------------------------------------ steps

    def layer(self, x: Tensor, part: str) -> Tensor:
        return self.parts[part](x)

    def functional(self, x: Tensor, part: str, groups: int | None) -> Tensor:
        conv = self.parts[part]
        groups = groups or x.shape[1]
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.dims]
        return convolve(x, conv.weight, conv.bias, padding=1, groups=groups)

    def act(self, x: Tensor, kind: str) -> Tensor:
        return ACTIVATIONS[kind](x)

    def pair(self, x: Tensor, y: Tensor, kind: str) -> Tensor:
        return PAIRWISE[kind](x, y)

    def cat(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, 1)

    def chunk(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return x.chunk(n, 1)

    def split(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return x.split(x.shape[1] // n, 1)

    def unbound(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return x.unflatten(1, (n, x.shape[1] // n)).unbind(1)

    def shuffle(self, x: Tensor, g: int, slots: int, how: str) -> Tensor:
        b, c, *spatial = x.shape
        if how == "open":
            return x.view(b, g, -1, *spatial).transpose(1, 2).flatten(1, 2)
        if how == "slots":  # the number of groups follows the channels: wrong after surgery, and nothing raises
            return x.view(b, c // slots, slots, *spatial).transpose(1, 2).reshape(b, c, *spatial)
        if how == "slots open":
            return x.view(b, -1, slots, *spatial).transpose(1, 2).flatten(1, 2)
        if how == "written":
            return x.view(b, g, slots, *spatial).transpose(1, 2).flatten(1, 2)
        return x.view(b, g, c // g, *spatial).transpose(1, 2).reshape(b, c, *spatial)

    def gate(self, x: Tensor, down: str, up: str, expand: bool) -> Tensor:
        b, c = x.shape[:2]
        s = x.flatten(2).mean(2)
        s = torch.sigmoid(self.parts[up](F.relu(self.parts[down](s)))).view(b, c, *[1] * self.dims)
        return x * (s.expand_as(x) if expand else s)

    def spatial_gate(self, x: Tensor, part: str, expand: bool) -> Tensor:
        s = torch.sigmoid(self.parts[part](x))
        return x * (s.expand(-1, x.shape[1], *[-1] * self.dims) if expand else s)

    def channels_last(self, x: Tensor, part: str) -> Tensor:
        return self.parts[part](x.movedim(1, -1)).movedim(-1, 1)

    def spatial_pad(self, x: Tensor, mode: str) -> Tensor:
        return F.pad(x, [1, 0] + [0, 1] * (self.dims - 1), mode=mode)

    def spatial_pick(self, x: Tensor, kind: str) -> Tensor:
        if kind == "flip":
            return x.flip(2)
        return x[:, :, 1:] if kind == "cut" else x[..., ::2]

    def centred(self, x: Tensor) -> Tensor:
        return x - x.mean(list(range(2, x.ndim)), keepdim=True)

    def scaled(self, x: Tensor, name: str, kind: str) -> Tensor:
        s = self.scales[name]
        return x * s if kind == "mul" else x + s if kind == "add" else torch.clamp(x, max=s)

    def literal(self, x: Tensor, kind: str, number: int) -> Tensor:
        if kind == "write":
            y = torch.zeros_like(x)
            y[:, :number] = x[:, :number]
            return y
        if kind in ("pad", "fill"):
            return F.pad(x, [0, 0] * self.dims + ([1, number] if kind == "pad" else [0, number - x.shape[1]]))
        return LITERALS[kind](x, number)

    def reduced(self, x: Tensor, g: int, axis: int) -> Tensor:
        b, c, *spatial = x.shape
        return x.view(b, g, c // g, *spatial).mean(axis)

    def forward(self, *inputs: Tensor) -> object:
        values = list(inputs)
        for op, sources, options in self.steps:
            result = getattr(self, op)(*[values[i] for i in sources], **options)
            values.extend(result if isinstance(result, tuple) else [result])
        results = [self._head(values[source], kind, name) for source, kind, name in self.heads]
        if self.packing == "dict":
            return {str(number): x for number, x in enumerate(results)}
        return (results[0], results[1:]) if self.packing == "nested" else tuple(results)

    def _head(self, x: Tensor, kind: str, name: str) -> Tensor:
        if kind == "map":
            return x
        if kind == "conv":
            return self.parts[name](x)
        return self.parts[name](x.flatten(1) if kind == "flatten" else x.flatten(2).mean(2))


@dataclass(frozen=True)
class Finding:
    """What one network showed."""

    groups: int
    removable: int
    removed: int
    channels: int
    error: float  # zeroed against removed
    effect: float  # whole against removed


def random_masks(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """Every group keeps at least one channel, and any number of others."""
    keep = np.zeros(graph.channels, bool)
    for group in graph.groups:
        kept = rng.integers(1, group.channels + 1)
        keep[group.start + rng.choice(group.channels, kept, replace=False)] = True
    return keep


def check(seed: int, size: int = 12, rounds: int = 2) -> Finding:
    """Build the network of `seed`, remove random channels, again from what is left; assert that all is exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PyTorch's word for an attribute that is not true
        return _check(seed, size, rounds)


def _check(seed: int, size: int, rounds: int) -> Finding:
    model: nn.Module = RandomNet(seed, size)
    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in model.shapes)
    rng = np.random.default_rng(seed)
    finding = None
    for _ in range(rounds):
        graph = trace(model, inputs)
        keep = random_masks(graph, rng)
        result = self_check(model, graph, keep)
        assert result.passed, f"{result}; alone: {[g.name for g in culprits(model, graph, keep)]}; {model.steps}"
        small = removed(model, graph, keep)
        assert_attributes_true(small)
        predicted, measured = total_cost(graph, keep), count(small, inputs).total
        assert predicted == measured, f"predicted {predicted}, measured {measured}; {model.steps}"
        channels = sum(graph.shapes[layer.weight][layer.out_axis] for layer in graph.layers)
        effect = max(map(relative_difference, outputs(model, inputs), outputs(small, inputs)))
        gone = int((~keep).sum())
        finding = finding or Finding(
            len(graph.groups), graph.channels, gone, channels, result.max_relative_error, effect
        )
        model = small
    assert finding is not None
    return finding


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others count up from it")
    parser.add_argument("--size", type=int, default=0, help="steps of a network; 0: 1 to 24, by its seed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, failures, findings = time.time(), 0, []
    for seed in range(given.seed, given.seed + given.graphs):
        size = given.size or 1 + seed % 24
        try:
            findings.append(check(seed, size))
        except Exception as error:
            failures += 1
            print(f"FAILED: reproduce with --graphs 1 --seed {seed} --size {size}\n  {error}", flush=True)
            if not isinstance(error, AssertionError) or given.graphs == 1:
                traceback.print_exc()
    share = [f.removable / f.channels for f in findings]
    felt = sum(f.effect > 1e-3 for f in findings)
    print(f"{given.graphs} networks in {time.time() - start:.0f} s, {failures} failed")
    print(f"{sum(f.removed > 0 for f in findings)} lost channels, {felt} of them changed by more than 0.001")
    print(f"{np.mean(share):.2f} of all output channels are removable units on average")
    print(f"largest relative error {max((f.error for f in findings), default=0):.1e}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
