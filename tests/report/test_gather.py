"""The numbers of a report, against those of the network, the plan and plain linear algebra."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convpare
from convpare import CompressOptions, PlanOptions, compress, count
from convpare.artifact import read_record, save
from convpare.blocks.digits import digits_net
from convpare.errors import ConvpareError
from convpare.factorize.edit import Factorize
from convpare.graph.merging import merge_all
from convpare.graph.trace import trace
from convpare.inspection import inspect
from convpare.measurement import measured
from convpare.planning.planner import Planner
from convpare.planning.solver import Budget
from convpare.prospect import trade_off
from convpare.report import (
    Network,
    network_of,
    render,
    report_of_artifact,
    report_of_inspection,
    report_of_truncation,
)
from convpare.report.gather import curve_of
from convpare.truncate import Truncated, Truncation

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Expanding(nn.Module):
    """An expansion that the next layer takes in, and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expand = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 24, 1, bias=False)
        self.reduce, self.depthwise = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduce(self.expand(self.first(x).relu())).relu()
        return self.fc(self.depthwise(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return digits_net().eval()


@pytest.fixture(scope="module")
def mixed(net, tmp_path_factory):
    """A network with channels removed and chains, its plan, and the record of its artifact."""
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = CompressOptions(PlanOptions(methods=("prune", "factorize"), images=64), recover=None)
    done = compress(net, EXAMPLE, images, macs=0.4, criterion="reconstruction", options=options)
    network = network_of(inspect(net, EXAMPLE), done.plan)
    folder = save(
        done.model, tmp_path_factory.mktemp("artifact") / "net", plan=done.plan, spec="convpare:digits",
        figures=measured(net, done, EXAMPLE).to_json(), origin={"commands": ["a b"], "network": network.to_json()},
    )  # fmt: skip
    return done, network, read_record(folder)


def test_costs_of_layers_are_those_that_are_counted(net, mixed):
    done, network, _ = mixed
    before, after = count(net, EXAMPLE), count(done.model, EXAMPLE)
    assert done.plan.edits and done.plan.factorizations
    assert {s.name: (s.macs, s.params) for s in network.layers} == {
        name: (cost.macs, cost.params) for name, cost in before.layers.items()
    }
    for sheet in network.layers:
        parts = [cost for name, cost in after.layers.items() if name == sheet.name or name.startswith(f"{sheet.name}.")]
        assert sheet.macs_after == sum(cost.macs for cost in parts), sheet.name
        assert sheet.params_after == sum(cost.params for cost in parts), sheet.name
    assert sum(sheet.macs_after for sheet in network.layers) == done.plan.after.macs


def test_what_was_done_is_the_plan(mixed):
    done, network, _ = mixed
    chains = {e.layer: (e.form, e.ranks, e.error) for e in done.plan.factorizations}
    assert {s.name: (s.chain.form, s.chain.ranks, s.chain.error) for s in network.layers if s.chain} == chains
    kept = {edit.group: (len(edit.keep), edit.error) for edit in done.plan.edits}
    assert kept
    for group in network.groups:
        assert (group.kept, group.error) == kept.get(group.name, (group.channels, None))
    for sheet in network.layers:
        edit = next((e for e in done.plan.factorizations if e.layer == sheet.name), None)
        assert edit is None or sheet.weight_after == edit.shape
        marks = {name: cuts.chosen for cuts in sheet.spectra for name in cuts.names if cuts.chosen is not None}
        assert edit is None or "|" not in edit.form or marks[edit.form] == edit.ranks[0]
        assert edit is not None or marks == {}
        lost = {s: sheet.weight_after[n] for n, s in enumerate("oi") if sheet.weight_after[n] < sheet.weight[n]}
        seen = {s: c.kept for c in sheet.spectra for n in c.names for s in n.split("|") if s in "oi" and c.kept}
        assert sheet.groups > 1 or all(seen[side] == left for side, left in lost.items())


def test_spectra_are_the_singular_values(net, mixed):
    _, network, _ = mixed
    sheet = next(s for s in network.layers if s.name == "block2.conv1")
    weight = net.get_submodule(sheet.name).weight.detach().double()
    values = torch.linalg.svdvals(weight.flatten(1)).numpy()
    cuts = next(c for c in sheet.spectra if "o|ihw" in c.names)
    assert cuts.full_rank == 64 and len(cuts.values) == 40
    at = np.linspace(0, 63, 40).round().astype(int)
    assert np.abs(np.array(cuts.values) - values[at] / values[0]).max() < 1e-4
    energy = values**2 / (values**2).sum()
    assert cuts.rank_99 == int((energy.cumsum() < 0.99).sum()) + 1
    effective = np.exp(-(energy * np.log(energy)).sum())
    assert cuts.effective_rank == pytest.approx(effective, abs=0.006)
    assert sheet.redundancy == pytest.approx(1 - effective / 64, abs=1e-3)
    pointwise = next(s for s in network.layers if s.name == "separable.3")
    assert [len(c.names) for c in pointwise.spectra] == [
        4
    ]  # of a 1×1 kernel these are one matrix, the others have rank 1


def test_a_merged_layer_is_gone():
    torch.manual_seed(0)
    net = Expanding().eval()
    options = CompressOptions(PlanOptions(merge=True), recover=None)
    done = compress(net, EXAMPLE, macs=0.8, criterion="l2", options=options)
    assert [m.expansion for m in done.plan.merges] == ["expand"]
    merged = trace(merge_all(net, EXAMPLE)[0], EXAMPLE)
    network = network_of(inspect(net, EXAMPLE), done.plan, merged)
    sheets = {sheet.name: sheet for sheet in network.layers}
    assert (sheets["expand"].merged, sheets["expand"].macs_after) == (True, 0)
    assert sum(s.macs for s in network.layers) == done.plan.before.macs
    assert sum(s.macs_after for s in network.layers) == done.plan.after.macs
    assert not sheets["reduce"].merged


def test_ranks_of_a_grouped_layer_are_of_all_groups():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.Flatten()).eval()
    whole = convpare.plan(net, EXAMPLE, macs=1.0, criterion="l2")
    edit = Factorize("2", "o|ihw", (2,), (16, 2, 3, 3))
    made = replace(whole, edits=(), factorizations=(edit,)).made_true(trace(net, EXAMPLE))
    sheet = network_of(inspect(net, EXAMPLE), made).layers[1]
    assert [(c.chosen, c.full_rank) for c in sheet.spectra if c.chosen] == [(8, 16)]
    chained = count(convpare.apply(net, made), EXAMPLE)
    assert sheet.macs_after == sum(cost.macs for name, cost in chained.layers.items() if name.startswith("2."))


def test_it_goes_through_json(mixed):
    done, network, record = mixed
    assert Network.from_json(json.loads(json.dumps(network.to_json()))) == network
    report = report_of_artifact(record)
    assert report.network == network
    assert json.loads(json.dumps(report.to_json()))["title"] == "DigitsNet"
    figures = record.figures
    quantities = {q.kind: (q.before, q.after, q.budget) for q in report.quantities}
    assert quantities["macs"] == (done.plan.before.macs, done.plan.after.macs, 0.4)
    assert quantities["params"] == (done.plan.before.params, done.plan.after.params, None)
    for kind in ("file_bytes", "latency_ms"):
        assert quantities[kind] == (figures["before"][kind], figures["after"][kind], None)
    assert (report.check.passed, report.check.error) == (True, done.check.max_relative_error)
    assert (report.check.removals, report.check.chains) == (True, True)
    assert f"{100 * (1 - done.plan.achieved['macs']):.1f} % of the MACs" in report.lead
    made = dict(report.made)
    assert made["Command"] == "a b"
    assert made["Criterion"] == "reconstruction, on at most 64 images, without labels"
    assert "Recovery" not in made


def test_budgets_of_time_and_memory(mixed):
    done, _, record = mixed
    plan = replace(done.plan, requested={"memory": 0.7, "latency": 0.8}, options={"memory_bytes": [4000, 2500]})
    figures = {**record.figures, "latency": {"runtime": "onnxruntime", "batch": 64, "threads": None, "ms": [9.5, 7.25]}}
    report = report_of_artifact(replace(record, plan=plan, figures=figures))
    found = {q.name: (q.kind, q.before, q.after, q.budget) for q in report.quantities}
    assert found["Memory, of tensors"] == ("memory_bytes", 4000, 2500, 0.7)
    assert found["Latency in onnxruntime, a batch of 64"] == ("latency_ms", 9.5, 7.25, 0.8)
    assert "asked for × 0.7" in render(report)
    assert "4,000" in plan._repr_html_()


def test_an_artifact_without_its_layers(mixed):
    *_, record = mixed
    report = report_of_artifact(replace(record, origin={}))
    assert report.network is None
    assert "--teacher" in report.notes[0]
    assert "What was superfluous" not in render(report)
    bare = report_of_artifact(replace(record, origin={}, figures={}))
    assert [q.kind for q in bare.quantities] == ["macs", "params"]
    page = render(bare)
    assert "What it cost, and what it saves" in page
    assert "How we know" not in page
    with pytest.raises(ConvpareError, match="without a plan"):
        report_of_artifact(replace(record, plan=None))


def test_stages_after_a_later_recovery(mixed):
    *_, record = mixed
    stages = [{"name": n, "top1": t, "seconds": 1.0} for n, t in (("before", 99.0), ("surgery", 20.0))]
    again = [
        {"name": n, "top1": t, "seconds": 1.0} for n, t in (("original", 99.0), ("given", 20.0), ("training", 98.5))
    ]
    recovery = {"method": "least-squares", "images": 1024, "labels": True, "gradient_passes": 5000}
    figures = {**record.figures, "stages": stages, "regained": {"stages": again, "recovery": recovery}}
    report = report_of_artifact(replace(record, figures=figures))
    names = [(stage.stage, stage.top1) for stage in report.stages]
    assert names == [("original", 99.0), ("after surgery", 20.0), ("after training", 98.5)]
    assert report.lead.endswith("Accuracy went from 99.00 to 98.50 %: 0.50 points lower.")
    assert (
        dict(report.made)["Recovery later"] == "least-squares on 1,024 images, with labels, 5,000 gradients of images"
    )


def test_a_trade_off_and_the_point_on_it(net):
    planner = Planner(net, EXAMPLE, criterion="l2")
    curve = trade_off(planner, Budget(macs=0.5), steps=4)
    plan = planner.plan(Budget(macs=0.5))
    found = curve_of(json.loads(json.dumps(curve.to_json())), plan)
    assert [p[0] for p in found.points] == [made.achieved["macs"] for made in curve.plans]
    assert found.chosen == (plan.achieved["macs"], plan.achieved["params"], plan.error)
    assert curve_of(curve.to_json(plans=False), plan) == found
    with pytest.raises(ConvpareError, match="another network or criterion"):
        curve_of(curve.to_json(), replace(plan, criterion="l1"))
    for nonsense in (None, [], {}, {"criterion": "l2", "steps": [{"achieved": {}, "error": "x"}]}, {"steps": 3}):
        with pytest.raises(ConvpareError, match="no sweep"):
            curve_of(nonsense, plan)


def test_an_inspection(net):
    found = inspect(net, EXAMPLE)
    report = report_of_inspection(found)
    values = {q.name: q.before for q in report.quantities}
    assert values["MACs"] == found.count.total.macs
    assert values["MACs on removable channels"] == found.prunable
    assert all(q.after is None for q in report.quantities)
    assert all(sheet.macs_after is None and sheet.left is None for sheet in report.network.layers)
    assert [(b.name, b.k, b.r) for b in report.network.blocks] == [(b.name, b.k, b.r) for b in found.blocks]
    assert "192 channels in 4 groups" in report.lead


def test_a_truncation():
    points = [
        Truncated(layer, depth, "o|ihw", f, (1,), loss, 0.1, 0.5, top1)
        for layer, depth, f, loss, top1 in (
            ("a", 0.0, 0.5, 0.1, 89.5), ("a", 0.0, 0.2, 0.3, 40.0), ("b", 1.0, 0.5, 0.2, 90.0),
            ("all layers", float("nan"), 0.5, 0.15, 60.0),
        )
    ]  # fmt: skip
    report = report_of_truncation(Truncation("Net", 100, 90.0, 1.0, tuple(points), ()))
    (cloud,) = report.clouds.panels
    assert cloud.single[1] == ("a", 0.0, 0.3, 40.0)
    assert cloud.joint == ((0.15, 60.0),)
    assert cloud.tolerated == pytest.approx((0.15, 0.1, 0.2))
    assert "norm loss of 15.0 % along o|ihw for at most 1 point of accuracy" in report.lead


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.just(10**90), st.floats(allow_nan=True), st.text(max_size=5),
    st.just([]), st.just({}), st.just([1, "a"]),
)  # fmt: skip


def places(data: object, at: tuple = ()) -> list[tuple]:
    """The path of everything in a JSON value."""
    found = [at] if at else []
    for key, item in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        found += places(item, (*at, key))
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_records_that_somebody_wrote_are_read_or_refused(mixed, data):
    """Any value in any place of the figures and the origin: a page or a message, never another exception."""
    *_, record = mixed
    content = json.loads(json.dumps({"figures": record.figures, "origin": record.origin}))
    layers = content["origin"]["network"]["layers"]
    content["origin"]["network"]["layers"] = layers[:3]
    *path, last = data.draw(st.sampled_from(places(content)))
    if not path:
        return
    target = content
    for key in path:
        target = target[key]
    if data.draw(st.booleans()):
        target[last] = data.draw(VALUES)
    else:
        del target[last]
    try:
        page = render(report_of_artifact(replace(record, figures=content["figures"], origin=content["origin"])))
    except ConvpareError as error:
        assert "compress again" in str(error)
        return
    assert page.startswith("<!doctype html>")


def test_the_record_is_left_alone(mixed):
    *_, record = mixed
    before = copy.deepcopy((record.figures, record.origin))
    report_of_artifact(record)
    assert (record.figures, record.origin) == before
    assert convpare.Plan.from_json(record.plan.to_json()) == record.plan
