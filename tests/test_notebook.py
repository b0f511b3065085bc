"""How results show themselves in a notebook."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from convpare import CompressOptions, compress
from convpare.blocks.digits import digits_net
from convpare.data import load_data
from convpare.graph.check import SelfCheck
from convpare.inspection import inspect
from convpare.notebook import html_table

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


def test_markup_in_names_is_text(done):
    evil = "<script>alert(1)</script>"
    plan = replace(done.plan, model=evil, criterion=evil, edits=tuple(replace(e, group=evil) for e in done.plan.edits))
    for page in (plan._repr_html_(), SelfCheck(0.0)._repr_html_(), html_table((evil,), [(evil,)], evil)):
        assert "<script" not in page
        assert set(Cells(page).tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert evil in Cells(plan._repr_html_()).texts
