"""The captured graph in the shape that the graph form wants: numbers spelled out, shuffles as positions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from convpare.graph.tracer import operator_name

aten = torch.ops.aten
SPLITS = ("aten.chunk", "aten.split", "aten.unsafe_chunk", "aten.unsafe_split", "aten.tensor_split")
MULTIPLIES = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear")


@dataclass
class Normal:
    """What `normalise` changed.

    Attributes:
        positions: node → the positions that a channel shuffle became.
        folded: parameter → the graph that computes the weight which it now stands for.
    """

    positions: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, Graph] = field(default_factory=dict)


def normalise(program: ExportedProgram) -> Normal:
    """Change the graph of `program` in place, without changing what it computes."""
    found = Normal()
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        name = operator_name(node)
        if name in SPLITS:
            _spell_parts(node)
        elif name in ("aten.view", "aten.reshape", "aten._unsafe_view"):
            _as_positions(program, node, found)
        elif name in MULTIPLIES:
            _fold_weight(program, node, found)
        elif name in ("aten.slice", "aten.narrow", "aten.select"):
            _count_from_the_front(node)
        elif name == "aten.squeeze" and len(node.args) == 1:
            sizes = node.args[0].meta["val"].shape
            node.target = aten.squeeze.dims
            node.args = (node.args[0], [axis for axis, size in enumerate(sizes) if size == 1])
    program.graph.eliminate_dead_code()
    return found


def _spell_parts(node: Node) -> None:
    """`chunk(x, 2)` and `split(x, 32)` become `split_with_sizes(x, [32, 32])`."""
    dim: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    node.target = aten.split_with_sizes.default
    node.args = (node.args[0], [part.shape[dim] for part in node.meta["val"]], dim)
    node.kwargs = {}


def _count_from_the_front(node: Node) -> None:
    """`x[:, -3:]` becomes `x[:, 5:]`: a bound that counts from the end may come to -0, which is the front."""
    args = list(node.args)
    dim: Any = args[1] if len(args) > 1 else 0
    size = args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
    for position in (2,) if operator_name(node) != "aten.slice" else (2, 3):
        bound = args[position] if position < len(args) else None
        if isinstance(bound, int) and bound < 0:
            args[position] = max(0, size + bound)
    node.args = tuple(args)


def _as_positions(program: ExportedProgram, first: Node, found: Normal) -> None:
    """view (B, g, c, …), transpose, view (B, C, …) becomes one `index_select` of the channels."""
    chain = [first]
    while len(chain) < 4 and len(chain[-1].users) == 1:
        chain.append(next(iter(chain[-1].users)))
        if operator_name(chain[-1]) in ("aten.contiguous", "aten.clone"):
            continue
        if len(chain) > 2:
            break
    source, last = first.args[0], chain[-1]
    if not isinstance(source, Node) or len(chain) < 3 or not _is_shuffle(source, first, chain[1], last):
        return
    groups = first.meta["val"].shape[1]
    channels = source.meta["val"].shape[1]
    order = torch.arange(channels).reshape(groups, -1).t().reshape(-1)
    name = f"channel_shuffle_{len(found.positions)}"
    program.graph_module.register_buffer(name, order)
    with program.graph.inserting_before(last):
        positions = program.graph.get_attr(name)
        picked = program.graph.call_function(aten.index_select.default, (source, 1, positions))
    positions.meta["val"], picked.meta = order, dict(last.meta)
    last.replace_all_uses_with(picked)
    found.positions[positions.name] = order


def _is_shuffle(source: Node, first: Node, swap: Node, last: Node) -> bool:
    if operator_name(last) not in ("aten.view", "aten.reshape", "aten._unsafe_view"):
        return False
    if operator_name(swap) != "aten.transpose" or sorted(swap.args[1:]) != [1, 2]:  # type: ignore[type-var]
        return False
    before, split, after = (tuple(n.meta["val"].shape) for n in (source, first, last))
    return len(before) >= 2 and before == after and split == (before[0], split[1], before[1] // split[1], *before[2:])


def _fold_weight(program: ExportedProgram, node: Node, found: Normal) -> None:
    """A weight that is computed from parameters alone (standardised, reparametrised) becomes a plain parameter."""
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op != "call_function":
        return
    origin = _origin(weight)
    sources = [n for n in origin if not n.all_input_nodes]
    known = program.graph_signature.inputs_to_parameters
    if any(s.op == "placeholder" and s.name not in known and not _is_state(program, s) for s in sources):
        return
    alike = [s for s in sources if s.name in known and s.meta["val"].shape == weight.meta["val"].shape]
    if len(alike) == 1 and set(alike[0].users) <= origin and len(weight.users) == 1:
        found.folded[known[alike[0].name]] = _copied(program, origin, weight)
        node.args = (node.args[0], alike[0], *node.args[2:])


def _is_state(program: ExportedProgram, node: Node) -> bool:
    signature = program.graph_signature
    return node.name in signature.inputs_to_buffers or node.name in signature.inputs_to_lifted_tensor_constants


def _origin(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return seen


def _copied(program: ExportedProgram, nodes: set[Node], last: Node) -> Graph:
    """A graph of these nodes alone, in their order."""
    graph = Graph()
    known: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if node in nodes:
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(known[last])
    return graph
