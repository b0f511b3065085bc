"""The plan: pure data, what to remove and what it will cost. It prints as a table, is JSON, and can be edited."""

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from convpare.errors import ConvpareError
from convpare.factorize.edit import Factorize
from convpare.factorize.forms import get_form
from convpare.graph.merging import Merge
from convpare.graph.structure import FORMS, Form, Graph
from convpare.notebook import html_table, html_text
from convpare.planning.cost import Cost, chain_cost, layer_cost, planned_cost, total_cost
from convpare.planning.memory import peak_memory

SCHEMA = 1
SHOWN = 5  # differences between two networks that a message names


@dataclass(frozen=True)
class RemoveChannels:
    """Keep these channels of a group and remove the others, everywhere.

    `error` is what the criterion says of the removed ones: its scores summed (QSFM: their similarity), with
    reconstruction and sensitivity on the scale of the errors of factorizations.
    """

    group: str
    keep: tuple[int, ...]
    channels: int
    error: float | None = None

    @property
    def removed(self) -> int:
        return self.channels - len(self.keep)

    def to_json(self) -> dict[str, Any]:
        return {"edit": "remove_channels", "group": self.group, "channels": self.channels,
                "keep": list(self.keep), "error": self.error}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A list of edits with the budget that was asked for and the cost that they lead to.

    `requested` has the budgets as fractions of `before`; `after` is exact, not an estimate. `merges` are expansions
    that the layers after them take in; they come first, and the other edits are of the network that they leave.
    `factorizations` come last: of layers as removals leave them.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    criterion: str
    options: Mapping[str, Any]
    requested: Mapping[str, float]
    before: Cost
    after: Cost
    edits: tuple[RemoveChannels, ...] = field(default=())
    form: Form = "module"
    merges: tuple[Merge, ...] = ()
    factorizations: tuple[Factorize, ...] = ()

    @property
    def achieved(self) -> dict[str, float]:
        """Cost after over cost before, by metric."""
        memory = {"memory": self.memory[1] / max(self.memory[0], 1)} if self.memory else {}
        return {
            "macs": self.after.macs / max(self.before.macs, 1),
            "params": self.after.params / max(self.before.params, 1),
            **memory,
        }

    @property
    def memory(self) -> tuple[int, int] | None:
        """Bytes of tensors alive at the worst time, before and after; of plans with a budget of them."""
        held = self.options.get("memory_bytes")
        return (int(held[0]), int(held[1])) if held else None

    @property
    def error(self) -> float:
        """The predicted errors of all edits, as far as they are known."""
        errors = [*(edit.error for edit in self.edits), *(edit.error for edit in self.factorizations)]
        return sum(error or 0.0 for error in errors)

    def keep(self, graph: Graph) -> np.ndarray:
        """The mask over the graph's removable channels, shape (channels,), that stay.

        Raises:
            ConvpareError: the graph is of another form, or a group of the plan is not in it or has another number of
                channels there.
        """
        if graph.form != self.form:
            raise ConvpareError(f"the plan was made for the {self.form} form, this graph is of the {graph.form} form")
        self._refuse(graph, self._other_groups(graph))
        mask = graph.keep_all()
        for edit in self.edits:
            group = graph.group(edit.group)
            mask[group.units] = False
            mask[group.start + np.asarray(edit.keep, int)] = True
        return mask

    def made_true(self, graph: Graph) -> "Plan":
        """The plan with its cost made true, as it may have been edited by hand.

        Args:
            graph: of the network that the plan was made for, with its merges done.

        Raises:
            ConvpareError: the plan was made for another network; the message says where they differ.
        """
        keep = self.keep(graph)
        self._refuse(graph, [*self._other_layers(graph), *self._other_cost(graph)])
        options = dict(self.options)
        if self.memory:
            options["memory_bytes"] = [self.memory[0], peak_memory(graph, keep, self.factorizations)]
        return replace(self, after=planned_cost(graph, keep, self.factorizations), options=options)

    def savings(self, graph: Graph) -> list[Cost]:
        """What each edit saves beside all others, `edits` first, then `factorizations`: the cost without it, less
        that with it. They do not add up to what the plan saves: two that meet in a layer save more alone than after
        each other.
        """
        keep = self.keep(graph)
        found = []
        for edit in self.edits:
            whole = keep.copy()
            whole[graph.group(edit.group).units] = True
            found.append(planned_cost(graph, whole, self.factorizations) - self.after)
        for chain in self.factorizations:
            layer = graph.layer(chain.layer)
            found.append(layer_cost(graph, layer, keep) - chain_cost(graph, layer, keep, chain.form, chain.ranks))
        return found

    def without(self, groups: Sequence[str], graph: Graph) -> "Plan":
        """The plan without its edits of these groups, its cost made true."""
        return replace(self, edits=tuple(e for e in self.edits if e.group not in groups)).made_true(graph)

    def _other_groups(self, graph: Graph) -> Iterator[str]:
        channels = {group.name: group.channels for group in graph.groups}
        for edit in self.edits:
            if edit.group not in channels:
                yield f"it has no group {edit.group!r}"
            elif channels[edit.group] != edit.channels:
                yield f"its group {edit.group!r} has {channels[edit.group]} channels, the plan's {edit.channels}"

    def _other_layers(self, graph: Graph) -> Iterator[str]:
        layers = {layer.name for layer in graph.layers}
        for edit in self.factorizations:
            if edit.layer not in layers:
                yield f"it has no convolution or linear layer {edit.layer!r}"

    def _other_cost(self, graph: Graph) -> Iterator[str]:
        """Where nothing is merged: what the network costs before; a difference beside the edits shows there."""
        if graph.inputs != self.inputs:
            yield f"it was traced on {_shapes(graph.inputs)}, the plan's on {_shapes(self.inputs)}"
        elif not self.merges:
            cost = total_cost(graph, graph.keep_all())
            for metric, what in (("macs", "MACs"), ("params", "parameters")):
                if (mine := getattr(cost, metric)) != (planned := getattr(self.before, metric)):
                    yield f"it has {mine:,} {what}, the plan's {planned:,}"

    def _refuse(self, graph: Graph, differences: Iterable[str]) -> None:
        found = list(differences)
        if found:
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ConvpareError(
                f"the plan was made for another network than this {graph.model}: {'; '.join(found[:SHOWN])}{more}. "
                "Make a plan for this one"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "form": self.form,
            "inputs": [list(shape) for shape in self.inputs],
            "criterion": self.criterion,
            "options": dict(self.options),
            "requested": dict(self.requested),
            "achieved": self.achieved,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "edits": [
                *({"edit": "merge", **merge.to_json()} for merge in self.merges),
                *(edit.to_json() for edit in self.edits),
                *(edit.to_json() for edit in self.factorizations),
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def from_json(data: object) -> "Plan":
        """The plan that `to_json` wrote, checked field by field.

        Raises:
            ConvpareError: a field is missing or of another type, the schema is newer, or an edit keeps channels twice,
                out of range, or none at all.
        """
        return _read_plan(data)

    def __str__(self) -> str:
        rows = [
            f"plan for {self.model} on {_shapes(self.inputs)}, criterion {self.criterion}"
            + ("" if self.form == "module" else f", {self.form} form"),
            f"{'':<12}{'before':>16}{'after':>16}{'achieved':>10}{'requested':>11}",
        ]
        for metric in ("macs", "params"):
            wanted = self.requested.get(metric)
            rows.append(
                f"{metric:<12}{getattr(self.before, metric):>16,}{getattr(self.after, metric):>16,}"
                f"{self.achieved[metric]:>10.4f}{'-' if wanted is None else format(wanted, '.4f'):>11}"
            )
        if self.memory:
            rows.append(
                f"{'memory':<12}{self.memory[0]:>16,}{self.memory[1]:>16,}{self.achieved['memory']:>10.4f}"
                f"{self.requested['memory']:>11.4f}"
            )
        width = max([len(e.group) for e in self.edits] + [5])
        rows += [_merged(merge) for merge in self.merges]
        if self.edits:
            rows.append(f"{'group':<{width}} {'channels':>9} {'kept':>6}  removed")
        for edit in self.edits:
            rows.append(f"{edit.group:<{width}} {edit.channels:>9} {len(edit.keep):>6}  {_share(edit)}")
        rows += _table_of(self.factorizations)
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        form = "" if self.form == "module" else f", {self.form} form"
        title = f"plan for {self.model} on {_shapes(self.inputs)}, criterion {self.criterion}{form}"
        sides = {"macs": (self.before.macs, self.after.macs), "params": (self.before.params, self.after.params)}
        sides |= {"memory": self.memory} if self.memory else {}
        asked = {metric: f"{wanted:.4f}" for metric, wanted in self.requested.items()}
        costs = [(m, *side, f"{self.achieved[m]:.4f}", asked.get(m, "")) for m, side in sides.items()]
        parts = [html_table(("", "before", "after", "achieved", "requested"), costs, title)]
        parts += [html_text(_merged(merge)) for merge in self.merges]
        if self.edits:
            rows = [(e.group, e.channels, len(e.keep), _share(e), _number(e.error)) for e in self.edits]
            parts.append(html_table(("group", "channels", "kept", "removed", "adds error"), rows))
        if self.factorizations:
            chains = [
                (e.layer, _shapes([e.shape]), e.form, ", ".join(map(str, e.ranks)), _number(e.error))
                for e in self.factorizations
            ]
            parts.append(html_table(("layer", "weight", "becomes", "rank", "adds error"), chains))
        return "".join(parts)


def load_plan(path: str | Path) -> Plan:
    """Read a plan that was saved as JSON.

    Raises:
        ConvpareError: the file is missing, is not JSON, or is not a plan.
    """
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise ConvpareError(f"no plan at {path}") from error
    except (UnicodeDecodeError, ValueError, RecursionError, OSError) as error:
        raise ConvpareError(f"{path} is not a plan: it cannot be read as JSON ({error})") from error
    return Plan.from_json(data)


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " ".join("×".join(map(str, shape)) for shape in shapes)


def _merged(merge: Merge) -> str:
    return f"{merge.expansion} ({merge.r} → {merge.k}) is merged into {', '.join(merge.consumers)}"


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.2g}"


def _share(edit: RemoveChannels) -> str:
    filled = round(20 * edit.removed / edit.channels)
    return "█" * filled + "░" * (20 - filled) + f" {100 * edit.removed / edit.channels:5.1f} %"


def _table_of(factorizations: Sequence[Factorize]) -> list[str]:
    if not factorizations:
        return []
    width = max(5, *(len(edit.layer) for edit in factorizations))
    rows = [f"{'layer':<{width}} {'weight':>16} {'becomes':>12}  ranks"]
    for edit in factorizations:
        ranks = ", ".join(map(str, edit.ranks))
        rows.append(f"{edit.layer:<{width}} {_shapes([edit.shape]):>16} {edit.form:>12}  {ranks}")
    return rows


def _read_plan(data: object) -> Plan:
    plan = _typed(data, dict, "a plan")
    schema = _get(plan, "schema", int)
    if schema != SCHEMA:
        raise ConvpareError(f"the plan has schema {schema}, this version reads schema {SCHEMA}; update convpare")
    listed = [_typed(edit, dict, "an edit") for edit in _get(plan, "edits", list)]
    merges = tuple(_read_merge(edit) for edit in listed if edit.get("edit") == "merge")
    factorizations = tuple(_read_factorize(edit) for edit in listed if edit.get("edit") == "factorize")
    edits = tuple(_read_edit(edit) for edit in listed if edit.get("edit") not in ("merge", "factorize"))
    for what, names in (("group", [e.group for e in edits]), ("layer", [e.layer for e in factorizations])):
        most = Counter(names).most_common(1)
        if most and most[0][1] > 1:
            name, times = most[0]
            raise ConvpareError(f"the plan edits {what} {name!r} {times} times; one edit a {what} is expected")
    return Plan(
        model=_get(plan, "model", str),
        inputs=tuple(tuple(_ints(shape, "inputs")) for shape in _get(plan, "inputs", list)),
        criterion=_get(plan, "criterion", str),
        options=_read_options(plan),
        requested={str(k): float(_typed(v, (int, float), k)) for k, v in _get(plan, "requested", dict).items()},
        before=_read_cost(_get(plan, "before", dict)),
        after=_read_cost(_get(plan, "after", dict)),
        edits=edits,
        form=_read_form(plan),
        merges=merges,
        factorizations=factorizations,
    )


def _read_options(plan: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = _get(plan, "options", dict)
    if "memory_bytes" in options:
        held = _ints(_get(options, "memory_bytes", list), "memory_bytes")
        if len(held) != 2 or min(held) < 0 or "memory" not in _get(plan, "requested", dict):
            raise ConvpareError("memory_bytes must be the bytes before and after, of a plan with a budget of memory")
    return options


def _read_form(plan: dict[str, Any]) -> Form:
    form = plan.get("form", "module")
    if form not in FORMS:
        raise ConvpareError(f"the plan has form {reprlib.repr(form)}; expected one of {', '.join(FORMS)}")
    return cast(Form, form)


def _read_merge(edit: dict[str, Any]) -> Merge:
    norm = edit.get("norm")
    consumers, biases = (tuple(_strings(_get(edit, key, list), key)) for key in ("consumers", "biases"))
    sizes = [_get(edit, key, int) for key in ("k", "r", "params", "macs")]
    if not consumers or not 0 < sizes[1] < sizes[0]:
        raise ConvpareError("a merge in the plan must name layers that take the expansion in, and have 0 < r < k")
    return Merge(
        _get(edit, "expansion", str), None if norm is None else _typed(norm, str, "norm"), consumers, biases, *sizes
    )


def _read_factorize(edit: dict[str, Any]) -> Factorize:
    layer, form = _get(edit, "layer", str), _get(edit, "form", str)
    ranks, shape = (tuple(_ints(_get(edit, key, list), key)) for key in ("ranks", "shape"))
    if not ranks or min(ranks) < 1 or len(shape) < 2 or min(shape) < 1:
        raise ConvpareError(f"layer {layer!r} must have ranks and sizes of 1 or more in the plan")
    get_form(form)
    return Factorize(layer, form, ranks, shape, _error(edit))


def _error(edit: dict[str, Any]) -> float | None:
    error = edit.get("error")
    return None if error is None else float(_typed(error, (int, float), "error"))


def _read_edit(edit: dict[str, Any]) -> RemoveChannels:
    kind = edit.get("edit")
    if kind != "remove_channels":
        raise ConvpareError(
            f"the plan has an edit {reprlib.repr(kind)}; this version knows merge, remove_channels and factorize"
        )
    group, channels = _get(edit, "group", str), _get(edit, "channels", int)
    keep = tuple(_ints(_get(edit, "keep", list), "keep"))
    if not keep or len(set(keep)) != len(keep) or min(keep) < 0 or max(keep) >= channels:
        raise ConvpareError(
            f"group {group!r} must keep at least one of its {channels} channels, each once, numbered from 0; "
            f"the plan keeps {len(keep)}: {str(list(keep[:6]))[:80]}"
        )
    return RemoveChannels(group, tuple(sorted(keep)), channels, _error(edit))


def _read_cost(data: dict[str, Any]) -> Cost:
    return Cost(*(_get(data, key, int) for key in ("macs", "params", "activations")))


def _get(data: dict[str, Any], key: str, kind: type) -> Any:
    if key not in data:
        raise ConvpareError(f"the plan has no {key!r}")
    return _typed(data[key], kind, key)


def _typed(value: object, kind: type | tuple[type, ...], what: str) -> Any:
    huge = isinstance(value, int) and abs(value) >= 2**63  # neither a float nor an index can be made of it
    if not isinstance(value, kind) or isinstance(value, bool) or huge:
        raise ConvpareError(f"{what} is {reprlib.repr(value)} in the plan, which is not what it must be")
    return value


def _strings(values: object, what: str) -> list[str]:
    return [_typed(v, str, what) for v in _typed(values, list, what)]


def _ints(values: object, what: str) -> list[int]:
    return [_typed(v, int, what) for v in _typed(values, list, what)]
