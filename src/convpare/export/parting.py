"""Where an ONNX file and the network part: the first layer after which no value of the one is one of the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from convpare.errors import ConvpareError
from convpare.optional import import_extra
from convpare.runtimes import onnx_network

FIRST = 16  # values of two tensors that are compared before the rest is


def parting(model: nn.Module, content: bytes, inputs: tuple[Tensor, ...], tolerance: float) -> str:
    """The layer where the two part, as a sentence's end.

    Every operator's output in torch is looked for among all values of the ONNX graph. What is not found there may be
    folded or written otherwise, as long as something that is computed from it is found; the first operator of which
    this is not true is where they part.

    Args:
        content: the ONNX model.
        inputs: of one call, for which the outputs differ.
        tolerance: relative to a tensor's largest value.
    """
    steps = _recorded(model, inputs)
    try:
        values = _values(content, inputs)
    except Exception as error:  # onnxruntime's own errors have no common class
        return f"where they part cannot be told: {type(error).__name__}: {str(error)[:200]}"
    by_size: dict[int, list[np.ndarray]] = {}
    for value in values:
        by_size.setdefault(value.size, []).append(value.reshape(-1))
    found = [s.tells and any(_same(s.value, v, tolerance) for v in by_size.get(s.value.size, ())) for s in steps]
    reached: set[int] = set()
    for number in reversed(range(len(steps))):
        if found[number] or number in reached:
            reached |= steps[number].reads
    for number, step in enumerate(steps):
        if step.tells and not found[number] and number not in reached:
            return f"they part at {step.layer!r} ({step.operator}), or at what the exporter folded into it"
    return "every layer's output is there when all are written out: onnxruntime's own optimizations change the result"


@dataclass(frozen=True, eq=False)
class _Step:
    """One operator that ran: in which layer, what it gave (nothing of whole numbers), and which steps it read."""

    layer: str
    operator: str
    value: np.ndarray = field(repr=False)
    reads: frozenset[int]

    @property
    def tells(self) -> bool:
        """Whether its values say anything: they are not one number throughout."""
        return self.value.size > 1 and bool(self.value.min() < self.value.max())


class _Recorder(TorchDispatchMode):
    """Writes down every operator."""

    def __init__(self, owners: Mapping[int, str], inputs: Sequence[Tensor], inside: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.owners, self.inside = dict(owners), inside
        self.made: dict[int, frozenset[int]] = {id(x): frozenset() for x in inputs}
        self.alive: list[Tensor] = []  # so that no other tensor is given the same id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        owner = next((self.owners[id(x)] for x in read if id(x) in self.owners), None)
        data = [self.made[id(x)] for x in read if id(x) in self.made]
        for x in _tensors(result):
            self.alive.append(x)
            if owner is not None and not data:  # computed of weights alone, as a transposed one is
                self.owners[id(x)] = owner
                continue
            layer = (self.inside[-1] if self.inside else "") if owner is None else owner
            value = x.detach().float().numpy().reshape(-1).copy() if x.is_floating_point() else np.zeros(0, np.float32)
            self.steps.append(_Step(layer, str(func), value, frozenset().union(*data)))
            self.made[id(x)] = frozenset({len(self.steps) - 1})
        return result


def _recorded(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[_Step]:
    named = [*model.named_parameters(), *model.named_buffers()]
    owners = {id(x): name.rpartition(".")[0] or name for name, x in named}
    with _inside(model) as inside, torch.no_grad():
        recorder = _Recorder(owners, inputs, inside)
        with recorder:
            model(*inputs)
    return recorder.steps


@contextmanager
def _inside(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running now, the innermost last."""
    inside: list[str] = []

    def enters(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leaves(*_: object) -> None:
        inside.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enters(name)), module.register_forward_hook(leaves)]
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


def _values(content: bytes, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    """What every node of an ONNX graph gives."""
    onnx: Any = import_extra("onnx", "onnx")
    model = onnx.load_from_string(content)
    known = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnx_network(model.SerializeToString(), torch.get_num_threads(), as_written=True)
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(inputs):
        raise ConvpareError(f"the file takes {len(names)} inputs, the network {len(inputs)}")
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [value for value in found if isinstance(value, np.ndarray) and value.dtype.kind == "f"]


def _same(mine: np.ndarray, its: np.ndarray, tolerance: float) -> bool:
    allowed = tolerance * float(np.abs(mine).max()) if mine.size else 0.0
    if not bool((np.abs(mine[:FIRST] - its[:FIRST]) <= allowed).all()):
        return False
    return bool((np.abs(mine - its) <= allowed).all())


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [x for item in tree for x in _tensors(item)] if isinstance(tree, list | tuple) else []
