"""Numbers in a forward: a trial surgery tells whether the module's own forward follows the channels."""

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from convpare.errors import ConvpareError
from convpare.graph.flow import module_of
from convpare.graph.grouping import assemble
from convpare.graph.labels import Value
from convpare.graph.links import fed, replayed
from convpare.graph.mending import own, synced
from convpare.graph.parts import recapture
from convpare.graph.record import Record
from convpare.graph.rewriting import by_node, rewritten
from convpare.graph.rules.registry import aten
from convpare.graph.structure import Call, Graph, Group
from convpare.graph.surgery import remove_
from convpare.graph.tracer import Spelled, operator_name
from convpare.graph.units import staying

Site = tuple[str, ...]
KINDS = 8  # trials of channels of one kind, at most
AXES = frozenset(
    aten("""flatten mean sum amax amin argmax cat stack softmax log_softmax permute transpose t squeeze unsqueeze
    dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool2d hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ gelu""")
)  # whose numbers are axes, windows and constants
ELIDED = ("aten.contiguous",)  # what the capture leaves out where it does nothing
FOLLOWS_NOT = "takes a number from its forward that does not follow them"


def settled(model: nn.Module, record: Record) -> Graph:
    """The graph of a module that keeps its forward: channels stay where a number in the forward would become wrong.

    A forward that computes its numbers from `x.shape`, or takes them from attributes that surgery mends, survives a
    trial removal; one with the numbers written out raises, or comes to other shapes or numbers than foretold. The line
    where it does is found, its channels are frozen, and the trial is repeated.
    """
    graph = assemble(record)
    sites = _sites(record)
    linked = any(call.links for call in record.calls)
    numbers = any(_may_have_counted(record, node) for node in record.values)
    if not sites and not linked and not any(record.constants) and not numbers:
        return graph
    graph = _follow(model, record, graph, sites, marked=False)
    return _follow(model, record, graph, sites, marked=True) if any(g.inexact for g in graph.groups) else graph


def _follow(
    model: nn.Module,
    record: Record,
    graph: Graph,
    sites: dict[Site, list[Spelled]],
    marked: bool,
) -> Graph:
    """Freeze what the forward does not follow, among the exact groups alone or also those that are marked inexact."""
    while groups := [g for g in graph.groups if marked or not g.inexact]:
        trial = Trial(model, graph, record)
        found = trial.failure(groups)
        if found is None:
            break
        wrong: set[Site] = set()
        if not marked:  # the line where it failed; where that spells no number, the lines that fail by themselves
            wrong = found & set(sites) or {s for s in sites if trial.wrong(trial.touched(sites[s])) is not None}
        for site in [s for s in sites if s in wrong]:
            for spelled in sites.pop(site):
                labels = spelled.labels if trial.touched([spelled], counted=True) else spelled.whole
                record.labels.freeze(labels, _reason([spelled]))
        if not wrong:
            reason = _reason([s for s in record.spelled if s.site in found])
            suspected = [g for g in groups if g.inexact] if marked else groups
            for group in trial.failing(suspected) or suspected:
                record.labels.freeze(trial.labels_of(group), reason)
        graph = assemble(record)
    return graph


def _may_have_counted(record: Record, node: Node) -> bool:
    """Whether an operator takes a number that the forward may have computed from a number of channels."""
    if operator_name(node) in AXES or not _numbers([node.args, node.kwargs]):
        return False
    module = record.modules.get(module_of(node))
    return module is None or not own(module)


def _reason(spelled: Sequence[Spelled]) -> str:
    where = spelled[0].where if spelled else "a line that counts nothing itself"
    return f"{where} {FOLLOWS_NOT}"


def _sites(record: Record) -> dict[Site, list[Spelled]]:
    """The lines of forwards that spell out numbers of channels; PyTorch's own layers are kept true by their shapes."""
    sites: dict[Site, list[Spelled]] = {}
    for spelled in record.spelled:
        module = record.modules.get(spelled.modules[-1]) if spelled.modules else None
        if module is None or not synced(module) or not own(module):
            sites.setdefault(spelled.site, []).append(spelled)
    return sites


class Trial:
    """Some channels of every group less."""

    def __init__(self, model: nn.Module, graph: Graph, record: Record) -> None:
        self.model, self.graph, self.record = model, graph, record
        self.rewrites = by_node(graph.rewrites)
        self.classes = record.labels.classes()
        self.unit_of = np.full(len(self.classes), -1)
        for (name, axis), units in graph.units.items():
            start = record.slots[name, axis]
            self.unit_of[self.classes[start : start + len(units)]] = units
        random = np.random.default_rng(0).integers(1, 2**63, len(graph.rewrites), dtype=np.uint64)
        self.kinds = np.zeros(graph.channels, np.uint64)  # a sum of random numbers, one for each that counts a channel
        for number, rewrite in zip(random, graph.rewrites, strict=True):
            np.add.at(self.kinds, rewrite.count.units[rewrite.count.units >= 0], number)

    def touched(self, spelled: Sequence[Spelled], counted: bool = False) -> list[Group]:
        """The groups that lie on the axes of which these numbers speak, or those that the numbers count."""
        labels = torch.cat([s.labels if counted else s.whole for s in spelled])
        units = self.unit_of[self.classes[labels.numpy()]]
        starts = [g.start for g in self.graph.groups]
        hit = np.unique(np.searchsorted(starts, units[units >= 0], side="right") - 1)
        return [self.graph.groups[i] for i in hit.tolist()]

    def labels_of(self, group: Group) -> Tensor:
        """A label of every channel of a group."""
        units = self.unit_of[self.classes]
        return torch.from_numpy(np.flatnonzero((units >= group.start) & (units < group.start + group.channels)))

    def failing(self, groups: Sequence[Group], trials: int = 32) -> list[Group]:
        """Those of `groups` that the forward does not follow, by halving; with no trials left, whole halves."""
        if self.failure(groups) is None:
            return []
        if len(groups) == 1 or trials < 2:
            return list(groups)
        half = len(groups) // 2
        parts = (groups[:half], groups[half:])
        return [g for part in parts for g in self.failing(part, trials // 2 - 1)] or list(groups)

    def failure(self, groups: Sequence[Group]) -> set[Site] | None:
        """As `wrong`, of several trials that leave no number to chance.

        Each group loses some and once nearly all: half of an odd number is that of the even one below. Any two groups
        of as many channels once lose differently many: a number that counts the one may stand for the other. And
        channels of one kind go alone, those that are counted by the same numbers: what counts some of a group may stand
        for as many others of it.
        """
        for some, choose in ((groups, None), (groups[::2], self._most), (groups[1::2], self._most)):
            if (found := self.wrong(some, choose)) is not None:
                return found
        lost = [(group.channels, len(self._some(group)), n % 2) for n, group in enumerate(groups)]
        for bit in range(1, len(groups).bit_length()):
            sides = [n >> bit & 1 for n in range(len(groups))]
            if len(set(zip(lost, sides, strict=True))) > len(set(lost)):
                lost = list(zip(lost, sides, strict=True))  # type: ignore[arg-type]
                half = [g for g, side in zip(groups, sides, strict=True) if side]
                if (found := self.wrong(half, self._most)) is not None:
                    return found
        mixed = [g for g in groups if len(self._kinds(g)) > 1]
        for number in range(min(KINDS, max((len(self._kinds(g)) for g in mixed), default=0))):
            if (found := self.wrong(mixed, partial(self._of_kind, number))) is not None:
                return found
        return None

    def wrong(self, groups: Sequence[Group], choose: Callable[[Group], np.ndarray] | None = None) -> set[Site] | None:
        """None if the forward follows when some channels of each of `groups` go, else the lines where it did not.

        The set is empty where the failure shows only later, in a line that spells no number.
        """
        if not groups:
            return None
        keep = self.graph.keep_all()
        for group in groups:
            keep[group.start + (choose or self._some)(group)] = False
        self._touch_every_number(groups, keep)
        stays = torch.from_numpy(staying(self.unit_of, keep)[self.classes])
        try:
            calls = self._narrowed(stays)
            programs = _captured(self.model, calls, lambda trial: remove_(trial, self.graph, keep))
        except ConvpareError as error:  # whatever the user's forward raises when a size no longer fits
            return self._lines_of(error)
        if not all(map(_same_constants, programs, self.record.constants)):
            return set()
        return self._compare([node for program in programs for node in program.graph.nodes], keep, stays)

    def _some(self, group: Group) -> np.ndarray:
        """Any channels; of groups with as many channels, as far as can be, of each another number."""
        alike = [g.start for g in self.graph.groups if g.channels == group.channels]
        most = max(1, min(len(self._most(group)), group.channels // 2))
        return self._any(
            group, min(1 + (alike.index(group.start) + group.channels // 4) % most, len(self._most(group)))
        )

    def _most(self, group: Group) -> np.ndarray:
        """All channels but those that must stay; of two that count each other one, of one channel none."""
        return self._any(group, max(group.channels - group.least, min(group.channels - 1, 1)))

    def _any(self, group: Group, count: int) -> np.ndarray:
        return np.random.default_rng(group.start).choice(group.channels, count, replace=False)

    def _kinds(self, group: Group) -> list[np.ndarray]:
        """The channels of a group, apart by the numbers that count them, and how often."""
        kinds = self.kinds[group.units]
        return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]

    def _of_kind(self, number: int, group: Group) -> np.ndarray:
        kinds = self._kinds(group)
        chosen = kinds[number % len(kinds)]
        return chosen[: max(1, len(chosen) // 2)]

    def _narrowed(self, stays: Tensor) -> Sequence[Call]:
        """The calls of the parts, what they hand to each other in its new shape, which what lies between must bear."""
        record = self.record
        linked = {made for call in record.calls for made in call.links.values()}
        if record.recording is None or not linked:
            return record.calls
        shapes = {made: _foretold(record.outputs[made], stays) for made in linked}
        if replayed(self.model, record.recording, shapes) != [dict(call.links) for call in record.calls]:
            raise ConvpareError(f"{type(self.model).__name__} hands other tensors from part to part")
        made = [
            [x.new_empty(shapes[n, i]) if (n, i) in shapes else None for i, x in enumerate(tree_leaves(out))]
            for n, out in enumerate(record.recording.made)
        ]
        return [fed(call, made) for call in record.calls]

    def _touch_every_number(self, groups: Sequence[Group], keep: np.ndarray) -> None:
        """Of the channels that each number counts let one go at least, where its group keeps another."""
        tried = np.zeros(len(keep), bool)
        for group in groups:
            tried[group.units] = group.channels > 1
        starts = [g.start for g in self.graph.groups]
        for rewrite in self.graph.rewrites:
            units = rewrite.count.units[rewrite.count.units >= 0]
            units = units[tried[units]]
            if len(units) and keep[units].all():
                group = self.graph.groups[int(np.searchsorted(starts, units[0], side="right")) - 1]
                if keep[group.units].sum() > 1:
                    keep[units[0]] = False

    def _lines_of(self, error: ConvpareError) -> set[Site]:
        cause: BaseException = error.__cause__ or error
        sites = {s.site[0]: s.site for s in self.record.spelled}
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            line = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
            if line in sites:
                return {s.site for s in self.record.spelled if s.site[0] == line}
        return set()

    def _compare(self, nodes: list[Node], keep: np.ndarray, stays: Tensor) -> set[Site] | None:
        nodes = [node for node in nodes if operator_name(node) not in ELIDED]
        known = {dense: value for dense, value in self.record.values.items() if operator_name(dense) not in ELIDED}
        if len(nodes) != len(known):
            return set()
        for node, (dense, value) in zip(nodes, known.items(), strict=True):
            known_as = self.record.name_of(dense)
            args, kwargs = rewritten(dense.args, dense.kwargs, self.rewrites.get(known_as, ()), keep)
            same = operator_name(node) == operator_name(dense)
            same = same and _numbers(_filled(dense, args, kwargs)) == _numbers(_filled(node, node.args, node.kwargs))
            if not same or not _as_foretold(node.meta.get("val"), value, stays):
                return {s.site for s in self.record.spelled if s.node is dense}
        return None


def _captured(model: nn.Module, calls: Sequence[Call], change: Callable[[nn.Module], None]) -> list[ExportedProgram]:
    """The parts of a changed copy of the model; the copy has zeros for weights, which take no room until it changes."""
    trial = copy.deepcopy(model, {id(x): _empty(x) for x in [*model.parameters(), *model.buffers()]})
    change(trial)
    return recapture(trial, calls)


def _empty(x: Tensor) -> Tensor:
    zeros = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    return nn.Parameter(zeros, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else zeros


def _same_constants(program: ExportedProgram, known: Mapping[str, Tensor]) -> bool:
    """Whether the tensors that the forward wrote into the graph are as before (`torch.tensor(x.shape[1])` is not)."""
    names = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    return all(name in known and torch.equal(program.constants[name], known[name]) for name in names)


def _filled(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """All arguments of an operator in the order of its schema, defaults too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*args, *kwargs.values()]
    given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | dict(kwargs)
    return [given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments]


def _numbers(tree: Any) -> list[Any]:
    """The numbers in the arguments of a node, those that stand for "to the end" apart."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _numbers(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _numbers(item)]
    return [tree] if isinstance(tree, int | float) else []


def _as_foretold(result: Any, value: Any, stays: Tensor) -> bool:
    """Whether a tensor of the smaller net has the shape that the labels of the whole one foretell."""
    if isinstance(result, list | tuple):
        return all(_as_foretold(r, v, stays) for r, v in zip(result, value, strict=True))
    if not isinstance(result, Tensor) or not isinstance(value, Value):
        return True
    return _foretold(value, stays) == tuple(result.shape)


def _foretold(value: Value, stays: Tensor) -> tuple[int, ...]:
    """The shape of a tensor in the smaller net."""
    shape = list(value.shape)
    for axis in range(value.ndim):
        rows = [stays[f].movedim(axis, 0).reshape(f.shape[axis], -1).any(1) for f in value.on(axis)]
        if rows:  # several kinds of channels on one axis: an element stays if each of its channels does
            shape[axis] = int(torch.stack(rows).all(0).sum())
    return tuple(shape)
