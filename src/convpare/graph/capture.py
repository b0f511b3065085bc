"""Capture a model once, without touching its weights, its mode or its random state."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from convpare.errors import ConvpareError
from convpare.modes import eval_mode

Inputs = Tensor | tuple[Any, ...]


def as_args(example_inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments of a forward call: a tensor alone stands for a tuple of one."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, tuple) and any(isinstance(x, Tensor) for x in example_inputs):
        return example_inputs
    raise ConvpareError(
        f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, or a tuple of the forward's "
        "positional arguments with at least one tensor in it"
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


def _explain(model: nn.Module, args: tuple[Any, ...], error: Exception) -> ConvpareError:
    shapes = ", ".join(str(tuple(x.shape)) for x in args if isinstance(x, Tensor))
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
    """torch.export logs a failing draft of the graph at error level before it raises; the exception says enough."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
