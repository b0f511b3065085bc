"""The page: what is written, how large it is, what it may do."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest
import torch

from convpare.blocks.digits import digits_net
from convpare.errors import ConvpareError
from convpare.inspection import inspect
from convpare.planning.planner import plan
from convpare.report import Network, Report, network_of, render, report_of_inspection, write_report
from convpare.report.drawing import alike, check_places, curve_plot, map_rows, spectrum_plot
from convpare.report.gather import Check, Curve, Quantity
from convpare.report.network import BlockRatio, Channels, Cuts, Sheet
from convpare.report.page import amount, cut_in_words, exact, kernel, power, si, tip
from convpare.report.pictures import Pair
from convpare.zoo import load_model

EVIL = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{1}}"


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return report_of_inspection(inspect(digits_net().eval(), torch.zeros(1, 1, 8, 8)))


def everything(name: str) -> Report:
    """A report in which every text is `name`."""
    cuts = Cuts((name,), 4, 2, 1.5, (1.0, 0.5), 2, 3)
    sheet = Sheet(name, name, (4, 4), 1, (8,), 9, 9, 4, 4, (2, 4), None, False, (name,), (name,), (cuts,))
    network = Network((sheet,), (Channels(name, 4, (name,), (name,), 2, 0.1),), (BlockRatio(name, 4, 2, 1, name),),
                      ((name, 3, name),))  # fmt: skip
    check = Check(False, 1.0, 1e-9, (name,), None, True, True)
    pair = Pair(name, name, (0, 1), 0.5, (1,), False, (("data:,", "data:,", name),))
    curve = Curve(name, ((0.5, 0.5, 1.0),), (0.4, 0.4, 2.0))
    return Report(name, name, name, (Quantity("macs", name, 2.0, 1.0),), network=network, pairs=(pair,), curve=curve,
                  check=check, made=((name, name),), notes=(name,))  # fmt: skip


def test_names_stay_text():
    plain, evil = Elements(render(everything("name"))), Elements(render(everything(EVIL)))
    assert evil.tags == plain.tags
    assert plain.tags.count("script") == 1
    assert [name for name, _ in evil.attributes] == [name for name, _ in plain.attributes]
    assert not any(name.startswith("on") for name, _ in evil.attributes)
    assert ("src", EVIL) in evil.attributes  # as a value, of an image that may load from data: alone
    assert EVIL not in render(everything(EVIL))


def test_nothing_comes_from_a_network(report):
    page = render(report)
    assert not re.search(r"(?:https?:)?//[a-z]", page)
    elements = Elements(page)
    assert {"link", "iframe", "object", "base", "form"}.isdisjoint(elements.tags)
    policy = next(value for name, value in elements.attributes if name == "content" and "default-src" in str(value))
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_the_page_of_resnet_50_is_small():
    torch.manual_seed(0)
    net, example = load_model("torchvision:resnet50").module, torch.zeros(1, 3, 224, 224)
    found = inspect(net, example)
    made = plan(net, example, macs=0.5, criterion="l2", graph=found.graph)
    network = network_of(found, made)
    page = render(replace(report_of_inspection(found), network=network))
    assert len(network.layers) == 54
    assert sum(sheet.macs_after for sheet in network.layers) == made.after.macs
    assert 100_000 < len(page.encode()) < 1_000_000


def test_written_whole_or_not_at_all(report, tmp_path):
    write_report(report, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == render(report)
    with pytest.raises(ConvpareError, match="cannot be written"):
        write_report(report, tmp_path / "none" / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_name_that_is_no_unicode_can_be_written(report, tmp_path):
    write_report(replace(report, title="a\ud800b"), tmp_path / "r.html")
    assert "<h1>a?b</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_templates_are_package_data():
    found = resources.files("convpare.report").joinpath("templates")
    assert {"report.html", "report.css", "report.js"} <= {path.name for path in found.iterdir()}


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (7, "7"), (0.5, "0.50"), (999, "999"), (1000, "1.00\xa0k"), (40_551_040, "40.6\xa0M"),
     (999_600, "1.00\xa0M"), (4_089_184_256, "4.09\xa0G"), (153_439, "153\xa0k"), (12_345, "12.3\xa0k")],
)  # fmt: skip
def test_three_figures(value, text):
    assert si(value) == text


def test_units():
    assert amount(630_780, Quantity("file_bytes", "", 1)) == "631\xa0kB"
    assert amount(12, Quantity("file_bytes", "", 1)) == "12\xa0B"
    assert amount(6.384, Quantity("latency_ms", "", 1)) == "6.38\xa0ms"
    assert amount(0.387, Quantity("share", "", 1)) == "38.7\xa0%"
    assert (exact(40_551_040), exact(6.384), exact(0.0)) == ("40,551,040", "6.384", "0")
    assert (power(1.2783e-15), power(1e-9, 0), power(0.0)) == ("1.3e-15", "1e-9", "0")
    assert cut_in_words("oi|hw") == "output channels, input channels against height, width"


def test_layers_in_words():
    conv = Sheet("a", "conv", (64, 4, 3, 3), 8, (8, 8), 100, 10)
    assert kernel(conv) == "3×3 convolution, 32 → 64 channels, in 8 groups"
    assert kernel(replace(conv, kind="conv_transpose")) == "3×3 transposed convolution, 64 → 32 channels, in 8 groups"
    assert kernel(Sheet("fc", "linear", (10, 64), 1, (), 1, 1)) == "linear layer, 64 → 10 channels"
    after = replace(conv, macs_after=50, params_after=5, weight_after=(32, 4, 3, 3))
    assert tip(after).splitlines()[2:] == ["100 → 50 MACs (50\xa0%)", "channels removed"]


def test_rows_of_the_map():
    """A gate stands in the row that it interrupts; the classifier at the end has a row of its own."""
    sizes = [(32, 32), (32, 32), (1, 1), (32, 32), (16, 16), (1, 1), (16, 16), (1, 1), ()]
    sheets = [Sheet(str(n), "conv", (4, 4), 1, size, 100 - n, 1) for n, size in enumerate(sizes)]
    rows = map_rows(sheets)
    assert [(row.size, len(row.tiles)) for row in rows] == [("32×32", 4), ("16×16", 3), ("1×1", 2)]
    tiles = [tile for row in rows for tile in row.tiles]
    assert [tile.number for tile in tiles] == list(range(9))
    assert tiles[0].side == 104
    assert tiles[4].side ** 2 / tiles[0].side ** 2 == pytest.approx(0.96)
    assert map_rows([]) == []


def test_places_of_marks():
    cuts = Cuts(("o|i",), 11, 6, 3.0, (1.0, 0.5, 0.0), chosen=3, kept=None)
    plot = spectrum_plot(cuts)
    assert (plot.rank_99, plot.chosen, plot.kept) == (84.0, 33.6, None)
    assert plot.area == "M0 76 L0.0 0.0 L84.0 38.0 L168.0 76.0 L168.0 76Z"
    plot = curve_plot(Curve("l2", ((0.5, 0.6, 2.0), (0.75, 0.8, 1.0)), (0.5, 0.6, 2.0)))
    assert (plot.chosen.x, plot.chosen.y) == (plot.dots[0].x, plot.dots[0].y) == (plot.left, plot.top)
    assert [label for _, label in plot.x.ticks] == ["50", "60", "70", "80", "90", "100 %"]
    assert check_places(Check(True, 1e-17, 1e-9, (), None, True, False))[:2] == pytest.approx((0, 8 / 17))
    assert check_places(Check(False, 0.0, 10.0, (), None, True, False))[:2] == (0, 1)


def test_blocks_that_are_alike():
    blocks = [BlockRatio("a", 64, 16, 10, "relu"), BlockRatio("b", 64, 16, 14, "relu"), BlockRatio("c", 8, 8, None, "")]
    first, second = alike(blocks)
    assert (first.name, first.ratio, first.share, first.ranks) == ("a … b (2)", 4, 1, "10–14")
    assert (second.name, second.ratio, second.share, second.ranks) == ("c", 1, 0.25, "")
