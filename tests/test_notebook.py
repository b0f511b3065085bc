"""How results show themselves in a notebook."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from convpare import Budget, CompressOptions, Planner, RecoverOptions, compress
from convpare.bench import BenchOptions, bench
from convpare.blocks.digits import digits_net
from convpare.data import load_data
from convpare.evaluation import Evaluation
from convpare.export.result import Exported
from convpare.export.verb import Export
from convpare.graph.check import SelfCheck
from convpare.inspection import inspect
from convpare.notebook import html_table
from convpare.prospect import prospect, trade_off
from convpare.recovery import TuneOptions
from convpare.redundancy.estimation import Interval, Line
from convpare.regain import regain
from convpare.theory import Fit, Rank, Theory, TheoryOptions
from convpare.truncate import ALL, Retrained, Truncated, Truncation

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Cells(HTMLParser):
    """The texts of a table's cells, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def done():
    torch.manual_seed(0)
    options = CompressOptions(recover=None, test_limit=20)
    return compress(digits_net().eval(), EXAMPLE, load_data("digits"), macs=0.5, criterion="l2", options=options)


def test_a_plan_and_a_compression(done):
    shown = Cells(done.plan._repr_html_())
    assert f"{done.plan.before.macs:,}" in shown.texts and f"{done.plan.after.macs:,}" in shown.texts
    assert all(edit.group in shown.texts for edit in done.plan.edits)
    whole = Cells(done._repr_html_())
    assert whole.texts[-1] == str(done.check)
    assert [f"{stage.top1:.2f}" in whole.texts for stage in done.stages] == [True, True]


def test_an_inspection(done):
    torch.manual_seed(0)
    found = inspect(digits_net().eval(), EXAMPLE, torch.rand(8, 1, 8, 8))
    shown = Cells(found._repr_html_())
    assert all(layer.name in shown.texts for layer in found.graph.layers)
    assert shown.texts[shown.texts.index("total") + 1 :][:2] == ["2,415,744", "96,074"]
    assert "similar" in shown.texts


def test_a_prospect_and_a_trade_off():
    torch.manual_seed(0)
    planner = Planner(digits_net().eval(), EXAMPLE, criterion="l2")
    found = prospect(planner, Budget(macs=0.5))
    shown = Cells(found._repr_html_())
    assert f"{found.plan.after.macs:,}" in shown.texts and f"{found.prices['macs']:.2g}" in shown.texts
    curve = trade_off(planner, Budget(macs=0.0003), steps=2)
    rows = Cells(curve._repr_html_()).texts
    assert rows[0] == "predicted errors of DigitsNet, criterion l2"
    assert rows[5:9] == ["0.500", *(f"{curve.plans[0].achieved[m]:.4f}" for m in ("macs", "params")),
                         f"{curve.plans[0].error:.3g}"]  # fmt: skip
    assert rows[9:] == ["0.000", curve.steps[1][2]]


def test_what_was_recovered(done):
    torch.manual_seed(0)
    options = CompressOptions(recover=RecoverOptions("distill", images=200, tune=TuneOptions(epochs=1)), test_limit=20)
    found = regain(done.model, digits_net().eval(), load_data("digits"), done.plan, options)
    shown = Cells(found._repr_html_()).texts
    assert all(f"{error:.3g}" in shown for error in found.recovered.errors.values())
    assert f"{found.stages[-1].top1:.2f}" in shown
    assert shown[-1] == f"training: {found.recovered.tuned}"


def test_files_timings_and_accuracies():
    file = Exported(Path("net.onnx"), "onnx", "dynamo", 12345, 3e-7, 64, (1, 2), False)
    small = replace(file, path=Path("net.int8.onnx"), size=4000, agreement=99.0)
    shown = Cells(Export("Net", (file, small), (91.5, 91.5, 91.25), 10_000)._repr_html_()).texts
    assert shown[0] == "Net, 91.50 % of 10,000 test images in torch"
    assert shown[7:] == ["net.onnx", "12,345", "dynamo", "3e-07", "64", "91.50",
                         "net.int8.onnx", "4,000", "dynamo", "3e-07", "64", "91.25"]  # fmt: skip
    assert "12,345" in Cells(file._repr_html_()).texts
    timed = bench({"a": digits_net(), "b": digits_net()}, EXAMPLE, BenchOptions(seconds=0.0))
    shown = Cells(timed._repr_html_()).texts
    assert [f"{ms.median:.3f}" in shown for ms in timed.settings[0].milliseconds] == [True, True]
    seen = Evaluation(90.0, None, 100, 1.0)
    assert Cells(seen._repr_html_()).texts == [str(seen)]


def test_experiments():
    points = tuple(Truncated(ALL, 1.0, "o|ihw", f, (), 0.1, 0.4, f, 100 * f) for f in (0.5, 0.25))
    found = Truncation("Net", 100, 95.0, 1.0, points, (Retrained("o|ihw", 0.25, "factors", 3, 25.0, 90.0),))
    shown = Cells(found._repr_html_()).texts
    assert shown[:6] == ["Net: 95.00 % of 100 images before; 2 truncations", "all layers, top-1 %", "0.5", "0.25",
                         "o|ihw", "50.00"]  # fmt: skip
    assert shown[-6:] == ["o|ihw", "0.25", "factors", "3", "25.00", "90.00"]
    line = Line(Interval(2.0, 1.75, 2.25), Interval(0.0, -0.125, 0.125), 1.0, Interval(2.0, 1.5, 2.5))
    theory = Theory(
        TheoryOptions(), (), (Fit("cnn", "independent", 3, 9, line, 0.0),), (), (Rank("cnn", 3, 9, 8, 7, 6),)
    )
    shown = Cells(theory._repr_html_()).texts
    assert shown[6:12] == ["cnn", "3", "9", "8", "7", "6"]
    assert shown[-6:] == ["cnn", "independent", "3", "2.000 ± 0.250", "0.000 ± 0.125", "2.000 ± 0.500"]


def test_markup_in_names_is_text(done):
    evil = "<script>alert(1)</script>"
    plan = replace(done.plan, model=evil, criterion=evil, edits=tuple(replace(e, group=evil) for e in done.plan.edits))
    for page in (plan._repr_html_(), SelfCheck(0.0)._repr_html_(), html_table((evil,), [(evil,)], evil)):
        assert "<script" not in page
        assert set(Cells(page).tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert evil in Cells(plan._repr_html_()).texts
