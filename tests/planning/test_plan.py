"""A plan is data: it survives JSON, refuses what is no plan with one kind of error, and makes the mask it says."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.planning.cost import Cost, total_cost
from convpare.planning.plan import SCHEMA, Plan, RemoveChannels, load_plan

GRAPH = trace(
    nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 2, 1)),
    torch.zeros(1, 3, 2, 2),
)
# MACs: 4 positions of 12 + 24 + 12 weights; after: 4 · (3·2 + 2·5 + 5·2)
PLAN = Plan(
    model="Sequential",
    inputs=((1, 3, 2, 2),),
    criterion="l2",
    options={"depth": 3, "names": ["a"]},
    requested={"macs": 0.6},
    before=Cost(4 * 48, 12 + 4 + 24 + 12 + 2, 4 * 12),
    after=Cost(4 * 26, 6 + 2 + 10 + 10 + 2, 4 * 9),
    edits=(RemoveChannels("0", (1, 3), 4, 0.25), RemoveChannels("2", (0, 1, 2, 4, 5), 6)),
)


def data() -> dict[str, Any]:
    return json.loads(json.dumps(PLAN.to_json()))


def test_json_round_trip(tmp_path: Path):
    assert Plan.from_json(data()) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == PLAN
    assert load_plan(str(tmp_path / "plan.json")).to_json() == PLAN.to_json()


def test_json_as_written():
    assert data() == {
        "schema": 1,
        "model": "Sequential",
        "form": "module",
        "inputs": [[1, 3, 2, 2]],
        "criterion": "l2",
        "options": {"depth": 3, "names": ["a"]},
        "requested": {"macs": 0.6},
        "achieved": {"macs": 104 / 192, "params": 30 / 54},
        "before": {"macs": 192, "params": 54, "activations": 48},
        "after": {"macs": 104, "params": 30, "activations": 36},
        "edits": [
            {"edit": "remove_channels", "group": "0", "channels": 4, "keep": [1, 3], "error": 0.25},
            {"edit": "remove_channels", "group": "2", "channels": 6, "keep": [0, 1, 2, 4, 5], "error": None},
        ],
    }


def test_keep_and_its_cost():
    keep = PLAN.keep(GRAPH)
    assert keep.tolist() == [False, True, False, True, True, True, True, False, True, True]
    assert total_cost(GRAPH, GRAPH.keep_all()) == PLAN.before
    assert total_cost(GRAPH, keep) == PLAN.after
    assert [e.removed for e in PLAN.edits] == [2, 1]
    assert Plan.from_json({**data(), "edits": []}).keep(GRAPH).all()


def test_order_of_keep_does_not_matter():
    edited = data()
    edited["edits"][0]["keep"] = [3, 1]
    assert Plan.from_json(edited) == PLAN


def test_without():
    only_second = PLAN.without(["0"], GRAPH)
    assert [e.group for e in only_second.edits] == ["2"]
    assert only_second.after == Cost(4 * (12 + 20 + 10), 16 + 20 + 12, 4 * 11)
    assert PLAN.without([], GRAPH) == PLAN


def test_plan_for_another_model():
    with pytest.raises(ConvpareError, match="than this Conv2d: it has no group '0'"):
        PLAN.keep(trace(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2)))
    wider = trace(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ConvpareError, match=r"made for another network .*: its group '0' has 5 channels, the plan's 4"):
        PLAN.keep(wider)


def test_table():
    assert str(PLAN).splitlines() == [
        "plan for Sequential on 1×3×2×2, criterion l2",
        "                      before           after  achieved  requested",
        "macs                     192             104    0.5417     0.6000",
        "params                    54              30    0.5556          -",
        "group  channels   kept  removed",
        "0             4      2  ██████████░░░░░░░░░░  50.0 %",
        "2             6      5  ███░░░░░░░░░░░░░░░░░  16.7 %",
    ]


Change = Callable[[dict[str, Any]], object]


def removing(*path: str | int) -> Change:
    def change(plan: Any) -> None:
        for step in path[:-1]:
            plan = plan[step]
        del plan[path[-1]]

    return change


def setting(value: object, *path: str | int) -> Change:
    def change(plan: Any) -> None:
        for step in path[:-1]:
            plan = plan[step]
        plan[path[-1]] = value

    return change


FIELDS = ("schema", "model", "inputs", "criterion", "options", "requested", "before", "after", "edits")
MALFORMED: list[tuple[Change, str]] = [
    *[(removing(name), f"the plan has no '{name}'") for name in FIELDS],
    *[(removing("after", name), f"the plan has no '{name}'") for name in ("macs", "params", "activations")],
    *[(removing("edits", 0, name), f"the plan has no '{name}'") for name in ("group", "channels", "keep")],
    (removing("edits", 1, "edit"), "has an edit None; this version knows merge, remove_channels"),
    (setting(SCHEMA + 1, "schema"), "has schema 2, this version reads schema 1; update convpare"),
    (setting(0, "schema"), "has schema 0"),
    (setting("1", "schema"), "schema is '1' in the plan"),
    (setting(True, "schema"), "schema is True in the plan"),
    (setting(3, "model"), "model is 3 in the plan"),
    (setting([3, 4], "inputs"), "inputs is 3 in the plan"),
    (setting([["a"]], "inputs"), "inputs is 'a' in the plan"),
    (setting(None, "criterion"), "criterion is None in the plan"),
    (setting([], "options"), r"options is \[\] in the plan"),
    (setting({"macs": "half"}, "requested"), "macs is 'half' in the plan"),
    (setting({"macs": True}, "requested"), "macs is True in the plan"),
    (setting({"macs": 10**400}, "requested"), "macs is 1000"),
    (setting(1.5, "before", "macs"), r"macs is 1\.5 in the plan"),
    (setting(10**400, "before", "macs"), "macs is 1000"),
    (setting([], "before"), r"before is \[\] in the plan"),
    (setting({}, "edits"), "edits is {} in the plan"),
    (setting("cut", "edits", 0), "an edit is 'cut' in the plan"),
    (setting("quantize", "edits", 0, "edit"), "has an edit 'quantize'"),
    (setting(5, "edits", 0, "group"), "group is 5 in the plan"),
    (setting("4", "edits", 0, "channels"), "channels is '4' in the plan"),
    (setting("low", "edits", 0, "error"), "error is 'low' in the plan"),
    (setting(10**400, "edits", 0, "error"), "error is 1000"),
    (
        setting([], "edits", 0, "keep"),
        "must keep at least one of its 4 channels, each once, numbered from 0; the plan keeps 0",
    ),
    (setting([1, 1], "edits", 0, "keep"), r"the plan keeps 2: \[1, 1\]"),
    (setting([1, 4], "edits", 0, "keep"), r"group '0' must keep .* the plan keeps 2: \[1, 4\]"),
    (setting([-1, 2], "edits", 0, "keep"), r"the plan keeps 2: \[-1, 2\]"),
    (setting([1.0], "edits", 0, "keep"), r"keep is 1\.0 in the plan"),
    (setting([True], "edits", 0, "keep"), "keep is True in the plan"),
    (setting(3, "edits", 0, "keep"), "keep is 3 in the plan"),
    (setting("2", "edits", 0, "group"), "the plan edits group '2' 2 times; one edit a group"),
    (setting(0, "edits", 0, "channels"), "must keep at least one of its 0 channels"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_malformed(change: Change, message: str):
    plan = data()
    change(plan)
    with pytest.raises(ConvpareError, match=message) as caught:
        Plan.from_json(plan)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("given", [None, 3, "plan", [], [data()], True, 1.5])
def test_no_plan_at_all(given: object):
    with pytest.raises(ConvpareError, match="a plan is "):
        Plan.from_json(given)


def test_unread_fields_and_a_missing_error_are_no_fault():
    plan = data()
    plan["note"] = "by hand"
    del plan["achieved"], plan["edits"][0]["error"]
    assert Plan.from_json(plan).edits[0].error is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[1, 2]",
        b"{}",
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b"}",
        b"NaN",
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: bytes):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ConvpareError):
        load_plan(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConvpareError, match=r"no plan at .*nowhere\.json"):
        load_plan(tmp_path / "nowhere.json")
    with pytest.raises(ConvpareError, match="is not a plan"):
        load_plan(tmp_path)


@pytest.mark.parametrize("depth", range(850, 1000, 10))
def test_deeply_nested(tmp_path: Path, depth: int):
    """However deep the nesting that JSON may still read, the message about it is one of ours."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data()).replace('"Sequential"', "[" * depth + "]" * depth))
    with pytest.raises(ConvpareError):
        load_plan(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.none() | JSON, st.booleans()), min_size=1, max_size=3))
def test_any_mutation_is_a_plan_or_refused(mutations: list[tuple[int, Any, bool]]):
    """Whatever stands in the JSON: a plan that prints, saves and makes a mask, or a ConvpareError."""
    plan = data()
    for number, value, delete in mutations:
        spots = places(plan)
        if not spots:
            break
        path = spots[number % len(spots)]
        (removing(*path) if delete else setting(copy.deepcopy(value), *path))(plan)
    plan = json.loads(json.dumps(plan))
    try:
        read = Plan.from_json(plan)
    except ConvpareError as error:
        assert str(error)
        return
    assert f"plan for {read.model}" in str(read)
    assert set(read.achieved) == {"macs", "params"}
    assert Plan.from_json(json.loads(json.dumps(read.to_json()))).edits == read.edits or _has_nan(read)
    try:
        keep = read.keep(GRAPH)
    except ConvpareError:
        return
    _assert_mask(GRAPH, keep)


def _has_nan(plan: Plan) -> bool:
    return any(edit.error is not None and np.isnan(edit.error) for edit in plan.edits)


def _assert_mask(graph: Graph, keep: np.ndarray) -> None:
    assert keep.dtype == bool
    assert keep.shape == (graph.channels,)
    assert all(keep[group.units].any() for group in graph.groups)
