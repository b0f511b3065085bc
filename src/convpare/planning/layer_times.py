"""How long layers take on this machine: measured when first asked for, interpolated, and kept in the user's cache."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import secrets
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.optional import import_extra
from convpare.runtimes import RUNTIMES, onnx_session, processor, torch_threads
from convpare.timing import in_turn

GRID = (1, 2, 4, 8, 12, 16, 24, 32, 48, *(2**n * m for n in range(4, 12) for m in (4, 6)))
"""Numbers of channels that are measured; between them times are interpolated."""
STEPS = (16, 8, 4)
CLEARER = 0.5  # a staircase must leave less than this share of a line's squared error
SECONDS = 0.003  # of each measurement, or three calls
SCHEMA = 1

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class Target:
    """Where and how a network is to run.

    Attributes:
        runtime: of `RUNTIMES`. Layers of torch.compile are timed one by one in eager torch, whose kernels it calls.
        batch: images in a batch.
        threads: of the processor; None: torch's current number.
    """

    runtime: str = "eager"
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ConvpareError(f"no runtime {self.runtime!r}; choose one of {', '.join(RUNTIMES)}")
        if self.batch < 1 or (self.threads is not None and self.threads < 1):
            raise ConvpareError(f"batch is {self.batch}, threads is {self.threads}; expected numbers of 1 or more")

    @property
    def cores(self) -> int:
        """The number of threads."""
        return torch.get_num_threads() if self.threads is None else self.threads


@dataclass(frozen=True)
class Signature:
    """A convolution or linear layer apart from its channels.

    Attributes:
        kind: "conv", "conv_transpose" or "linear".
        batch: images, or rows of a linear layer.
        extent: of the input.
        groups: 1, another fixed number, or 0 where every channel is a group (depthwise).
    """

    kind: str
    batch: int
    extent: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @staticmethod
    def of(module: nn.Module, batch: int, extent: tuple[int, ...]) -> "Signature":
        """Of a plain convolution or linear layer that is called on inputs of this size."""
        if isinstance(module, nn.Linear):
            return Signature("linear", batch)
        m: Any = module
        transposed = bool(m.transposed)
        depthwise = m.groups > 1 and m.groups == m.in_channels
        return Signature(
            "conv_transpose" if transposed else "conv", batch, extent, tuple(m.kernel_size), tuple(m.stride),
            m.padding if isinstance(m.padding, str) else tuple(m.padding), tuple(m.dilation),
            tuple(m.output_padding) if transposed else (), 0 if depthwise else m.groups,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """A name for files."""
        return json.dumps(astuple(self))

    def module(self, into: int, out: int) -> nn.Module:
        """A layer with so many channels, or a few more where its groups want multiples."""
        if self.kind == "linear":
            return nn.Linear(into, out, bias=False)
        groups = self.groups or into
        into, out = (math.ceil(x / groups) * groups for x in (into, out))
        plain, transposed = CONVOLUTIONS[len(self.kernel)]
        settings: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.kind == "conv_transpose":
            settings["output_padding"] = self.output_padding
        kind: Any = transposed if self.kind == "conv_transpose" else plain
        module: nn.Module = kind(into, out, self.kernel, groups=groups, bias=False, **settings)
        return module

    def input(self, into: int) -> Tensor:
        """Noise of the shape that such a layer reads."""
        groups = self.groups or 1
        channels = math.ceil(into / groups) * groups
        shape = (self.batch, channels) if self.kind == "linear" else (self.batch, channels, *self.extent)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


Measure = Callable[[Signature, int, int], float]


@dataclass
class LayerTimes:
    """Milliseconds of layers for any channels.

    Args:
        target: where they run.
        device: of torch.
        store: a file that measurements are kept in; None: they are not. It is of one machine and one setting.
        measure: how a layer is timed.
    """

    target: Target
    device: torch.device
    store: Path | None = None
    measure: Measure | None = None
    points: dict[str, dict[str, float]] = field(init=False)
    _unsaved: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.measure = self.measure or self._measured
        self.points = {} if self.store is None or not self.store.exists() else _read(self.store, self.machine)

    @property
    def machine(self) -> dict[str, Any]:
        """What the times are of."""
        return machine_of(self.target, self.device)

    def milliseconds(self, signature: Signature, into: int, out: int) -> float:
        """The time of a layer with so many channels, or of one that the next larger step of the machine has."""
        step = self.step(signature)
        if not signature.groups:  # depthwise: its own channels, and how many outputs each has
            return self._between(signature, into, lambda i: (i, round(i * out / into)), 1)
        return self._bilinear(signature, _up(into, step), _up(out, step))

    def step(self, signature: Signature) -> int:
        """By how many channels times go up in steps: the larger step of inputs and outputs, since what one layer puts
        out the next reads. Learnt once a kind of layer.
        """
        if signature.kind == "linear" or signature.groups != 1:
            return 1
        name = f"{signature.kind} {'pointwise' if math.prod(signature.kernel) == 1 else 'spatial'}"
        known = self.points.setdefault("steps", {})
        if name not in known:
            small = replace(signature, batch=1, extent=tuple(min(size, 28) for size in signature.extent))
            channels = range(33, 65)
            sides = [[(c, 64) for c in channels], [(64, c) for c in channels]]
            known[name] = max(staircase(channels, [self._point(small, *at) for at in side]) for side in sides)
        return int(known[name])

    def _bilinear(self, signature: Signature, into: int, out: int) -> float:
        return self._between(signature, out, lambda o: (into, o), 1, inner=True)

    def _between(
        self, signature: Signature, at: int, place: Callable[[int], tuple[int, int]], step: int, inner: bool = False
    ) -> float:
        """Along one number of channels, between the two of the grid beside it."""
        at = _up(at, step)
        low, high = beside(at)

        def value(x: int) -> float:
            into, out = place(x)
            if inner:
                return self._between(signature, into, lambda i: (i, out), 1)
            return self._point(signature, into, out)

        below = value(low)
        return below if low == high else below + (at - low) / (high - low) * (value(high) - below)

    def _point(self, signature: Signature, into: int, out: int) -> float:
        known = self.points.setdefault(signature.key, {})
        name = f"{into},{out}"
        if name not in known:
            assert self.measure is not None
            known[name] = self.measure(signature, into, out)
            self._unsaved += 1
            if self._unsaved >= 500:
                self.save()
        return known[name]

    def _measured(self, signature: Signature, into: int, out: int) -> float:
        module, x = signature.module(into, out).eval().to(self.device), signature.input(into).to(self.device)
        with torch_threads(self.target.cores), torch.inference_mode():
            if self.target.runtime == "onnxruntime":
                call: Callable[[], object] = onnx_session(layer_onnx(module, x), [x], self.target.cores)
            else:
                call = lambda: module(x)  # noqa: E731
            return float(np.median(in_turn([call], SECONDS, self.device, warm_up=1, least=3)))

    def save(self) -> None:
        """Write what was measured, whole or not at all."""
        self._unsaved = 0
        if self.store is None:
            return
        content = {"schema": SCHEMA, "machine": self.machine, "points": self.points}
        temporary = self.store.with_name(f".{self.store.name}-{secrets.token_hex(4)}")
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content) + "\n")
            os.replace(temporary, self.store)
        except OSError as error:
            raise ConvpareError(f"the times of layers cannot be kept in {self.store}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def cached(target: Target, device: torch.device) -> LayerTimes:
    """Times that are kept in the user's cache: $CONVPARE_CACHE, or convpare under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConvpareError: the file there is damaged.
    """
    named = os.environ.get("CONVPARE_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convpare"
    digest = hashlib.sha256(json.dumps(machine_of(target, device), sort_keys=True).encode()).hexdigest()[:12]
    return LayerTimes(target, device, folder / f"latency-{digest}.json")


def machine_of(target: Target, device: torch.device) -> dict[str, Any]:
    """What times depend on: the processor, the runtime and its version, the batch and the threads."""
    runtime = "onnxruntime" if target.runtime == "onnxruntime" else "eager"  # torch.compile calls eager's kernels
    version: Any = import_extra("onnxruntime", "onnx").__version__ if runtime == "onnxruntime" else torch.__version__
    return {
        "device": str(device), "processor": processor(device), "runtime": runtime, "version": version,
        "threads": target.cores,
    }  # fmt: skip


def staircase(channels: Sequence[int], times: Sequence[float]) -> int:
    """The step by which times go up with the channels: 1, unless a staircase explains them clearly better than a line.

    A staircase is a line over the channels rounded up to a multiple of the step.
    """
    values = np.asarray(times)
    errors = {step: _line_error(np.array([_up(c, step) for c in channels], float), values) for step in (1, *STEPS)}
    best = min(STEPS, key=lambda step: errors[step])
    on_a_line = errors[1] <= 1e-9 * float(np.square(values).sum())
    return best if errors[best] < CLEARER * errors[1] and not on_a_line else 1


def _line_error(x: np.ndarray, y: np.ndarray) -> float:
    design = np.stack([np.ones_like(x), x], 1)
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(np.square(y - fitted).sum())


def beside(channels: int) -> tuple[int, int]:
    """The numbers of the grid at or below, and at or above. Above the grid: the number itself."""
    at = bisect_left(GRID, channels)
    if at == len(GRID) or GRID[at] == channels:
        return channels, channels
    return GRID[max(at - 1, 0)], GRID[at]


def _up(channels: int, step: int) -> int:
    return math.ceil(channels / step) * step


def _read(path: Path, machine: dict[str, Any]) -> dict[str, dict[str, float]]:
    reason = "it holds something else"
    try:
        content = json.loads(path.read_text())
        if content["schema"] == SCHEMA and content["machine"] == machine:
            points = content["points"]
            for known, value in itertools.chain.from_iterable(p.items() for p in points.values()):
                if not isinstance(known, str) or not 0 < float(value) < math.inf:
                    raise ValueError(f"{known}: {value}")
            return {str(key): dict(values) for key, values in points.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ConvpareError(f"{path} is no table of times of this machine ({reason}); remove it, and it is measured anew")


def layer_onnx(module: nn.Module, x: Tensor) -> bytes:
    """One layer as ONNX, without the exporter, which takes a hundred times as long."""
    onnx: Any = import_extra("onnx", "onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    layer: Any = module
    weight = layer.weight.detach().float()
    if isinstance(module, nn.Linear):
        weight, name, settings = weight.T.contiguous(), "MatMul", {}
    else:
        name = "ConvTranspose" if layer.transposed else "Conv"
        settings = {
            "kernel_shape": list(layer.kernel_size), "strides": list(layer.stride), "group": layer.groups,
            "dilations": list(layer.dilation), "pads": _pads(layer),
        }  # fmt: skip
        if layer.transposed:
            settings["output_padding"] = list(layer.output_padding)
    with torch.no_grad():
        y = module(x)
    graph = helper.make_graph(
        [helper.make_node(name, ["x", "w"], ["y"], **settings)], "layer",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", kind, list(y.shape))],
        [onnx.numpy_helper.from_array(weight.cpu().numpy(), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def _pads(layer: Any) -> list[int]:
    """Zeros before each axis, then after each."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [w // 2 for w in whole] + [w - w // 2 for w in whole]
    return list(layer.padding) * 2
