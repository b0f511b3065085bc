"""The graph form: the captured graph with its numbers rewritten, as a module that needs no other code.

Numbers that follow the batch are taken from the input, so that it serves batches of any size; sizes of images that the
forward wrote into the graph stay as they were captured.

Batch norm and dropout are PyTorch's own modules, so that they know training from evaluation; everything else is the
operators that were captured in evaluation mode. Parameters and buffers keep their names.
"""

import itertools
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from convpare.errors import ConvpareError
from convpare.graph.rewriting import by_node, replaced, rewritten
from convpare.graph.structure import Graph, Path
from convpare.graph.tracer import operator_name

BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten")
DROPOUTS: dict[str, type[nn.Module]] = {
    "aten.dropout": nn.Dropout, "aten.dropout_": nn.Dropout, "aten.alpha_dropout": nn.AlphaDropout,
    "aten.feature_dropout": nn.Dropout2d, "aten.feature_dropout_": nn.Dropout2d,
}  # fmt: skip


def graph_module(model: nn.Module, graph: Graph, keep: np.ndarray) -> fx.GraphModule:
    """The captured graph of `model` without the channels that the mask `keep` (channels,) drops."""
    if graph.program is None:
        raise ConvpareError(f"the trace of {graph.model} holds no captured graph; trace it with form='graph'")
    return _Builder(model, graph, keep, graph.program).build()


class _Builder:
    """Copies the graph node by node."""

    def __init__(self, model: nn.Module, graph: Graph, keep: np.ndarray, program: ExportedProgram) -> None:
        self.model, self.graph, self.keep, self.program = model, graph, keep, program
        self.rewrites = by_node(graph.rewrites)
        self.shuffles = {s.node: s for s in graph.shuffles}
        self.root, self.new = nn.Module(), fx.Graph()
        self.known: dict[Node, Node] = {}
        signature = program.graph_signature
        state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names = {node: graph.aliases.get(name, name) for node, name in state.items()}
        self.constants = signature.inputs_to_lifted_tensor_constants
        self.batch: Node | None = None
        self.batched: dict[str, list[Path]] = defaultdict(list)
        for name, path in graph.batched:
            self.batched[name].append(path)

    def build(self) -> fx.GraphModule:
        weights = _folded(self.model, self.graph)
        for name, shape in self.graph.shapes.items():
            tensor = weights.get(name, _get(self.model, name))
            for axis in range(len(shape)):
                kept = self.graph.kept((name, axis), self.keep)
                if len(kept) < shape[axis]:
                    tensor = tensor.detach().index_select(axis, torch.as_tensor(kept, device=tensor.device))
            put(self.root, name, _like(tensor, _get(self.model, name)))
        for node in self.program.graph.nodes:
            made = getattr(self, f"_{node.op}")(node)
            if made is not None:
                self.known[node] = made
        small = fx.GraphModule(self.root, self.new, class_name=type(self.model).__name__)
        small.train(self.model.training)
        for name, module in small.named_modules():  # each batch norm in the mode that it was in
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(self.model.get_submodule(name).training)
        return small

    def _placeholder(self, node: Node) -> Node | None:
        if node.name in self.names:
            return self.new.get_attr(self.names[node.name]) if node.users else None
        if node.name in self.constants:
            name = node.name
            self.root.register_buffer(name, self.program.constants[self.constants[node.name]].detach().clone())
            return self.new.get_attr(name)
        return self.new.placeholder(node.name)

    def _get_attr(self, node: Node) -> Node | None:
        held = getattr(self.program.graph_module, str(node.target))
        if not isinstance(held, Tensor):  # a block of operators, which whoever runs it refuses
            return None
        positions = held.detach().clone()
        if node.name in self.shuffles:
            positions = torch.from_numpy(self.shuffles[node.name](self.keep)).to(positions.device)
        self.root.register_buffer(str(node.target), positions)
        return self.new.get_attr(str(node.target))

    def _call_function(self, node: Node) -> Node | None:
        name = operator_name(node)
        if name == "aten._assert_tensor_metadata":
            return None
        if name == "aten.batch_norm" and (owner := self._norm(node)) is not None:
            return self.new.call_module(owner, (self.known[node.args[0]],))  # type: ignore[index]
        if isinstance(node.target, HigherOrderOperator):
            raise ConvpareError(
                f"{self.graph.model} runs a block of operators under {name}, which the graph form cannot hold; "
                "take the module form"
            )
        if name in DROPOUTS and node.args[2] is False:
            return self._dropout(node, DROPOUTS[name])
        args, kwargs = rewritten(node.args, node.kwargs, self.rewrites.get(node.name, ()), self.keep)
        for path in self.batched.get(node.name, ()):
            args, kwargs = replaced(args, kwargs, path, self._batch)
        if name in RESHAPES:
            args = self._closed(node, args)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: self._device(), (args, kwargs))
        new = map_arg((args, kwargs), lambda n: self.known.get(n, n))
        return self.new.call_function(node.target, *new)  # type: ignore[arg-type]

    def _closed(self, node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the size in place of a -1 where another is 0, as when all channels of a part go; -1 is then unknown."""
        at = 2 if operator_name(node) == "aten.unflatten" else 1
        sizes = list(args[at])
        if not any(type(size) is int and size == 0 for size in sizes) or -1 not in sizes:
            return args
        shape, open_ = node.meta["val"].shape, sizes.index(-1)
        axis = open_ + (int(args[1]) % (len(shape) - len(sizes) + 1) if at == 2 else 0)
        batched = axis == 0 and self.batched and shape[0] % self.graph.inputs[0][0] == 0
        sizes[open_] = self._batch(shape[0]) if batched else shape[axis]
        return (*args[:at], sizes, *args[at + 1 :])

    def _device(self) -> Node:
        """Where a forward makes tensors, it makes them beside its input."""
        return self.new.call_function(getattr, (self._input(), "device"))

    def _batch(self, number: int) -> Node:
        """A multiple of the size of the batch."""
        if self.batch is None:
            self.batch = self.new.call_function(torch.ops.aten.sym_size.int, (self._input(), 0))
        times = number // self.graph.inputs[0][0]
        return self.batch if times == 1 else self.new.call_function(operator.mul, (self.batch, times))

    def _input(self) -> Node:
        return cast(Node, next(n for n in self.new.nodes if n.op == "placeholder"))

    def _norm(self, node: Node) -> str | None:
        """The name of a batch norm with statistics of its own, made from the parameters that stand in the graph."""
        x, weight, bias, mean, variance, training, momentum, eps, *_ = node.args
        parts = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
        names = {key: self.names.get(n.name) if isinstance(n, Node) else None for key, n in parts.items()}
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inner = str(stack[-1][0]).partition("@")[0] if stack else ""
        named = (names["running_mean"] or "").rpartition(".")[0]
        holds = [o for o in dict.fromkeys((inner, named)) if o and self._holds(o, names)]
        if training or names["running_mean"] is None or not holds:
            return None
        owner = holds[0]
        if not isinstance(self.root.get_submodule(owner), nn.modules.batchnorm._BatchNorm):
            self._make_norm(owner, x.meta["val"].ndim, names, eps, momentum)  # type: ignore[union-attr]
        return owner

    def _holds(self, owner: str, names: Mapping[str, str | None]) -> bool:
        """Whether these tensors are the module's own, under the names that a batch norm gives them."""
        own = {key: f"{owner}.{key}" for key in names}
        return all(name is None or self.graph.aliases.get(own[key], own[key]) == name for key, name in names.items())

    def _make_norm(self, owner: str, ndim: int, names: Mapping[str, str | None], eps: Any, momentum: Any) -> None:
        original = self.model.get_submodule(owner)
        tensors = {key: _get(self.root, name) for key, name in names.items() if name is not None}
        momentum = getattr(original, "momentum", momentum)
        norm = BATCH_NORMS[ndim](len(tensors["running_mean"]), eps, momentum, "weight" in tensors)
        counter = original._buffers.get("num_batches_tracked")
        if counter is not None:
            norm.num_batches_tracked = counter.detach().clone()
        for key, tensor in tensors.items():
            holder: dict[str, Any] = norm._parameters if isinstance(tensor, nn.Parameter) else norm._buffers
            holder[key] = tensor
        put_module(self.root, owner, norm)

    def _dropout(self, node: Node, kind: type[nn.Module]) -> Node:
        x, p = node.args[:2]
        taken = set(self.model._modules) | set(self.root._modules) | set(self.model._parameters)
        name = next(f"dropout_{n}" for n in itertools.count() if f"dropout_{n}" not in taken)
        self.root.add_module(name, kind(p))
        return self.new.call_module(name, (self.known[x],))  # type: ignore[index]

    def _output(self, node: Node) -> Node:
        flat = map_arg(list(node.args[0]), self.known.__getitem__)  # type: ignore[arg-type]
        spec = self.program.call_spec.out_spec
        return cast(Node, self.new.output(_plain(pytree.tree_unflatten(flat, spec))))


def _folded(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The weights that parameters stand for once they are folded (`normalise`), computed now."""
    program = graph.program
    assert program is not None
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants

    def compute(formula: fx.Graph) -> Tensor:
        known: dict[Node, Any] = {}
        for node in formula.nodes:
            if node.op == "placeholder":
                name = str(node.target)
                known[node] = _get(model, names[name]) if name in names else program.constants[lifted[name]]
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            else:
                return cast(Tensor, known[cast(Node, node.args[0])]).detach()
        raise AssertionError("a graph without an output")

    with torch.no_grad():
        return {name: compute(formula) for name, formula in graph.folded.items()}


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    assert isinstance(found, Tensor)
    return found


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(fresh, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else fresh


def put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Hang a parameter or buffer into a tree of plain modules, which grows as needed."""
    *path, last = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Hang a module into such a tree; what hung below that name stays below it."""
    parent, _, last = name.rpartition(".")
    owner = root
    for part in parent.split(".") if parent else ():
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if last in owner._modules:
        module._modules.update(owner.get_submodule(last)._modules)
    owner.add_module(last, module)


def _plain(tree: Any) -> Any:
    """The outputs in dicts, lists and tuples, which a graph can hold."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_plain(v) for v in tree) if type(tree) in (list, tuple) else tuple(_plain(v) for v in tree)
    return tree
