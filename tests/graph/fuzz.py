"""Random convolutional networks, on which zeroed == removed must hold: the generator, the check, and a command.

python tests/graph/fuzz.py --graphs 3000 --seed 0

A network is a list of steps, each some lines of a forward. It is grown while it runs on zeros, so that every step knows
the shapes it gets, and becomes a module by way of its Python source: what fails is printed as it would be written by
hand. A number in a forward is written out, computed from a shape, or taken from an attribute, at random.

Not generated, by design: functions of the number of channels alone (`x / x.shape[1]`), numbers that only a comparison
of values shows (`argmax`), forwards that cannot run in float64.
"""

import argparse
import contextlib
import copy
import inspect
import itertools
import linecache
import math
import random
import re
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checks import WHOLE, Witness, assert_attributes_true, calibrate, outputs, randomise, relative_difference
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from convpare.graph import Graph, culprits, removed, self_check, trace, zeroed
from convpare.graph.check import TOLERANCE, _in_double
from convpare.graph.structure import Form
from convpare.planning.cost import count, layer_cost, total_cost

FORMS: tuple[Form, ...] = WHOLE
MOST_CHANNELS, MOST_POSITIONS = 48, 400

# ------------------------------------------------------------------------ modules as one finds them, with their numbers


class Attention(nn.Module):
    """Self-attention over tokens with its numbers in attributes."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, 0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Shuffle(nn.Module):
    """The groups are an attribute, the channels of a group computed."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = x.view(b, self.groups, c // self.groups, *x.shape[2:])
        return y.transpose(1, 2).contiguous().view(b, -1, *x.shape[2:])


class Partial(nn.Module):
    """Convolves the first channels and passes the others."""

    def __init__(self, conv: nn.Module, dim: int, untouched: int) -> None:
        super().__init__()
        self.conv, self.dim_conv, self.dim_untouched = conv, dim, untouched

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.dim_conv, self.dim_untouched], dim=1)
        return torch.cat((self.conv(a), b), 1)


class FirstPart(nn.Module):
    """The first channels of a wider layer, as a ghost module takes them."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.part]


class PadChannels(nn.Module):
    """Zero channels before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (self.before, self.after))


class BlurPool(nn.Module):
    """A fixed kernel, the same for every channel."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.dims, self.channels = dims, channels
        self.register_buffer("filt", torch.tensor([0.25, 0.5, 0.25]).reshape(1, 1, 3, *[1] * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(x, self.filt.repeat(self.channels, *[1] * (self.dims + 1)), groups=self.channels)


class Standardised(nn.Module):
    """A convolution with mean 0 and variance 1 in every kernel."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        axes = list(range(1, w.ndim))
        w = (w - w.mean(axes, keepdim=True)) / (w.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self.conv._conv_forward(x, w, self.conv.bias)


class StandardisedByNorm(nn.Module):
    """The same by a batch norm over the kernels."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.gain = nn.Parameter(torch.rand(conv.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        flat = w.reshape(1, self.conv.out_channels, -1)
        w = F.batch_norm(flat, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-5).reshape_as(w)
        return self.conv._conv_forward(x, w, self.conv.bias)


class NormFirst(nn.Module):
    """Layer norm over the channels where they stand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-5)
        ones = [1] * (x.ndim - 2)
        return self.weight.view(-1, *ones) * x + self.bias.view(-1, *ones)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.channels = channels
        self.down, self.up = nn.Linear(channels, reduced), nn.Linear(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.up(F.relu(self.down(x.flatten(2).mean(2)))))
        return x * s.view(-1, self.channels, *[1] * (x.ndim - 2))


class Recalibrated(nn.Module):
    """Global response normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(channels, 1)), nn.Parameter(torch.randn(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        g = y.norm(p=2, dim=2, keepdim=True)
        y = self.gamma * (y * (g / (g.mean(1, keepdim=True) + 1e-6))) + self.beta + y
        return y.view_as(x)


def tied(conv: nn.Module, other: nn.Module) -> nn.Module:
    """`conv` with the kernel of `other`."""
    conv.weight = other.weight
    return conv


LIBRARY = [
    Attention, Shuffle, Partial, FirstPart, PadChannels, BlurPool, Standardised, StandardisedByNorm, NormFirst, Gate,
    Recalibrated, tied,
]  # fmt: skip
NAMES: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, **{thing.__name__: thing for thing in LIBRARY}}

# ------------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Step:
    """Some lines of a forward, and the modules, parameters and numbers that they take from `self`."""

    kind: str
    sources: tuple[str, ...]
    results: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the results
    lines: tuple[str, ...]
    parts: tuple[tuple[str, str], ...] = ()  # attribute → expression
    code: str = ""  # of a class of its own
    head: bool = False  # its results are the network's
    inner: "Step | None" = None  # the same without the class

    def renamed(self, old: str, new: str) -> "Step":
        sources = tuple(dict.fromkeys(new if s == old else s for s in self.sources))
        lines = tuple(re.sub(rf"\b{old}\b", new, line) for line in self.lines)
        return replace(self, sources=sources, lines=lines, inner=self.inner and self.inner.renamed(old, new))


def assignment(name: str, expression: str) -> str:
    return f'self.register_buffer("{name}", {expression})' if name[0] == "b" else f"self.{name} = {expression}"


def class_source(
    name: str, parts: Sequence[tuple[str, str]], arguments: Sequence[str], lines: Sequence[str], result: str
) -> str:
    built = [f"        {assignment(part, expression)}\n" for part, expression in parts]
    head = f"class {name}(nn.Module):\n"
    if built:
        head += f"    def __init__(self):\n        super().__init__()\n{''.join(built)}\n"
    body = "".join(f"        {line}\n" for line in lines)
    return f"{head}    def forward(self, {', '.join(arguments)}):\n{body}        return {result}\n"


@dataclass(frozen=True)
class Plan:
    """A network: from its source it is built, run and made smaller."""

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    packing: str = "bare"

    def source(self) -> str:
        heads = [name for step in self.steps if step.head for name in step.results]
        packed = {
            "bare": ", ".join(heads), "dict": "{" + ", ".join(f'"{name}": {name}' for name in heads) + "}",
            "nested": f"{heads[0]}, [{', '.join(heads[1:])}]",
        }[self.packing]  # fmt: skip
        inputs = [f"x{n}" for n in range(len(self.shapes))]
        parts = [part for step in self.steps for part in step.parts]
        lines = [line for step in self.steps for line in step.lines]
        codes = [step.code for step in self.steps if step.code]
        return "\n\n".join([*codes, class_source("Net", parts, inputs, lines, packed)])

    def build(self) -> nn.Module:
        """The same network, weight by weight, every time."""
        source = self.source()
        name = f"<net {zlib.crc32(source.encode())}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        names = dict(NAMES, __name__="net")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            exec(compile(source, name, "exec"), names)
            net = names["Net"]()
            return calibrate(randomise(net, self.seed), self.shapes)

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(s, generator=torch.Generator().manual_seed(self.seed)) for s in self.shapes)

    def standalone(self, docstring: str) -> str:
        """A file that needs nothing of this one."""
        source = self.source()
        used = [thing for thing in LIBRARY if re.search(rf"\b{thing.__name__}\(", source)]
        return "\n\n".join(
            [
                f'"""{docstring}"""\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n',
                *[inspect.getsource(thing) for thing in used],
                source,
                MAIN.format(seed=self.seed, shapes=list(self.shapes)),
            ]
        )


MAIN = """SHAPES = {shapes}

if __name__ == "__main__":
    import fuzz  # run it with PYTHONPATH=tests/graph

    fuzz.explain(Net, SHAPES, seed={seed})
"""


class UnfitError(Exception):
    """A step would make more than a fast check can bear."""


class Grower:
    """Grows a plan: makers (below) ask it for values, parts and numbers, and give it steps."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng, self.seed = random.Random(seed), seed
        self.dims = self.pick([1, 2, 2, 2, 3])
        side = {1: 12, 2: 8, 3: 4}[self.dims]
        self.inputs = [(2, self.pick([1, 2, 3]), *[side] * self.dims) for _ in range(self.pick([1, 1, 1, 1, 2, 3]))]
        self.net, self.steps, self.serial = nn.Module(), list[Step](), itertools.count()
        self.names = dict(NAMES, self=self.net)
        self.pool = [f"x{n}" for n in range(len(self.inputs))]
        self.kind, self._parts = "", list[tuple[str, str]]()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self.names.update({x: torch.zeros(shape) for x, shape in zip(self.pool, self.inputs, strict=True)})
            self._grow(size)

    def plan(self) -> Plan:
        return Plan(self.seed, tuple(self.inputs), tuple(self.steps), self.pick(["bare", "dict", "nested"]))

    def _grow(self, size: int) -> None:
        self.kind = "stem"
        for x in list(self.pool):
            stem = f"nn.Conv{self.dims}d({self.channels(x)}, {self.pick([4, 6, 8, 12])}, 3, padding=1)"
            self.emit([x], f"{self.part(stem)}({x})")
        makers, weights = zip(*MAKERS, strict=True)
        while len(self.steps) < size + len(self.inputs):
            self.run(self.rng.choices(makers, weights)[0])
        used = {source for step in self.steps for source in step.sources}
        unused = [v for v in self.pool[len(self.inputs) :] if v not in used]
        if self.chance(0.2):
            unused = unused[-1:]  # the others run for nothing
        unused = unused if len(unused) < 5 else [*self.rng.sample(unused[:-1], 3), unused[-1]]
        for x in [*unused, *([self.any()] if self.chance(0.3) else [])]:
            self.kind = "head"
            head(self, x)

    def run(self, maker: Callable[["Grower", str], object], x: str | None = None) -> None:
        self.kind, self._parts = maker.__name__, []
        with contextlib.suppress(UnfitError):
            maker(self, x or self.any())

    # ---------------------------------------------------------------------------------------------------------- choices

    def pick(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def any(self) -> str:
        """Mostly late values, so that networks get deep, and seldom an input."""
        last = len(self.pool) - 1
        first = len(self.inputs) if self.chance(0.97) else 0
        first = min(first, last)
        return self.pool[max(self.rng.randint(first, last), self.rng.randint(first, last))]

    def divisor(self, number: int, options: Sequence[int] = (1, 2, 3, 4, 6)) -> int:
        return self.pick([g for g in options if number % g == 0] or [1])

    # ----------------------------------------------------------------------------------------------------------- values

    def shape(self, x: str) -> tuple[int, ...]:
        return tuple(self.names[x].shape)

    def channels(self, x: str) -> int:
        return self.shape(x)[1]

    def space(self, x: str) -> tuple[int, ...]:
        return self.shape(x)[2:]

    def positions(self, x: str) -> int:
        return math.prod(self.space(x))

    def others(self, x: str, fits: Callable[[tuple[int, ...], tuple[int, ...]], bool]) -> list[str]:
        return [y for y in self.pool if y != x and fits(self.shape(x), self.shape(y))]

    # ------------------------------------------------------------------------------------------------------ expressions

    def part(self, expression: str, prefix: str = "p") -> str:
        """A module, parameter or number, as the forward calls it."""
        name = f"{prefix}{next(self.serial)}"
        self._parts.append((name, expression))
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        return self.part(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * 0.5)", "w")

    def buffer(self, *shape: int) -> str:
        return self.part(f"torch.randn({', '.join(map(str, shape))})", "b")

    def number(self, value: int | list[int], *computed: str) -> str:
        """Written out, taken from an attribute, or computed in one of the ways given."""
        if computed and self.chance(0.5):
            return self.pick(computed)
        return str(value) if self.chance(0.5) else self.part(str(value), "n")

    def spatial(self, x: str) -> str:
        """The sizes of the spatial axes."""
        if self.chance(0.7):
            return f"*{x}.shape[2:]"
        return ", ".join(map(str, self.space(x)))

    def ones(self) -> str:
        return ", ".join(["1"] * self.dims)

    def colons(self) -> str:
        return ", :" * self.dims

    def conv(self, x: str, c_out: int | None = None, plain: bool = False) -> str:
        """A convolution of `x`; a plain one keeps the sizes."""
        c_in, side = self.channels(x), min(self.space(x))
        if plain:
            return self.part(f"nn.Conv{self.dims}d({c_in}, {c_out or c_in}, 3, padding=1)")
        groups = self.divisor(c_in, (1, 1, 1, 1, 2, 3, 4))
        c_out = c_out or groups * self.pick([1, 2, 3, 4, 4, 6, 8])
        groups = groups if c_out % groups == 0 else 1
        kernel = self.pick([k for k in (1, 2, 3) if k <= side])
        options = {"groups": groups} if groups > 1 else {}
        if self.chance(0.4):
            options["bias"] = False
        if kernel == 3 and self.chance(0.6):
            options.update(padding=1, padding_mode=repr(self.pick(["zeros", "zeros", "reflect", "circular"])))
            if self.chance(0.3):
                options.update(padding="'same'", padding_mode="'zeros'", dilation=self.pick([1, 2]))
            elif side > 3:
                options["stride"] = self.pick([1, 2])
        rest = "".join(f", {key}={value}" for key, value in options.items())
        return self.part(f"nn.Conv{self.dims}d({c_in}, {c_out}, {kernel}{rest})")

    def linear(self, c_in: int, c_out: int) -> str:
        return self.part(f"nn.Linear({c_in}, {c_out}{self.pick(['', '', ', bias=False'])})")

    def back(self, tokens: str, x: str, c: int) -> str:
        """(B, N, c) tokens as an image of the size of `x`."""
        ways = [
            f"{tokens}.transpose(1, 2).unflatten(2, {x}.shape[2:])",
            f"{tokens}.transpose(1, 2).reshape({x}.shape[0], -1, {self.spatial(x)})",
            f"{tokens}.unflatten(1, {x}.shape[2:]).movedim(-1, 1)",
            f"{tokens}.mT.reshape({x}.shape[0], {self.number(c)}, {self.spatial(x)})",
        ]
        if c == self.channels(x):
            ways.append(f"{tokens}.transpose(1, 2).reshape({x}.shape)")
        return self.pick(ways)

    # ------------------------------------------------------------------------------------------------------------ steps

    def emit(
        self, sources: Sequence[str], *body: str, results: int = 1, wrap: bool = True, head: bool = False
    ) -> list[str]:
        """Append a step: lines, the last of them an expression (of several results); run it, and name its results."""
        sources = tuple(dict.fromkeys(sources))
        made = tuple(f"v{next(self.serial)}" for _ in range(results))
        parts = tuple((name, e) for name, e in self._parts if any(f"self.{name}" in line for line in body))
        self._parts = []
        results_are = f"{', '.join(made)} = "
        step = Step(self.kind, sources, made, (), (*body[:-1], results_are + body[-1]), parts, head=head)
        if wrap and not head and self.chance(0.3):
            name = f"S{next(self.serial)}"
            code = class_source(name, parts, sources, body[:-1], body[-1])
            call = f"{results_are}self.{name.lower()}({', '.join(sources)})"
            step = replace(step, lines=(call,), parts=((name.lower(), f"{name}()"),), code=code, inner=step)
        exec(step.code, self.names)
        for name, expression in step.parts:
            setattr(self.net, name, eval(expression, self.names))
        self.net.eval()
        exec("\n".join(step.lines), self.names)
        shapes = tuple(self.shape(name) for name in made)
        if not head and any(
            len(s) != self.dims + 2 or s[1] > MOST_CHANNELS or not 0 < math.prod(s[2:]) <= MOST_POSITIONS
            for s in shapes
        ):
            raise UnfitError(f"{self.kind}: {shapes}")
        self.steps.append(replace(step, shapes=shapes, inner=step.inner and replace(step.inner, shapes=shapes)))
        if not head:
            self.pool += made
        return list(made)


Maker = Callable[[Grower, str], object]
MAKERS: list[tuple[Maker, int]] = []


def maker(weight: int) -> Callable[[Maker], Maker]:
    def register(function: Maker) -> Maker:
        MAKERS.append((function, weight))
        return function

    return register


def head(g: Grower, x: str) -> None:
    kind = g.pick([*["flatten", "pool", "conv", "matrix"] * 4, "map"])
    c = g.channels(x)
    if kind == "conv":
        call = f"{g.part(f'nn.Conv{g.dims}d({c}, 2, 1)')}({x})"
    elif kind == "flatten":
        call = f"{g.linear(c * g.positions(x), 3)}({x}.flatten(1))"
    elif kind == "pool":
        call = f"{g.linear(c, 3)}({x}.flatten(2).mean(2))"
    elif kind == "matrix":
        call = f"torch.einsum('bcn,kc->bkn', {x}.flatten(2), {g.parameter(3, c)})"
    else:
        call = f"{x} + 1.0"
    g.emit([x], call, head=True)


# ----------------------------------------------------------------------------------------------------- layers and norms


@maker(7)
def convolution(g: Grower, x: str) -> None:
    g.emit([x], f"{g.conv(x)}({x})")


@maker(2)
def depthwise(g: Grower, x: str) -> None:
    c, d = g.channels(x), g.dims
    times = g.pick([1, 1, 2, 3])
    if g.chance(0.5):
        g.emit([x], f"{g.part(f'nn.Conv{d}d({c}, {c * times}, 3, groups={c}, padding=1)')}({x})")
        return
    kernel, bias = g.parameter(c * times, 1, *[3] * d), g.pick(["None", g.parameter(c * times)])
    g.emit([x], f"F.conv{d}d({x}, {kernel}, {bias}, padding=1, groups={g.number(c, f'{x}.shape[1]')})")


@maker(2)
def transposed(g: Grower, x: str) -> None:
    c = g.channels(x)
    groups = g.pick([n for n in (1, 1, 2, 4, c) if c % n == 0])
    c_out, stride, kernel = groups * g.pick([1, 1, 2, 3]), g.pick([1, 2]), g.pick([1, 2, 3])
    extra = ", output_padding=1" if stride == 2 and g.chance(0.3) else ""
    conv = f"nn.ConvTranspose{g.dims}d({c}, {c_out}, {kernel}, stride={stride}, groups={groups}{extra})"
    g.emit([x], f"{g.part(conv)}({x})")


@maker(2)
def functional(g: Grower, x: str) -> None:
    """A kernel that no module owns."""
    c, d = g.channels(x), g.dims
    groups = g.divisor(c, (1, 1, 2, 3))
    c_out = groups * g.pick([1, 2, 4])
    if g.chance(0.7):
        kernel = g.parameter(c_out, c // groups, *[3] * d)
        kernel = g.pick([kernel, f"({kernel} + {kernel}.flip(2))", f"{kernel}.abs()", f"({kernel} * 0.5)"])
        g.emit([x], f"F.conv{d}d({x}, {kernel}, None, padding=1, groups={groups})")
    else:
        kernel = g.parameter(c, c_out // groups, *[2] * d)
        g.emit([x], f"F.conv_transpose{d}d({x}, {kernel}, {g.parameter(c_out)}, groups={groups})")


@maker(5)
def norm(g: Grower, x: str) -> None:
    c, d, affine = g.channels(x), g.dims, g.chance(0.7)
    kinds = [f"nn.BatchNorm{d}d({c}, affine={affine})"] * 2 + [f"nn.PReLU({c})", "nn.PReLU()"]
    if g.positions(x) > 3:
        kinds.append(f"nn.InstanceNorm{d}d({c}, affine={affine}, track_running_stats={g.chance(0.3)})")
        kinds.append(f"nn.BatchNorm{d}d({c}, affine={affine}, track_running_stats=False)")
        groups = g.divisor(c, (2, 3, 4, 6, c))
        kinds += [f"nn.GroupNorm({groups}, {c}, affine={affine})"] * (2 * (groups > 1))
    g.emit([x], f"{g.part(g.pick(kinds))}({x})")


@maker(1)
def group_norm(g: Grower, x: str) -> None:
    """With its numbers in the forward."""
    c = g.channels(x)
    groups = g.divisor(c)
    if g.positions(x) < 4:
        return
    if g.chance(0.5):
        weight, bias = g.parameter(c), g.parameter(c)
        g.emit([x], f"F.group_norm({x}, {g.number(groups)}, {weight}, {bias})")
    else:
        g.emit(
            [x],
            f"y = {x}.reshape({x}.shape[0], {g.number(groups)}, -1)",
            f"F.instance_norm(y).view({g.pick([f'{x}.shape', f'{x}.shape[0], {c}, {g.spatial(x)}'])})",
        )


@maker(1)
def over_channels(g: Grower, x: str) -> None:
    """Norms that average over channels."""
    c = g.channels(x)
    weight = f"{g.parameter(c)}, {g.parameter(c)}" if g.chance(0.5) else "None, None"
    calls = [
        f"{g.part(f'nn.LayerNorm({c})')}({x}.movedim(1, -1)).movedim(-1, 1)",
        f"F.layer_norm({x}.movedim(1, -1), ({g.number(c, f'{x}.shape[1]')},), {weight}).movedim(-1, 1)",
        f"{g.part(f'NormFirst({c})')}({x})", f"{g.part(f'Recalibrated({c})')}({x})",
        f"{g.part(f'nn.GroupNorm(1, {c})')}({x})", f"{g.part(f'nn.RMSNorm({c})')}({x}.movedim(1, -1)).movedim(-1, 1)",
        f"F.layer_norm({x}, {x}.shape[1:])", f"{x}.softmax(1)", f"{x}.log_softmax(1)",
        f"{x} / ({x}.pow(2).mean(1, keepdim=True) + 0.5).sqrt()",
    ]  # fmt: skip
    g.emit([x], g.pick(calls))


@maker(1)
def unit_length(g: Grower, x: str) -> None:
    """Sums over channels, which zeroed ones leave alone."""
    calls = [
        f"{x} / (1.0 + {x}.norm(dim=1, keepdim=True))", f"F.normalize({x} + 0.25 * {x}, dim=1, eps=0.5)",
        f"{x} * torch.rsqrt({x}.square().sum(1, keepdim=True) + 0.5)",
        f"{x} * torch.sigmoid({x}).sum(1, keepdim=True)", f"{x} / (1.0 + torch.exp(-{x}.abs()).sum(1, keepdim=True))",
    ]  # fmt: skip
    g.emit([x], g.pick(calls))


@maker(2)
def computed_kernel(g: Grower, x: str) -> None:
    g.conv(x)
    ((_, expression),) = g._parts
    if math.prod(eval(expression, g.names).weight.shape[1:]) < 2:
        raise UnfitError("one number has no variance")
    kind = g.pick(["Standardised", "StandardisedByNorm", "weight", "weight", "spectral"])
    if kind == "weight":
        dim = "" if g.chance(0.8) else ", dim=None" if g.chance(0.3) else ", dim=1"
        expression = f"nn.utils.parametrizations.weight_norm({expression}{dim})"
    elif kind == "spectral":
        expression = f"nn.utils.parametrizations.spectral_norm({expression})"
    else:
        expression = f"{kind}({expression})"
    g.emit([x], f"{g.part(expression)}({x})")


# --------------------------------------------------------------------------------------------------- element by element

ACTIVATIONS = [
    "F.relu({})", "torch.sigmoid({})", "F.silu({})", "torch.tanh({})", "F.gelu({})", "F.elu({})", "F.leaky_relu({})",
    "torch.cos({})", "F.hardswish({})", "F.softplus({})", "F.relu6({})", "{}.abs()", "{}.clamp(-1.0, 0.5)",
    "{}.clamp(min=0.25)", "1.0 - {}", "{} * 0.5", "F.hardtanh({}, 0.25, 1.0)", "F.dropout({}, 0.5, False)",
    "{}.square()", "{}.masked_fill({} < 0, 0.0)", "F.softsign({})", "F.mish({})", "2.0 ** {}.tanh()", "{}.contiguous()",
    "torch.where({} > 0, {}, 0.5 * {})", "F.logsigmoid({})", "F.selu({})", "torch.exp(-{}.square())", "F.celu({})",
    "{} / (1.0 + {}.abs())", "F.threshold({}.relu(), 0.0, 0.0)", "{}.relu().sqrt() * {}.relu().sqrt()",
]  # fmt: skip
PAIRWISE = [
    "{} + {}", "{} + {}", "{} + {}", "{} - {}", "{} * {}", "torch.maximum({}, {})", "torch.minimum({}, {})",
    "{}.clone().add_({})", "torch.lerp({}, {}, 0.25)", "torch.stack([{}, {}], 1).amax(1)", "torch.cat([{}, {}], 2)",
    "torch.stack([{}, {}], 2).flatten(1, 2)", "torch.where({} > 0, {}, 0.0)", "torch.add({}, {}, alpha=0.5)",
    "torch.stack([{}, {}], 2).mean(2)", "torch.addcmul({}, {}, {})", "torch.fmax({}, {})",
    "torch.stack([{}, {}]).softmax(0).sum(0)", "torch.cat([{}, {}], 0).chunk(2, 0)[1]",
]  # fmt: skip


@maker(5)
def activation(g: Grower, x: str) -> None:
    g.emit([x], g.pick(ACTIVATIONS).replace("{}", x))


@maker(1)
def in_place(g: Grower, x: str) -> None:
    change = g.pick(["sigmoid_()", "relu_()", "mul_(0.5)", "add_(0.25)", "tanh_()", "clamp_(min=0.25)"])
    where = g.pick(["", "", "[:, :, 1:]" if g.space(x)[0] > 1 else ""])
    g.emit([x], f"y = {x}.clone()", f"y{where}.{change}", "y")


@maker(7)
def pair(g: Grower, x: str) -> None:
    others = g.others(x, lambda a, b: a == b)
    fresh = not others or g.chance(0.3)
    y = g.emit([x], f"{g.conv(x, plain=True)}({x})")[0] if fresh else g.pick(others)
    g.emit([x, y], g.pick(PAIRWISE).format(x, y, x))


@maker(2)
def broadcast(g: Grower, x: str) -> None:
    others = g.others(x, lambda a, b: a != b and all(m in (n, 1) for n, m in zip(a, b, strict=True)))
    if others:
        y = g.pick(others)
        calls = [f"{x} + {y}", f"{x} * {y}", f"{x} * torch.sigmoid({y})", f"torch.maximum({x}, {y})"]
        g.emit([x, y], g.pick([*calls, f"{x} + {y}.expand_as({x})", f"{y} - {x}"]))


@maker(2)
def scale(g: Grower, x: str) -> None:
    c = g.channels(x)
    shape = [c, *[1] * g.dims]
    calls = ["{} * {w}", "{} + {w}", "torch.clamp({}, max={w})", "{} + {w} * {}.tanh()", "{} * {w}.sigmoid()"]
    call = g.pick(calls).replace("{}", x)
    w = g.parameter(*g.pick([shape, [1, *shape]]))
    if g.chance(0.2):
        w = f"{g.parameter(c)}.view(-1, {g.ones()})"
    elif g.chance(0.2):
        w = f"{g.parameter(c, *g.space(x))}"
    elif g.chance(0.2):
        w = g.buffer(*shape)
    g.emit([x], call.replace("{w}", w))


@maker(1)
def per_channel_last(g: Grower, x: str) -> None:
    """A layer scale where the channels are last."""
    w = g.parameter(g.channels(x))
    g.emit([x], f"({x}.movedim(1, -1) * {w}).movedim(-1, 1)")


# ---------------------------------------------------------------------------------------- joining, splitting, shuffling


@maker(4)
def cat(g: Grower, x: str) -> None:
    fitting = [y for y in g.pool if g.space(y) == g.space(x)]
    chosen = [x, *g.rng.choices(fitting, k=g.pick([1, 1, 2]))]
    g.emit(chosen, f"torch.cat([{', '.join(chosen)}], 1)")


@maker(1)
def made_channels(g: Grower, x: str) -> None:
    """Channels that the forward makes: zeros, ones, coordinates."""
    n = g.pick([1, 2, 3])
    made = g.pick([
        f"{x}.new_zeros({x}.shape[0], {n}, {g.spatial(x)})", f"torch.zeros({x}.shape[0], {n}, {g.spatial(x)})",
        f"torch.ones_like({x})", f"torch.zeros({x}.shape[0], {x}.shape[1] // 2, *{x}.shape[2:])",
        f"{x}.new_ones(1, 1, *{x}.shape[2:]).expand({x}.shape[0], -1, {', '.join(['-1'] * g.dims)})",
        f"torch.full_like({x}[:, :{n}], 0.5)",
    ])  # fmt: skip
    g.emit([x], f"z = {made}", g.pick([f"torch.cat([{x}, z], 1)", f"torch.cat([z, {x}], 1)"]))


@maker(5)
def parts(g: Grower, x: str) -> None:
    """Cut into parts, one is changed, and joined again."""
    c = g.channels(x)
    n = g.divisor(c, (2, 3, 4))
    if n == 1:
        return
    size, how = c // n, g.pick(["chunk", "split", "sizes", "unbind", "slices", "narrow", "tensor_split"])
    sizes, rest = [size] * n, c
    if how in ("sizes", "slices", "narrow") and g.chance(0.5):
        sizes = []
        for _ in range(n - 1):
            sizes.append(g.rng.randint(1, max(1, rest - (n - 1 - len(sizes)) - 1)))
            rest -= sizes[-1]
        sizes.append(rest)
    if min(sizes) < 1:
        return
    starts = [sum(sizes[:k]) for k in range(n)]
    calls = {
        "chunk": f"{x}.chunk({g.number(n)}, 1)",
        "split": f"{x}.split({g.number(size, f'{x}.shape[1] // {n}')}, dim=1)",
        "sizes": f"{x}.split({g.number(sizes)}, 1)",
        "unbind": f"{x}.unflatten(1, ({n}, {g.number(size, '-1')})).unbind(1)",
        "slices": ", ".join(_slice(g, x, start, start + size, c) for start, size in zip(starts, sizes, strict=True)),
        "narrow": ", ".join(
            f"{x}.narrow(1, {a}, {g.number(s)})" if a == 0 else f"{x}.narrow(1, {g.number(a)}, {g.number(s)})"
            for a, s in zip(starts, sizes, strict=True)
        ),
        "tensor_split": f"{x}.tensor_split({n}, 1)",
    }
    if n == 2 and how == "slices" and g.chance(0.3):
        calls[how] = f"{x}[:, ::2], {x}[:, 1::2]"
    made = g.emit([x], calls[how], results=n)
    g.rng.shuffle(made)
    _join(g, made)


def _slice(g: Grower, x: str, start: int, stop: int, c: int) -> str:
    first = "" if start == 0 else g.pick([g.number(start), g.number(start), str(start - c)])
    last = "" if stop == c else g.pick([g.number(stop), str(stop - c)])
    return f"{x}[:, {first}:{last}]"


def _join(g: Grower, made: list[str]) -> None:
    g.kind = "joined"
    first = g.emit([made[0]], g.pick([f"torch.tanh({made[0]})", f"{g.conv(made[0], plain=True)}({made[0]})"]))[0]
    same = [y for y in made[1:] if g.shape(y) == g.shape(first)]
    how = g.pick(["cat", "cat", "pair", "few"])
    if how == "pair" and same:
        g.emit([first, same[0]], g.pick(PAIRWISE).format(first, same[0], first))
    else:
        chosen = [first, *made[1:]] if how == "cat" else [first, made[-1]]
        g.emit(chosen, f"torch.cat([{', '.join(chosen)}], 1)")


@maker(3)
def literal(g: Grower, x: str) -> None:
    """A few channels only, or a few more."""
    c = g.channels(x)
    k = g.rng.randint(1, max(1, c - 1))
    many = "(" + "0, 0, " * g.dims
    calls = [
        f"F.pad({x}, {many}{g.number(1)}, {g.number(k)}))", f"F.pad({x}, {many}0, {c + k} - {x}.shape[1]))",
        f"{g.part(f'PadChannels({k}, {k})')}({x})",
    ]  # fmt: skip
    if c > 2:
        calls += [
            _slice(g, x, 0, k, c), _slice(g, x, k, c, c), f"{x}[:, {1}:{-1}]", f"{x}[:, ::2]", f"{x}[:, 1::2]",
            f"{g.part(f'FirstPart({k})')}({x})", f"{x}.roll({k}, 1)", f"{x}.flip(1)",
            f"F.pad({x}, {many}-1, 0))", f"F.pad({x}, {many}0, -{k}))", f"F.pad({x}, {many}-1, 1))",
            f"{x}[:, {k}:{k + 1}]", f"{x}.select(1, {k}).unsqueeze(1)", f"{x}[:, -1:]", f"{x}[:, -1].unsqueeze(1)",
            f"torch.cat([{x}[:, {k}:], {x}[:, :{k}]], 1)", f"{x}[:, :{x}.shape[1] // 2]", f"{x}[:, {x}.shape[1] // 2:]",
            f"{x}[:, [0, {k}]]", f"{x}.index_select(1, torch.tensor([{k}, 0]))", f"{x}[:, {k}, None]", f"{x}[:, :-{k}]",
        ]  # fmt: skip
    call = g.pick(calls)
    g.emit([x], call)


@maker(3)
def write(g: Grower, x: str) -> None:
    """Write into some of the channels, or into some of the positions."""
    c = g.channels(x)
    if c < 3:
        return
    k = g.rng.randint(1, c - 1)
    part = g.pick([_slice(g, "y", 0, k, c), _slice(g, "y", k, c, c)])
    own = part.replace("y[", f"{x}[")
    line = g.pick([
        f"{part} = {own}.tanh()", f"{part} = torch.sigmoid({own})", f"{part} += {own}.tanh()", f"{part} *= 0.5",
        f"{part} = 0.0", f"{part} = 0.5", f"{part}.copy_({own}.relu())", f"{part}.sigmoid_()",
        f"{part}[:, :, 1:] = {own}[:, :, :-1]", f"y[:, :, 1:] += {x}[:, :, :-1]", f"y[:, ::2] += {x}[:, 1:2]",
        f"y[:, :, :1] = torch.sigmoid({x}[:, :, :1])", f"y[:, {k}] = {x}[:, 0].tanh()",
    ])  # fmt: skip
    start = g.pick([f"{x}.clone()", f"torch.zeros_like({x})", f"{x} * 1.0", f"torch.ones_like({x})", f"{x}.relu()"])
    if "shape" not in line and ":, 1:]" in line and g.space(x)[0] < 2:
        return
    g.emit([x], f"y = {start}", line, "y")


@maker(1)
def write_other(g: Grower, x: str) -> None:
    """Another value, written into the first channels of a tensor made for it."""
    others = g.others(x, lambda a, b: a[2:] == b[2:])
    if not others:
        return
    z = g.pick(others)
    a, b = g.channels(x), g.channels(z)
    first = g.number(a, f"{x}.shape[1]")
    total = g.number(a + b, f"{x}.shape[1] + {z}.shape[1]")
    g.emit(
        [x, z], f"y = {x}.new_zeros({x}.shape[0], {total}, *{x}.shape[2:])", f"y[:, :{first}] = {x}",
        f"y[:, {first}:] = {z}", "y",
    )  # fmt: skip


@maker(3)
def shuffle(g: Grower, x: str) -> None:
    c = g.channels(x)
    n = g.divisor(c, (1, 2, 2, 3, 4))
    slots = c // n
    groups, width = g.number(n), g.number(slots, f"c // {n}")
    how = g.pick(["view", "view", "open", "slots", "module", "class", "permute", "stack", "einops"])
    body = {
        "view": [f"y = {x}.view(b, {groups}, {width}, *{x}.shape[2:]).transpose(1, 2)"],
        "open": [f"y = {x}.view(b, {groups}, -1, *{x}.shape[2:]).transpose(1, 2)"],
        "slots": [f"y = {x}.view(b, {g.pick([f'c // {slots}', '-1'])}, {slots}, *{x}.shape[2:]).transpose(1, 2)"],
        "permute": [f"y = {x}.unflatten(1, ({groups}, -1)).movedim(1, 2).contiguous()"],
        "stack": [f"y = torch.stack({x}.chunk({n}, 1), 2)"],
        "einops": [f"y = {x}.reshape(b, {n}, c // {n}, -1).permute(0, 2, 1, 3)"],
    }
    if how not in body or n == 1:
        g._parts = []
        module = f"nn.ChannelShuffle({n})" if how == "module" and g.dims < 3 else f"Shuffle({n})"
        g.emit([x], f"{g.part(module)}({x})")
        return
    back = [f"y.reshape(b, c, {g.spatial(x)})", f"y.reshape({x}.shape)", f"y.reshape(b, {c}, {g.spatial(x)})"]
    if how != "einops":
        back.append("y.flatten(1, 2)")
    lines = [f"b, c = {x}.shape[:2]", *body[how], g.pick(back)]
    g.emit([x], *lines)


@maker(2)
def reduced(g: Grower, x: str) -> None:
    """Over groups, over the channels of a group, over all."""
    c = g.channels(x)
    n = g.divisor(c, (1, 2, 3, 4))
    view = f"{x}.view({x}.shape[0], {g.number(n)}, {g.number(c // n, f'{x}.shape[1] // {n}')}, {g.spatial(x)})"
    kind = g.pick(["sum", "mean", "amax", "sum", "std"])
    axis = g.pick([1, 1, 2])
    if kind == "std" and (n, c // n)[axis - 1] < 3:
        return
    if g.chance(0.2):
        g._parts = []
        g.emit([x], g.pick([f"{x}.sum(1, keepdim=True)", f"{x}.mean(1, keepdim=True)", f"{x}.amax(1, keepdim=True)"]))
    else:
        g.emit([x], f"{view}.{kind}({axis})")


@maker(2)
def repeated(g: Grower, x: str) -> None:
    n, ones = g.pick([2, 3]), ", ".join(["1"] * g.dims)
    calls = [
        f"{x}.repeat_interleave({n}, 1)", f"{x}.repeat(1, {n}, {ones})", f"torch.cat([{x}] * {n}, 1)",
        f"{x}.unsqueeze(2).expand(-1, -1, {n}{', -1' * g.dims}).flatten(1, 2)",
        f"{x}[:, None].expand(-1, {g.number(n)}{', -1' * (g.dims + 1)}).reshape({x}.shape[0], -1, {g.spatial(x)})",
        f"torch.stack([{x}, {x}.tanh()], 1).flatten(1, 2)", f"{x}.tile(1, {n}, {ones})",
        f"torch.repeat_interleave({x}, repeats={n}, dim=1)",
    ]  # fmt: skip
    call = g.pick(calls)
    g.emit([x], call)


@maker(1)
def glu(g: Grower, x: str) -> None:
    if g.channels(x) % 2 == 0:
        calls = [[f"F.glu({x}, 1)"], [f"a, b = {x}.chunk(2, 1)", "a * torch.sigmoid(b)"]]
        g.emit([x], *g.pick(calls))


@maker(2)
def partial(g: Grower, x: str) -> None:
    c = g.channels(x)
    if c > 2:
        k = g.rng.randint(1, c - 1)
        g.emit([x], f"{g.part(f'Partial(nn.Conv{g.dims}d({k}, {k}, 3, padding=1), {k}, {c - k})')}({x})")


@maker(1)
def shifted(g: Grower, x: str) -> None:
    """Groups of channels, each rolled another way."""
    c = g.channels(x)
    if c < 4 or g.space(x)[0] < 3:
        return
    k = g.number(c // 4, f"{x}.shape[1] // 4")
    if g.chance(0.5):
        g.emit([x], f"a, b = {x}[:, :{k}], {x}[:, {k}:]", "torch.cat([a.roll(1, 2), b.roll(-1, -1)], 1)")
    else:
        g.emit(
            [x], f"y, k = torch.zeros_like({x}), {k}", f"y[:, :k, :-1] = {x}[:, :k, 1:]",
            f"y[:, k:2 * k, 1:] = {x}[:, k:2 * k, :-1]", f"y[:, 2 * k:] = {x}[:, 2 * k:]", "y",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- gates


@maker(3)
def gate(g: Grower, x: str) -> None:
    c, d = g.channels(x), g.dims
    r = g.pick([1, 2, 3])
    if g.chance(0.3):
        g.emit([x], f"{g.part(f'Gate({c}, {r})')}({x})")
        return
    mean = f"{x}.mean({list(range(2, d + 2))}, keepdim=True)"
    if g.chance(0.5):
        down, up = g.part(f"nn.Conv{d}d({c}, {r}, 1)"), g.part(f"nn.Conv{d}d({r}, {c}, 1)")
        line = f"s = torch.sigmoid({up}(F.relu({down}({g.pick([mean, f'F.adaptive_avg_pool{d}d({x}, 1)'])}))))"
    else:
        down, up = g.linear(c, r), g.linear(r, c)
        shape = f"{x}.shape[0], {g.number(c, '-1', f'{x}.shape[1]')}, {g.ones()}"
        line = f"s = torch.sigmoid({up}(F.relu({down}({x}.flatten(2).mean(2))))).view({shape})"
    g.emit([x], line, f"{x} * {g.pick(['s', 's', f's.expand_as({x})', f's.expand({x}.shape)'])}")


@maker(3)
def other_gates(g: Grower, x: str) -> None:
    """Over positions, over channels, over branches, over neighbours."""
    c, d = g.channels(x), g.dims
    n = g.pick([1, 2, 3])
    mean = f"{x}.flatten(2).mean(2)"
    kind = g.pick(["spatial", "spatial expand", "cbam", "sum", "mean", "eca", "branches", "pool", "centred", "context"])
    if kind.startswith("spatial"):
        conv = g.part(f"nn.Conv{d}d({c}, 1, 1)")
        s = f"torch.sigmoid({conv}({x}))"
        expand = f".expand(-1, {g.number(c, f'{x}.shape[1]')}{', -1' * d})" if "expand" in kind else ""
        g.emit([x], f"{x} * {s}{expand}")
    elif kind == "cbam":
        conv = g.part(f"nn.Conv{d}d(2, 1, 3, padding=1)")
        g.emit([x], f"s = torch.cat([{x}.mean(1, keepdim=True), {x}.amax(1, keepdim=True)], 1)", f"{x} * {conv}(s)")
    elif kind in ("sum", "mean"):
        g.emit([x], f"{x} * torch.sigmoid({x}.{kind}(1, keepdim=True))")
    elif kind == "eca":
        conv = g.part("nn.Conv1d(1, 1, 3, padding=1)")
        g.emit([x], f"s = {conv}({mean}.unsqueeze(1)).transpose(1, 2)", f"{x} * s.reshape(*s.shape[:2], {g.ones()})")
    elif kind == "branches":
        fc = g.linear(c, n * c)
        view = f".view({x}.shape[0], {g.number(n)}, {g.number(c, '-1', f'{x}.shape[1]')}, {g.ones()})"
        branches = ", ".join([x, f"torch.tanh({x})", f"F.relu({x})"][:n])
        g.emit([x], f"s = {fc}({mean}){view}.softmax(1)", f"(torch.stack([{branches}], 1) * s).sum(1)")
    elif kind == "pool":
        g.emit([x], g.pick([f"{x}.mean({list(range(2, d + 2))}, keepdim=True)", f"F.adaptive_max_pool{d}d({x}, 1)"]))
    elif kind == "centred":
        g.emit([x], f"{x} - {x}.mean({list(range(2, d + 2))}, keepdim=True)")
    else:
        conv = g.part(f"nn.Conv{d}d({c}, 1, 1)")
        g.emit(
            [x], f"a = {conv}({x}).flatten(2).softmax(-1)", f"s = {x}.flatten(2) @ a.transpose(1, 2)",
            f"{x} + s.view({x}.shape[0], {g.number(c, '-1')}, {g.ones()})",
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------- matrices and attention


@maker(3)
def channels_last(g: Grower, x: str) -> None:
    c = g.channels(x)
    out = g.pick([1, 2, 4, c])
    if g.chance(0.5):
        g.emit([x], f"{g.linear(c, out)}({x}.movedim(1, -1)).movedim(-1, 1)")
    else:
        a, b = g.linear(c, 2 * out), g.linear(2 * out, out)
        g.emit([x], f"t = F.gelu({a}({x}.flatten(2).transpose(1, 2)))", g.back(f"{b}(t)", x, out))


@maker(2)
def matrix(g: Grower, x: str) -> None:
    """Mixes channels by a matrix that no layer owns."""
    c, out = g.channels(x), g.pick([2, 3, 4, 6])
    w, v = g.parameter(out, c), g.parameter(c, out)
    n = g.number(out)
    calls = [
        f"torch.einsum('bcn,kc->bkn', {x}.flatten(2), {w}).unflatten(2, {x}.shape[2:])",
        f"({w} @ {x}.flatten(2)).reshape({x}.shape[0], {n}, {g.spatial(x)})",
        f"({x}.movedim(1, -1) @ {v}).movedim(-1, 1)", f"torch.tensordot({x}, {v}, dims=([1], [0])).movedim(-1, 1)",
        f"F.linear({x}.movedim(1, -1), {w}).movedim(-1, 1)", f"torch.einsum('bc...,kc->bk...', {x}, {w})",
        f"torch.bmm({w}.expand({x}.shape[0], -1, -1), {x}.flatten(2)).view({x}.shape[0], -1, {g.spatial(x)})",
    ]  # fmt: skip
    call = g.pick(calls)
    g.emit([x], call)


@maker(1)
def gram(g: Grower, x: str) -> None:
    """Channels against channels, and positions against positions."""
    c = g.channels(x)
    if g.positions(x) > 64:
        return
    y = g.pick([x, *g.others(x, lambda a, b: a[2:] == b[2:])])
    calls = [
        ["a = torch.tanh(s @ t.transpose(1, 2))", f"(a @ t).unflatten(2, {x}.shape[2:])"],
        ["a = s.transpose(1, 2) @ s", f"(t @ a.tanh()).unflatten(2, {x}.shape[2:])"],
        ["a = torch.bmm(s, t.mT).softmax(-1)", f"(a @ t).reshape({x}.shape)"],
        ["a = torch.einsum('bcn,bdn->bcd', s, t)", f"{x} * a.sum(2).view({x}.shape[0], {c}, {g.ones()})"],
        ["a = (s * t.sum(1, keepdim=True)).sum(1)", f"{x} * a.unflatten(1, {x}.shape[2:]).unsqueeze(1)"],
        ["a = torch.einsum('bcn,bdn->bn', s, t)", f"{x} * a.unflatten(1, {x}.shape[2:]).unsqueeze(1)"],
    ]
    g.emit([x, y], f"s, t = {x}.flatten(2), {y}.flatten(2)", *g.pick(calls))


@maker(5)
def attention(g: Grower, x: str) -> None:
    c, n = g.channels(x), g.positions(x)
    if n > 64:
        return
    h, d = g.pick([1, 2, 2, 3, 4]), g.pick([1, 2, 3, 4])
    if g.chance(0.2):
        module = g.part(f"Attention({c}, {h}, {h * d})")
        g.emit([x], g.back(f"{module}({x}.flatten(2).transpose(1, 2))", x, c))
        return
    if g.chance(0.05) and c % h == 0:
        module = g.part(f"nn.MultiheadAttention({c}, {h}, batch_first=True)")
        g.emit([x], f"t = {x}.flatten(2).transpose(1, 2)", g.back(f"{module}(t, t, t, need_weights=False)[0]", x, c))
        return
    lines = [f"b, n = {x}.shape[0], {g.pick([str(n), f'{x}[0, 0].numel()'])}", f"t = {x}.flatten(2).transpose(1, 2)"]
    if g.chance(0.2):
        lines.append(f"t = t + {g.parameter(1, n, c)}")
    lines += _heads(g, x, h, d)
    lines += _weighed(g, h, n)
    merged = g.pick(["o.transpose(1, 2).reshape(b, n, -1)", "o.transpose(1, 2).flatten(2)",
                     f"o.transpose(1, 2).reshape(b, n, {g.number(h * d)})",
                     f"o.permute(0, 2, 1, 3).contiguous().view(b, n, {h * d})"])  # fmt: skip
    lines.append(f"o = {merged}")
    out = g.pick([c, h * d, 4])
    if out != h * d or g.chance(0.7):
        lines.append(f"o = {g.linear(h * d, out)}(o)")
    back = g.back("o", x, out)
    body = [*lines, f"{x} + {back}" if out == c and g.chance(0.5) else back]
    g.emit([x], *body)


def _heads(g: Grower, x: str, h: int, d: int) -> list[str]:
    """Queries, keys and values (B, heads, N, channels of a head) from the tokens `t`."""
    c, how = g.channels(x), g.pick(["fused", "chunks", "inner", "apart", "conv", "shared"])
    heads, width = g.pick([(g.number(h), g.number(d, "-1")), (g.number(h), "-1"), ("-1", g.number(d))])
    if how == "fused":
        sizes = f"b, n, 3, {heads}, {width}"
        last = g.pick(["q, k, v = t.unbind(0)", "q, k, v = t[0], t[1], t[2]", "q, k, v = t"])
        return [f"t = {g.linear(c, 3 * h * d)}(t).reshape({sizes}).permute(2, 0, 3, 1, 4)", last]
    if how == "chunks":
        cut = g.pick([".chunk(3, -1)", f".split({g.number(h * d)}, -1)", f".split({g.number([h * d] * 3)}, dim=2)"])
        return [
            f"t = {g.linear(c, 3 * h * d)}(t){cut}",
            f"q, k, v = [y.view(b, n, {heads}, {width}).transpose(1, 2) for y in t]",
        ]
    if how == "inner":  # heads × (queries, keys, values)
        cut = g.pick([".chunk(3, -1)", f".split({g.number([d] * 3)}, -1)"])
        return [f"q, k, v = {g.linear(c, 3 * h * d)}(t).view(b, n, {g.number(h)}, -1).transpose(1, 2){cut}"]
    if how == "conv":
        conv = g.part(f"nn.Conv{g.dims}d({c}, {3 * h * d}, 1)")
        cut = g.pick([".chunk(3, 1)", f".split({g.number([h * d] * 3)}, 1)"])
        return [f"q, k, v = [y.reshape(b, {heads}, {width}, n).mT for y in {conv}({x}){cut}]"]
    if how == "shared":  # one head of keys and values for all queries
        return [
            f"q = {g.linear(c, h * d)}(t).view(b, n, {heads}, {width}).transpose(1, 2)",
            f"k, v = {g.linear(c, 2 * d)}(t).unsqueeze(1).expand(-1, {h}, -1, -1).chunk(2, -1)",
        ]
    return [f"{y} = {g.linear(c, h * d)}(t).view(b, n, {heads}, {width}).transpose(1, 2)" for y in "qkv"]


def _weighed(g: Grower, h: int, n: int) -> list[str]:
    """The mean of the values `o`, weighed by queries and keys."""
    how = g.pick(["sdpa", "sdpa scale", "matmul", "matmul", "einsum", "linear", "channels", "biased"])
    scale = g.pick(["0.5", "0.5", g.part("0.5", "n"), "q.shape[-1] ** -0.5"])
    product = g.pick(["q @ k.transpose(-2, -1)", "torch.matmul(q, k.mT)", "torch.einsum('bhid,bhjd->bhij', q, k)"])
    if how == "sdpa":
        return ["o = F.scaled_dot_product_attention(q, k, v)"]
    if how == "sdpa scale":
        return [f"o = F.scaled_dot_product_attention(q, k, v, scale={scale})"]
    if how == "linear":
        return ["k = k.softmax(-2)", "o = q @ (k.mT @ v)"]
    if how == "channels":
        return [f"a = ((q.mT @ k) * {scale}).softmax(-1)", "o = (a @ v.mT).mT"]
    lines = [f"a = ({product}) * {scale}"]
    if how == "biased":
        bias = g.pick([g.parameter(h, n, n), g.parameter(h, 1, 1), g.parameter(n, n)])
        lines.append(f"a = a + {bias}")
    return [*lines, f"o = a.softmax(-1){g.pick([' @ v', '.matmul(v)'])}"]


# ----------------------------------------------------------------------------------------------------- space and shapes


@maker(4)
def resized(g: Grower, x: str) -> None:
    side, d = min(g.space(x)), g.dims
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
    calls = [
        f"F.interpolate({x}, scale_factor=2)", f"F.interpolate({x}, scale_factor=2.0, mode='{linear}')",
        f"F.interpolate({x}, size={[3] * d})", f"F.adaptive_avg_pool{d}d({x}, {min(side, 2)})",
        f"F.adaptive_max_pool{d}d({x}, {min(side, 2)})", f"{g.part('nn.Upsample(scale_factor=2)')}({x})",
    ]  # fmt: skip
    if side >= 2:
        pads = [1, 0] + [0, 1] * (d - 1)
        calls += [
            f"F.max_pool{d}d({x}, 2)", f"F.avg_pool{d}d({x}, 2)", f"F.max_pool{d}d({x}, 3, 1, 1)",
            f"{x}[:, :, 1:]", f"{x}[..., ::2]", f"{x}.flip(2)", f"{x}.roll(1, 2)", f"{x}[..., :-1]",
            f"F.pad({x}, {pads}, mode='{g.pick(['constant', 'reflect', 'circular', 'replicate'])}')",
            f"F.pad({x}, {pads}, value=0.5)", f"F.pad({x}, {[1] * (2 * d)})", f"{x}.narrow(2, 0, {x}.shape[2] // 2)",
            f"torch.roll({x}, shifts=({', '.join(['1'] * d)},), dims=({', '.join(str(a + 2) for a in range(d))},))",
        ]  # fmt: skip
        if d == 2:
            calls += [f"{x}.transpose(2, 3)", f"{x}[:, :, 1:, :-1]", f"F.avg_pool2d({x}, (2, 1))"]
    call = g.pick(calls)
    g.emit([x], call)


@maker(2)
def pixels(g: Grower, x: str) -> None:
    if g.dims != 2:
        return
    c, (h, w) = g.channels(x), g.space(x)
    calls = []
    if c % 4 == 0:
        calls += [
            [f"{g.part('nn.PixelShuffle(2)')}({x})"],
            [f"b, c, h, w = {x}.shape", f"y = {x}.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)",
             "y.reshape(b, c // 4, 2 * h, 2 * w)"],
            [f"b, c, h, w = {x}.shape", f"y = {x}.view(b, 2, 2, {g.number(c // 4, '-1')}, h, w)",
             f"y.permute(0, 3, 4, 1, 5, 2).reshape(b, {g.number(c // 4, '-1')}, h * 2, w * 2)"],
        ]  # fmt: skip
    if h % 2 == 0 and w % 2 == 0 and c <= 10:
        calls += [
            [f"F.pixel_unshuffle({x}, 2)"],
            [f"torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2], {x}[..., 1::2, 1::2]], 1)"],
            [f"b, c, h, w = {x}.shape", f"y = {x}.view(b, c, h // 2, 2, w // 2, 2)",
             f"y.permute(0, 3, 5, 1, 2, 4).reshape(b, {g.number(4 * c, 'c * 4', '-1')}, h // 2, w // 2)"],
            [f"b, c, h, w = {x}.shape", f"y = {x}.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)",
             "y.reshape(b, -1, h // 2, w // 2)"],
        ]  # fmt: skip
    if calls:
        body = g.pick(calls)
        g.emit([x], *body)


@maker(1)
def windows(g: Grower, x: str) -> None:
    """Windows in the batch, as attention takes them, and back."""
    if g.dims != 2 or any(s % 2 for s in g.space(x)):
        return
    c = g.channels(x)
    lines = [
        f"b, c, h, w = {x}.shape",
        f"t = {x}.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, {g.number(c, 'c')}).permute(0, 1, 3, 2, 4, 5)",
        f"t = {g.linear(c, c)}(t.reshape(-1, 4, {g.number(c, 'c')}))",
        f"t = t.view(b, h // 2, w // 2, 2, 2, {g.number(c, '-1', 'c')}).permute(0, 1, 3, 2, 4, 5)",
    ]
    g.emit([x], *lines, f"t.reshape(b, h, w, {g.number(c, '-1')}).permute(0, 3, 1, 2)")


@maker(1)
def merged(g: Grower, x: str) -> None:
    """Channels in the batch: every one, or every group, is an image of its own."""
    c, d = g.channels(x), g.dims
    n = g.pick([1, g.divisor(c)])
    conv = g.part(f"nn.Conv{d}d({n}, {n}, 3, padding=1)")
    lines = [f"b, c = {x}.shape[:2]", f"y = {x}.reshape({g.pick([f'b * c // {n}', '-1'])}, {n}, {g.spatial(x)})"]
    g.emit([x], *lines, f"{conv}(y).reshape(b, {g.number(c, 'c', '-1')}, {g.spatial(x)})")


@maker(1)
def flat(g: Grower, x: str) -> None:
    """All positions of all channels, through a linear layer."""
    c, n = g.channels(x), g.positions(x)
    if c * n > 200:
        return
    hidden = g.linear(c * n, c * n if g.chance(0.5) else c)
    if f"{c * n}, {c * n}" in g._parts[-1][1]:
        g.emit([x], f"{hidden}({x}.flatten(1)).view({g.pick([f'{x}.shape', f'{x}.shape[0], -1, {g.spatial(x)}'])})")
    else:
        g.emit([x], f"{hidden}({x}.flatten(1))[(...,) + (None,) * {g.dims}]")


@maker(2)
def patches(g: Grower, x: str) -> None:
    """im2col: the neighbourhood of a position as channels."""
    if g.dims != 2 or min(g.space(x)) < 3:
        return
    c, out = g.channels(x), g.pick([2, 4])
    lines = [f"b, c, h, w = {x}.shape", f"u = F.unfold({x}, 3, padding=1)"]
    kind = g.pick(["matrix", "conv", "fold", "involution", "tokens"])
    if kind == "matrix":
        g.emit([x], *lines, f"({g.parameter(out, 9 * c)} @ u).view(b, {g.number(out, '-1')}, h, w)")
    elif kind == "conv":
        g.emit([x], *lines, f"{g.part(f'nn.Conv1d({9 * c}, {out}, 1)')}(u).unflatten(2, (h, w))")
    elif kind == "fold":
        g.emit([x], *lines, "F.fold(u.tanh(), (h, w), 3, padding=1)")
    elif kind == "tokens":
        g.emit([x], *lines, f"{g.linear(9 * c, out)}(u.transpose(1, 2)).transpose(1, 2).reshape(b, -1, h, w)")
    else:
        n = g.divisor(c, (1, 2, 3))
        kernel = g.part(f"nn.Conv2d({c}, {9 * n}, 1)")
        g.emit(
            [x], *lines, f"u = u.view(b, {g.number(n)}, {g.number(c // n, f'c // {n}', '-1')}, 9, h, w)",
            f"k = {kernel}({x}).view(b, {n}, 9, h, w).unsqueeze(2)",
            f"(u * k).sum(3).view(b, {g.number(c, 'c')}, h, w)",
        )  # fmt: skip


@maker(2)
def blurred(g: Grower, x: str) -> None:
    """A fixed kernel for every channel."""
    c, d = g.channels(x), g.dims
    if min(g.space(x)) < 3:
        return
    how = g.pick(["class", "expand", "repeat", "whole", "merged"])
    rest = [1, *[3] * d]
    groups = g.number(c, f"{x}.shape[1]")
    if how == "class":
        g._parts = []
        g.emit([x], f"{g.part(f'BlurPool({d}, {c})')}({x})")
    elif how == "whole":
        g.emit([x], f"F.conv{d}d({x}, {g.buffer(c, *rest)}, groups={groups})")
    elif how == "merged":
        g._parts = []
        kernel = g.buffer(1, *rest)
        y = f"F.conv{d}d({x}.reshape(-1, 1, {g.spatial(x)}), {kernel}, padding=1)"
        g.emit([x], f"{y}.view({g.pick([f'{x}.shape', f'-1, {c}, {g.spatial(x)}'])})")
    else:
        kernel, size = g.buffer(1, *rest), g.number(c, f"{x}.shape[1]")
        copies = f".expand({size}{', -1' * (d + 1)})" if how == "expand" else f".repeat({size}{', 1' * (d + 1)})"
        stride = g.pick(["", ", stride=2"])
        g.emit([x], f"F.conv{d}d({x}, {kernel}{copies}{stride}, groups={groups})")


# ----------------------------------------------------------------------------------------------------------- used again


@maker(2)
def again(g: Grower, x: str) -> None:
    """A module that stands in the network already, run once more."""
    fitting = []
    for step in g.steps:
        found = re.fullmatch(r"v\d+ = (self\.\w+)\((\w+)\)", step.lines[-1])
        if found and len(step.lines) == len(step.parts) == len(step.sources) == 1:
            shape = g.shape(step.sources[0])
            if shape == g.shape(x) or (step.kind == "convolution" and shape[1] == g.channels(x) > 3):
                fitting.append(found[1])
    if fitting:
        with contextlib.suppress(RuntimeError):  # too small for its kernel
            g.emit([x], f"{g.pick(fitting)}({x})", wrap=False)


@maker(1)
def tied_kernel(g: Grower, x: str) -> None:
    """A new convolution with the kernel of another."""
    for step in g.steps:
        if step.kind in ("convolution", "stem") and not step.code and g.channels(step.sources[0]) == g.channels(x) > 3:
            name, expression = step.parts[0]
            with contextlib.suppress(RuntimeError):  # too small for its kernel
                g.emit([x], f"{g.part(f'tied({expression}, self.{name})')}({x})", wrap=False)
                return


def grow(seed: int, size: int) -> Plan:
    """The plan of `size` random steps from `seed`, the same for the same pair."""
    return Grower(seed, size).plan()


# ------------------------------------------------------------------------------------------------------------ the check


class BrokenError(AssertionError):
    """A promise that is not kept: of which kind, and how."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class UselessError(Exception):
    """The network is of no use: it amplifies rounding errors, or its outputs are not finite."""


@dataclass
class Finding:
    """What one network showed in one form."""

    form: Form
    groups: int
    outputs: int  # channels that its layers make
    removable: int  # of these
    inexact: int  # of those
    removed: int
    error: float  # zeroed against removed
    effect: float  # whole against removed
    free: dict[str, int] = field(default_factory=dict)  # layer → removable output channels
    reasons: Counter[str] = field(default_factory=Counter)  # why the others stay


def random_masks(graph: Graph, rng: np.random.Generator, inexact: bool = False) -> np.ndarray:
    """Every group keeps as many channels as must stay, and any others; inexact ones keep all, unless asked for."""
    keep = graph.keep_all()
    for group in graph.groups:
        if inexact or not group.inexact:
            kept = rng.integers(group.least, group.channels + 1)
            keep[group.units] = False
            keep[group.start + rng.choice(group.channels, kept, replace=False)] = True
    return keep


def check(plan: Plan, forms: Sequence[Form] = FORMS, rounds: int = 2, masks: int = 1) -> list[Finding]:
    """Build the network, remove random channels, again from what is left; raise a `BrokenError` unless all is exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PyTorch's word for an attribute that is not true
        model, inputs = plan.build(), plan.inputs()
        if not all(bool(torch.isfinite(x).all()) for x in outputs(model, inputs)):
            raise UselessError("its outputs are not finite")
        findings = [check_form(model, inputs, form, plan.seed, rounds, masks) for form in forms]
    return findings


def check_form(
    model: nn.Module, inputs: tuple[Tensor, ...], form: Form, seed: int, rounds: int = 1, masks: int = 1
) -> Finding:
    """All promises of one form."""
    found: Finding | None = None
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        witness = Witness(model) if number == 0 else None
        graph = promised(f"{form}: trace", trace, model, inputs, form)
        if number == 0 and form == "graph":
            _assert_same_function(model, graph, inputs)
        _assert_structure(model, graph, inputs, random_masks(graph, rng, inexact=True))
        for _ in range(masks):
            keep = random_masks(graph, rng)
            error, effect, small = _assert_exact(model, graph, inputs, keep)
            found = found or _finding(graph, keep, error, effect)
        if witness is not None:
            promised(f"{form}: the original is changed", witness.assert_untouched)
        model = small
    assert found is not None
    return found


def promised(kind: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that must not raise."""
    try:
        return function(*args)
    except BrokenError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {str(error)[:600]} (line {at.lineno} of {Path(at.filename).name})"
        raise BrokenError(f"{kind} ({type(error).__name__})", message) from error


def _assert_same_function(model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...]) -> None:
    double = copy.deepcopy(model).double()
    whole = promised("graph: nothing removed", removed, double, graph, graph.keep_all())
    noise = tuple(x.double() for x in inputs)
    got = promised("graph: nothing removed, run", outputs, _in_double(whole), noise)
    error = max(map(relative_difference, outputs(double, noise), got))
    if not error <= TOLERANCE and not _restless(model, graph, graph.keep_all(), error):
        raise BrokenError("graph: nothing removed, yet another function", f"relative error {error:.1e}")
    with torch.no_grad():
        if tree_structure(double.eval()(*noise)) != tree_structure(whole.eval()(*noise)):
            raise BrokenError("graph: outputs packed otherwise", str(tree_structure(whole(*noise))))


def _assert_structure(model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...], keep: np.ndarray) -> None:
    """Also where the function changes by nature, the smaller net runs and costs what was said."""
    small = promised(f"{graph.form}: removal", removed, model, graph, keep)
    got = promised(f"{graph.form}: the smaller net does not run", outputs, small, inputs)
    shapes = [x.shape for x in got], [x.shape for x in outputs(model, inputs)]
    if shapes[0] != shapes[1]:
        raise BrokenError(f"{graph.form}: outputs of another shape", str(shapes))
    measured = promised(f"{graph.form}: counting the smaller net", count, small, inputs)
    predicted = total_cost(graph, keep)
    if measured.total != predicted:
        raise BrokenError(f"{graph.form}: cost", f"predicted {predicted}, measured {measured.total}")
    layers = {layer.name: layer_cost(graph, layer, keep) for layer in graph.layers}
    if measured.layers != layers:
        raise BrokenError(f"{graph.form}: cost of layers", f"predicted {layers}, measured {measured.layers}")
    if graph.form == "module":
        promised("module: attributes", assert_attributes_true, small)


def _assert_exact(
    model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...], keep: np.ndarray
) -> tuple[float, float, nn.Module]:
    result = promised(f"{graph.form}: self-check", self_check, model, graph, keep)
    error = result.max_relative_error
    if not result.passed:
        if _restless(model, graph, keep, error):
            raise UselessError("it amplifies rounding errors")
        alone = [group.name for group in culprits(model, graph, keep)]
        gone = np.flatnonzero(~keep).tolist()
        raise BrokenError(f"{graph.form}: zeroed != removed", f"{error:.1e} without {gone}; alone: {alone}")
    small = promised(f"{graph.form}: removal", removed, model, graph, keep)
    return error, max(map(relative_difference, outputs(model, inputs), outputs(small, inputs))), small


def _restless(model: nn.Module, graph: Graph, keep: np.ndarray, error: float) -> bool:
    """Whether the zeroed net itself answers rounding errors in its weights with errors near the one found."""
    if not math.isfinite(error):
        return False
    nets = [_in_double(zeroed(model, graph, keep)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(1 + 1e-15 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    noise = [torch.randn(s, generator=generator, dtype=torch.float64) for s in graph.inputs]
    moved = max(map(relative_difference, outputs(nets[0], noise), outputs(nets[1], noise)))
    return not moved < 1e-3 * error


def _finding(graph: Graph, keep: np.ndarray, error: float, effect: float) -> Finding:
    made = [graph.channel_units(layer, reads_input=False) for layer in graph.layers]
    units = np.concatenate([np.empty(0, int), *made])
    hazy = np.zeros(graph.channels, bool)
    for group in graph.groups:
        hazy[group.units] = bool(group.inexact)
    reasons: Counter[str] = Counter()
    for f in graph.frozen:
        reasons[re.sub(r" in \S+", "", f.reason)] += f.channels
    inexact = int(hazy[units[units >= 0]].sum())
    free = {layer.name: int((ids >= 0).sum()) for layer, ids in zip(graph.layers, made, strict=True)}
    return Finding(
        graph.form, len(graph.groups), len(units), int((units >= 0).sum()), inexact, int((~keep).sum()), error, effect,
        free, reasons,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- smaller failures


def kind_of(plan: Plan, forms: Sequence[Form], rounds: int) -> str | None:
    """The kind of its failure, if it fails."""
    try:
        check(plan, forms, rounds, masks=3)
    except BrokenError as failure:
        return failure.kind
    except Exception:  # a candidate that does not even run
        return None
    return None


def shrink(plan: Plan, kind: str, forms: Sequence[Form], rounds: int, seconds: float = 90) -> Plan:
    """The smallest network that fails in the same way, as far as removing step after step finds it."""
    stop = time.monotonic() + seconds
    forms = [form for form in forms if kind.startswith(form)] or forms
    rounds = 1 if kind_of(plan, forms, 1) == kind else rounds
    again = True
    while again:
        again = False
        for smaller in candidates(plan):
            if time.monotonic() > stop:
                return plan
            if kind_of(smaller, forms, rounds) == kind:
                plan, again = smaller, True
                break
    return plan


def candidates(plan: Plan) -> Iterator[Plan]:
    """The same network with a step less, the boldest first."""
    if plan.packing != "bare":
        yield replace(plan, packing="bare")
    yield from filter(lambda smaller: smaller != plan, [_pruned(plan), _fewer_inputs(plan)])
    for number in range(len(plan.steps)):
        if (smaller := without(plan, number)) is not None:
            yield smaller
    for number in reversed(range(len(plan.steps))):
        yield from bypassed(plan, number)
    for number, step in enumerate(plan.steps):
        if step.inner is not None:
            yield replace(plan, steps=(*plan.steps[:number], step.inner, *plan.steps[number + 1 :]))


def without(plan: Plan, number: int) -> Plan | None:
    """Without a step and all that hangs on it."""
    gone, steps = {*plan.steps[number].results}, list[Step]()
    for n, step in enumerate(plan.steps):
        if n == number or gone & set(step.sources):
            gone |= {*step.results}
        else:
            steps.append(step)
    if not any(step.head for step in steps):
        return None
    return _owned(plan, steps)


def _owned(plan: Plan, steps: list[Step]) -> Plan:
    """Parts of steps that are gone belong to the first step that still takes them."""
    owned = {name for step in steps for name, _ in step.parts}
    for step in plan.steps:
        for part in step.parts:
            pattern = re.compile(rf"\bself\.{part[0]}\b")
            takers = [n for n, s in enumerate(steps) if any(map(pattern.search, (*s.lines, *(e for _, e in s.parts))))]
            if part[0] not in owned and takers:
                first = steps[takers[0]]
                steps[takers[0]] = replace(first, parts=(part, *first.parts), code=step.code or first.code)
    return replace(plan, steps=tuple(steps))


def _fewer_inputs(plan: Plan) -> Plan:
    """Without the inputs that nothing reads."""
    read = [n for n in range(len(plan.shapes)) if any(f"x{n}" in step.sources for step in plan.steps)] or [0]
    steps = plan.steps
    for new, old in enumerate(read):
        steps = tuple(step.renamed(f"x{old}", f"x{new}") for step in steps)
    return replace(plan, shapes=tuple(plan.shapes[n] for n in read), steps=steps)


def bypassed(plan: Plan, number: int) -> Iterator[Plan]:
    """With an earlier value, or a convolution of an input, in place of a step's result."""
    step = plan.steps[number]
    if len(step.results) > 1 or step.head:
        return
    shapes = {f"x{n}": shape for n, shape in enumerate(plan.shapes)}
    for earlier in plan.steps[:number]:
        shapes.update(zip(earlier.results, earlier.shapes, strict=True))
    fitting = [name for name, shape in shapes.items() if shape == step.shapes[0]]
    fitting.sort(key=lambda name: name not in step.sources)
    rest = [s for n, s in enumerate(plan.steps) if n != number]
    for name in fitting[:4]:
        yield _owned(plan, [s.renamed(step.results[0], name) for s in rest])
    if step.kind == "stem" or step.shapes[0][2:] != plan.shapes[0][2:]:
        return
    dims, part = len(plan.shapes[0]) - 2, f"q{number}"
    conv = f"nn.Conv{dims}d({plan.shapes[0][1]}, {step.shapes[0][1]}, 3, padding=1)"
    fresh = replace(
        step, kind="stem", sources=("x0",), lines=(f"{step.results[0]} = self.{part}(x0)",), parts=((part, conv),),
        code="",
    )  # fmt: skip
    yield _pruned(_owned(plan, [*plan.steps[:number], fresh, *plan.steps[number + 1 :]]))


def _pruned(plan: Plan) -> Plan:
    """Without what now runs for nothing."""
    needed: set[str] = set()
    steps: list[Step] = []
    for step in reversed(plan.steps):
        if step.head or needed & set(step.results):
            needed |= set(step.sources)
            steps.insert(0, step)
    return _owned(plan, steps)


# ---------------------------------------------------------------------------------------------------------- the command


def explain(build: Callable[[], nn.Module], shapes: Sequence[tuple[int, ...]], seed: int = 0) -> None:
    """Print what a trace says of a network in each form, and whether random removals are exact."""
    torch.set_num_threads(1)
    for form in FORMS:
        torch.manual_seed(seed)
        model = calibrate(randomise(build(), seed), shapes)
        inputs = tuple(torch.randn(s, generator=torch.Generator().manual_seed(seed)) for s in shapes)
        print(f"--- {form} form")
        try:
            graph = trace(model, inputs, form)
            for group in graph.groups:
                read = f"{group.name}: {group.channels}, made by {group.producers}, read by {group.consumers}"
                print(f"{read}, inexact: {group.inexact}" if group.inexact else read)
            for f in graph.frozen:
                print(f"frozen {f.layer}: {f.channels}, {f.reason}")
            check_form(model, inputs, form, seed, rounds=2, masks=5)
            print("exact")
        except (BrokenError, UselessError) as failure:
            print(f"{type(failure).__name__}: {failure}")


@dataclass
class Tally:
    """The results of a run, and how they are told."""

    forms: Sequence[Form]
    rounds: int
    shrinks: bool
    save: Path | None
    start: float = field(default_factory=time.monotonic)
    done: int = 0
    skipped: int = 0
    failed: int = 0
    known: Counter[tuple[str, ...]] = field(default_factory=Counter)
    findings: list[list[Finding]] = field(default_factory=list)
    fewer: list[str] = field(default_factory=list)  # layers of which the graph form lets less go

    def add(self, seed: int, size: int) -> None:
        self.done += 1
        replay = f"--graphs 1 --seed {seed} --size {size}"
        try:
            plan = grow(seed, size)
            found = check(plan, self.forms, self.rounds)
        except UselessError:
            self.skipped += 1
        except BrokenError as failure:
            self._tell(plan, failure, replay)
        except Exception:
            self.failed += 1
            print(f"FAILED, the generator itself: {replay}\n{traceback.format_exc()}", flush=True)
        else:
            self.findings.append(found)
            free = {f.form: f.free for f in found}
            for layer, channels in free.get("module", {}).items():
                if channels > free.get("graph", {}).get(layer, channels):  # the graph form has no dead layers
                    self.fewer.append(f"{replay}, {layer} ({channels} and {free['graph'][layer]} channels)")

    def _tell(self, plan: Plan, failure: BrokenError, replay: str) -> None:
        self.failed += 1
        small = shrink(plan, failure.kind, self.forms, self.rounds) if self.shrinks else plan
        same = (failure.kind, *sorted(step.kind for step in small.steps if step.kind != "stem"))
        self.known[same] += 1
        print(f"FAILED: python tests/graph/fuzz.py {replay}\n  {failure}", flush=True)
        if self.known[same] > 1:
            print("  as another one above", flush=True)
            return
        print(small.source(), f"\n# inputs {list(small.shapes)}\n", flush=True)
        if self.save is not None:
            self.save.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", f"{plan.seed}_{failure.kind}")
            (self.save / f"{name}.py").write_text(small.standalone(f"{failure.kind} ({replay})"))

    def progress(self) -> str:
        seconds = time.monotonic() - self.start
        return f"{self.done} networks in {seconds:.0f} s, {self.failed} failed, {self.skipped} skipped"

    def summary(self) -> str:
        lines = [self.progress()]
        for number, form in enumerate(self.forms):
            found = [f[number] for f in self.findings]
            if not found:
                continue
            total = sum(f.outputs for f in found)
            free, hazy = (100 * sum(getattr(f, key) for f in found) / total for key in ("removable", "inexact"))
            lost, felt = sum(f.removed > 0 for f in found), sum(f.effect > 1e-3 for f in found)
            lines += [
                f"{form} form: {free:.0f} % of output channels removable ({hazy:.0f} % inexact); {lost} networks lost "
                f"some, {felt} felt it; largest relative error {max(f.error for f in found):.1e}"
            ]
            reasons = sum((f.reasons for f in found), Counter())
            lines += [f"  {n:6d} stay: {reason}" for reason, n in reasons.most_common(15)]
        if self.fewer:
            lines.append(f"{len(self.fewer)} layers with fewer removable channels in the graph form:")
            lines += [f"  {line}" for line in self.fewer[:20]]
        lines += [f"{n} × {' '.join(kind)}" for kind, n in self.known.most_common()]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others count up from it")
    parser.add_argument("--size", type=int, default=0, help="steps of a network; 0: 1 to 16, by its seed")
    parser.add_argument("--forms", default=",".join(FORMS), help="module, graph, or both with a comma")
    parser.add_argument("--rounds", type=int, default=2, help="removals from each network, one after the other")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after that many")
    parser.add_argument("--no-shrink", action="store_true", help="print failing networks as they are")
    parser.add_argument("--save", type=Path, help="a folder for the failing networks, each a file that runs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tally = Tally(given.forms.split(","), given.rounds, not given.no_shrink, given.save)
    told = time.monotonic()
    for seed in range(given.seed, given.seed + given.graphs):
        tally.add(seed, given.size or 1 + seed % 16)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(tally.progress(), flush=True)
        if time.monotonic() - tally.start > 60 * given.minutes:
            break
    print(tally.summary())
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
