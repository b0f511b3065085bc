"""Capture a model once, without touching its weights, its mode or its random state."""

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from convpare.errors import ConvpareError
from convpare.modes import eval_mode

Inputs = Tensor | tuple[Tensor, ...]


class CannotCapture(ConvpareError):  # noqa: N818 - what cannot be captured is no error of the model
    """The model runs, but `torch.export` cannot follow its forward."""


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
        CannotCapture: `torch.export` cannot follow its forward.
        ConvpareError: the model cannot run on these inputs.
    """
    return capture_call(model, as_args(example_inputs), {})


def capture_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """As `capture`, of a call with any arguments that `torch.export` knows."""
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]), quiet_export():
        try:
            program = torch.export.export(model, args, dict(kwargs), strict=False)
        except Exception as error:  # torch.export raises many types; each becomes one clear message
            raise _explain(model, args, kwargs, error) from error
    for node in [n for n in program.graph.nodes if isinstance(n.target, HigherOrderOperator)]:
        _inline(program, node)
    return program


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> ConvpareError:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    try:
        model(*args, **kwargs)
    except Exception as own:  # the user's own forward may raise anything
        return ConvpareError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {_first_line(own)}. "
            "Give example inputs of the shape that it expects (--input on the command line)."
        )
    return CannotCapture(
        f"{type(model).__name__} runs on inputs of shape {shapes}, but torch.export cannot capture it: "
        f"{_first_line(error)}. Forwards that branch on tensor values can't be captured."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:400]


@contextmanager
def quiet_export() -> Iterator[None]:
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


def _inline(program: ExportedProgram, node: Node) -> None:
    """A block that runs without autocast or without gradients is its operators, one by one."""
    name = cast(HigherOrderOperator, node.target).name()
    at = next((n for n, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr"), None)
    switched_on = "autocast" in name and node.args[2]
    if at is None or switched_on or not name.startswith("wrap_with"):
        return
    block = getattr(program.graph_module, str(cast(Node, node.args[at]).target)).graph
    known: dict[Node, Any] = dict(
        zip([n for n in block.nodes if n.op == "placeholder"], node.args[at + 1 :], strict=True)
    )
    with program.graph.inserting_before(node):
        for inner in block.nodes:
            if inner.op == "call_function":
                known[inner] = program.graph.node_copy(inner, known.__getitem__)
            elif inner.op == "output":
                results = map_arg(inner.args[0], known.__getitem__)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        program.graph.erase_node(user)
    program.graph.erase_node(node)
