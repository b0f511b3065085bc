"""Capture a model once, without touching its weights, its mode or its random state."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from convpare.errors import ConvpareError
from convpare.modes import eval_mode

Inputs = Tensor | tuple[Tensor, ...]


def as_args(example_inputs: Inputs) -> tuple[Tensor, ...]:
    """The positional arguments of a forward call: a tensor alone stands for a tuple of one."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, tuple) and example_inputs and all(isinstance(x, Tensor) for x in example_inputs):
        return example_inputs
    given = type(example_inputs).__name__
    if isinstance(example_inputs, tuple):
        given += f" of {', '.join(type(x).__name__ for x in example_inputs) or 'nothing'}"
    raise ConvpareError(
        f"example_inputs is a {given}; expected a tensor, or a tuple of tensors, the forward's positional arguments. "
        "A forward that takes anything else must be wrapped in a module whose forward takes tensors alone."
    )


def capture(model: nn.Module, example_inputs: Inputs) -> ExportedProgram:
    """The operators that `model` runs in evaluation mode, by `torch.export` on fake tensors.

    No weight is read, no gradient or data is needed; the model's training flags and the random state are as before.

    Raises:
        ConvpareError: the model cannot run on these inputs, or `torch.export` cannot follow its forward.
    """
    args = as_args(example_inputs)
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]), _quiet_export():
        try:
            return torch.export.export(model, args, strict=False)
        except Exception as error:  # torch.export raises many types; each becomes one clear message
            raise _explain(model, args, error) from error


def _explain(model: nn.Module, args: tuple[Tensor, ...], error: Exception) -> ConvpareError:
    shapes = ", ".join(str(tuple(x.shape)) for x in args)
    try:
        model(*args)
    except Exception as own:  # the user's own forward may raise anything
        return ConvpareError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {_first_line(own)}. "
            "Give example inputs of the shape that it expects (--input on the command line)."
        )
    return ConvpareError(
        f"{type(model).__name__} runs on inputs of shape {shapes}, but torch.export cannot capture it: "
        f"{_first_line(error)}. Forwards that branch on tensor values can't be captured as a whole; "
        "trace the submodules that can."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:400]


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch logs and prints the draft of a graph that fails before it raises; the exception says enough."""
    names = ("torch.export", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
