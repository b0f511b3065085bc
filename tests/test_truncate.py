"""The truncation experiment on a small trained net."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import convpare
from convpare import evaluate
from convpare.blocks.digits import train_digits
from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.factorize import factorize
from convpare.recovery.training import TrainOptions
from convpare.report import truncation_figure, write_figure
from convpare.truncate import ALL, Truncated, TruncateOptions, Truncation, put_chains_, put_kernels_, truncate

EXAMPLE = torch.zeros(1, 1, 8, 8)
FEW = TruncateOptions(forms=("o|ihw", "oi|hw", "tucker2", "tt:oihw"), fractions=(0.5, 0.25), images=100)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return train_digits(epochs=4)[0]


@pytest.fixture(scope="module")
def data() -> convpare.data.Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def found(net, data) -> Truncation:
    return truncate(net, EXAMPLE, data, FEW)


def test_points(net, data, found):
    before = {name: x.clone() for name, x in net.state_dict().items()}
    assert found.base == evaluate(net, data.evaluation, limit=100).top1
    assert found.images == 100
    single = [p for p in found.points if p.layer != ALL]
    assert {p.form for p in single} == set(FEW.forms)
    names = [m for m, x in net.named_modules() if isinstance(x, nn.Conv2d)]
    assert {p.layer for p in single if p.form == "o|ihw"} == set(names) - {"separable.0"}  # depthwise: rank 1
    assert {p.layer: p.depth for p in single}["block2.conv2"] == 1
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_a_point_is_what_its_kernel_gives(net, data, found):
    """Done by hand: the truncated kernel put into a copy, and its norm."""
    point = next(p for p in found.points if (p.layer, p.form, p.fraction) == ("block1.conv2", "o|ihw", 0.25))
    weight = net.block1.conv2.weight.detach().double().flatten(1)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    kept = (u[:, :8] * s[:8] @ v[:8]).reshape(net.block1.conv2.weight.shape)
    assert point.ranks == (8,)
    assert point.norm_loss == pytest.approx(float(1 - kept.norm() / weight.norm()), rel=1e-5)
    assert point.relative_error == pytest.approx(float((s[8:] ** 2).sum().sqrt() / weight.norm()), rel=1e-5)
    assert point.params == pytest.approx(8 * (32 + 288) / (32 * 288))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.block1.conv2.weight.copy_(kept)
    assert point.top1 == evaluate(other, data.evaluation, limit=100).top1


def test_equal_ranks_are_measured_once(net, data):
    options = replace(FEW, forms=("h|oiw",), fractions=(0.9, 0.7, 0.6, 0.5, 0.4, 0.3), joint=False)
    points = truncate(net, EXAMPLE, data, options).points
    ranks = [(p.layer, p.ranks) for p in points]
    assert len(ranks) == len(set(ranks))
    assert {r for _, r in ranks} == {(1,), (2,)}


def test_dense_kernels_and_chains_are_one_function(net):
    made = {n: factorize(net.get_submodule(n), "o|ihw", 0.5) for n in ("block1.conv1", "separable.3")}
    dense, chains = copy.deepcopy(net), copy.deepcopy(net)
    put_kernels_(dense, made)
    put_chains_(chains, made)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense(x), chains(x), rtol=1e-4, atol=1e-4)
    assert isinstance(chains.block1.conv1, nn.Sequential)


def test_a_second_run_measures_nothing(net, data, found, tmp_path, monkeypatch):
    store = tmp_path / "points.jsonl"
    first = truncate(net, EXAMPLE, data, FEW, store=store)
    assert first == found or first.points == found.points

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("convpare.truncate.evaluate", never)
    again = truncate(net, EXAMPLE, data, FEW, store=store)
    assert again.points == first.points
    lines = store.read_text().splitlines()
    assert len(lines) == len(first.points) + 1  # and the net as it is
    other = train_digits(epochs=1, seed=1)[0]
    with pytest.raises(AssertionError, match="measured again"):
        truncate(other, EXAMPLE, data, FEW, store=store)


def test_an_interrupted_line_is_measured_again(net, data, found, tmp_path):
    store = tmp_path / "points.jsonl"
    truncate(net, EXAMPLE, data, FEW, store=store)
    store.write_bytes(store.read_bytes()[:-25])
    assert truncate(net, EXAMPLE, data, FEW, store=store).points == found.points


def test_training_again(net, data, tmp_path):
    options = replace(
        FEW, forms=("o|ihw",), each=False, retrain=(0.25,), retrain_images=400, training=TrainOptions(epochs=2, lr=0.02)
    )
    store = tmp_path / "points.jsonl"
    done = truncate(net, EXAMPLE, data, options, store=store)
    assert [(r.form, r.kind) for r in done.retrained] == [("none", "dense"), ("o|ihw", "dense"), ("o|ihw", "factors")]
    joint = next(p for p in done.points if p.fraction == 0.25)
    assert done.retrained[0].before == done.base
    for r in done.retrained[1:]:
        assert r.before == pytest.approx(joint.top1, abs=1.01)
        assert r.top1 > r.before + 10
    assert truncate(net, EXAMPLE, data, options, store=store).retrained == done.retrained


def points(layer: str, depth: float, form: str, *pairs: tuple[float, float]) -> list[Truncated]:
    return [Truncated(layer, depth, form, 0.5, (1,), n, math.nan, 0.5, top1) for n, top1 in pairs]


def test_claims_of_known_points():
    made = [
        *points("a", 0.0, "o|ihw", (0.02, 89.5), (0.1, 80.0), (0.3, 40.0)),
        *points("b", 0.5, "o|ihw", (0.02, 90.0), (0.1, 89.5), (0.3, 60.0)),
        *points("c", 1.0, "o|ihw", (0.02, 90.0), (0.1, 89.9), (0.3, 89.5)),
        *points("a", 0.0, "oi|hw", (0.05, 90.0), (0.15, 86.0), (0.4, 85.0)),
    ]
    found = Truncation("Net", 100, 90.0, 1.0, tuple(made), ())
    assert [found.tolerates(x, "o|ihw") for x in "abc"] == [0.02, 0.1, 0.3]
    claims = found.claims
    assert claims.depth["o|ihw"][0] == pytest.approx(1)
    assert math.isnan(claims.depth["oi|hw"][0])
    assert claims.within == {"o|ihw": pytest.approx(1), "oi|hw": pytest.approx(1)}
    assert claims.spread == (pytest.approx(2), pytest.approx(10))  # of layer a at a norm loss of 10 %
    assert 0 < claims.across <= 1
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["points"][0]["relative_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": ("o|ihz",)}, "o|ihz"),
        ({"fractions": (0.0,)}, "shares of the full rank"),
        ({"fractions": ()}, "shares of the full rank"),
        ({"each": False, "joint": False}, "choose one or both"),
        ({"layers": ("nothing",)}, "'nothing' is no convolution of DigitsNet"),
        ({"fractions": (1.0,)}, "none of .* truncates a layer"),
        ({"forms": ("d|oihw",)}, "none of .* truncates a layer"),
    ],
)
def test_what_makes_no_sense(net, data, options, message):
    with pytest.raises(ConvpareError, match=message):
        truncate(net, EXAMPLE, data, replace(FEW, **options))


def test_the_figure(found, tmp_path):
    figure = truncation_figure(found)
    assert [a.text for a in figure.layout.annotations] == list(FEW.forms)
    drawn = [t for t in figure.data if t.mode == "markers"]
    assert sum(len(t.x) for t in drawn) == sum(p.layer != ALL for p in found.points)
    write_figure(figure, tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text()
    assert page.startswith("<!doctype html>") and 'src="http' not in page
    with pytest.raises(ConvpareError, match="cannot be written"):
        write_figure(figure, tmp_path / "none" / "f.html")
    assert [p.name for p in tmp_path.iterdir()] == ["f.html"]
