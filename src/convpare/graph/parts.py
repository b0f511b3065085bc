"""What was captured of a model: the whole, or where that cannot be, the largest submodules that can."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from convpare.errors import ConvpareError
from convpare.graph.capture import CannotCapture, capture, capture_call
from convpare.graph.links import Recording, linked
from convpare.graph.structure import Call
from convpare.modes import eval_mode


@dataclass(frozen=True)
class Part:
    """One call of a submodule (the whole model has the name "") and the operators that it ran."""

    call: Call
    program: ExportedProgram


@dataclass
class Seen:
    """A call of a module during a run of the model, and what it returned."""

    call: Call
    made: Any = None


@dataclass
class Watched:
    """What a run of the model showed: the calls of its modules, where its parameters were read, and the result."""

    calls: list[Seen]
    reads: list[tuple[str, tuple[str, ...]]]
    result: Any = None


@dataclass(frozen=True)
class Captured:
    """The parts in the order of their calls; if they are not the whole, what runs around them and what it reads."""

    parts: tuple[Part, ...]
    recording: Recording | None = None
    outside: tuple[str, ...] = ()  # parameters and buffers


def capture_parts(model: nn.Module, args: tuple[Tensor, ...], link: bool = False) -> Captured:
    """Capture the model, or where that cannot be its largest submodules that can.

    Where the model cannot be captured as a whole it is run once on `args`, as it stands, to see what its submodules are
    given; each that `torch.export` can follow is captured for every call, the others give way to their submodules. With
    `link`, what the parts hand to each other is found by `linked`.

    Raises:
        ConvpareError: the model does not run on these inputs, or nothing of it can be captured.
    """
    try:
        return Captured((Part(Call("", args, {}), capture(model, args)),))
    except CannotCapture as error:
        seen = _watched(model, args)
        parts = _largest(model, "", seen.calls)
        if not parts:
            raise ConvpareError(f"{error} None of its submodules can be captured either.") from error
    program = {id(part.call): part.program for part in parts}
    ran = [s for s in seen.calls if id(s.call) in program]
    recording = Recording(args, tuple(s.call for s in ran), tuple(s.made for s in ran), seen.result)
    calls = linked(model, recording) if link else recording.calls
    inside = {call.name for call in calls}
    return Captured(
        tuple(Part(call, program[id(s.call)]) for call, s in zip(calls, ran, strict=True)),
        replace(recording, calls=calls),
        tuple(sorted({name for name, within in seen.reads if not inside & set(within)})),
    )


def recapture(model: nn.Module, calls: Sequence[Call]) -> list[ExportedProgram]:
    """The same parts of a changed copy of the model."""
    return [capture_call(model.get_submodule(call.name), call.args, call.kwargs) for call in calls]


def _largest(module: nn.Module, name: str, seen: Sequence[Seen]) -> list[Part]:
    parts: list[Part] = []
    for child, submodule in module.named_children():
        path = f"{name}.{child}" if name else child
        calls = [s.call for s in seen if s.call.name == path]
        if not any(True for _ in submodule.parameters()):
            continue
        try:
            found = [Part(call, capture_call(submodule, call.args, call.kwargs)) for call in calls]
        except ConvpareError:
            found = []
        parts += found or _largest(submodule, path, seen)
    return parts


class _Reads(TorchFunctionMode):
    """Notes which of the model's tensors every function is given, and inside of which modules."""

    def __init__(self, model: nn.Module, running: list[str], reads: list[tuple[str, tuple[str, ...]]]) -> None:
        super().__init__()
        self.names = {id(x): name for name, x in [*model.named_parameters(), *model.named_buffers()]}
        self.running, self.reads = running, reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if id(x) in self.names:
                self.reads.append((self.names[id(x)], tuple(self.running)))
        return func(*args, **(kwargs or {}))


def _watched(model: nn.Module, args: tuple[Tensor, ...]) -> Watched:
    seen, running, entered = Watched([], []), cast(list[str], []), cast(list[Seen], [])
    handles = []

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            running.append(name)
            entered.append(Seen(Call(name, args, dict(kwargs))))
            seen.calls.append(entered[-1])

        return hook

    def leave(_: nn.Module, args: Any, made: Any) -> None:
        running.pop()
        entered.pop().made = made

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]), _Reads(model, running, seen.reads):
            seen.result = model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def hollow(call: Call) -> Call:
    """The same call without the values of its tensors, except those of whole numbers."""

    def emptied(x: Tensor) -> Tensor:
        return x.to("meta") if x.is_floating_point() else x

    args, kwargs = tree_map_only(Tensor, emptied, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def noise(call: Call, generator: torch.Generator, device: torch.device) -> Call:
    """The same call on normal noise in float64; tensors of whole numbers as they were.

    Where a part was given an empty tensor (a head that found nothing in the picture), it has one element here.
    """

    def drawn(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        shape = [max(size, 1) for size in x.shape]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    args, kwargs = tree_map_only(Tensor, drawn, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)
