"""QSFM by hand: what the readers see, compared pair by pair; twins and dead channels go first."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.apply import apply
from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.importance import Context, Ranking, get_criterion
from convpare.planning.planner import plan
from convpare.planning.settings import PlanOptions
from convpare.redundancy.similarity import SimilarityOptions, removal_order, similarity_matrix

MEASURES = ("ssim", "psnr")


def noise(n: int = 6, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def rank(
    measure: str, model: nn.Module, group: str, images: Tensor, gone: tuple[int, ...] = (), **options: object
) -> Ranking:
    graph = trace(model, images[:1])
    alive = graph.keep_all()
    alive[graph.group(group).start + np.array(gone, int)] = False
    context = Context(model, graph, alive, images, options, (graph.group(group),))
    return get_criterion(f"qsfm-{measure}").rank(context)[group]


def plain(channels: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3)
    ).eval()


def error(measure: str, scores: Tensor) -> np.ndarray:
    return ((1 - scores).clamp_min(0) if measure == "ssim" else 10 ** (-scores / 10)).numpy()


@pytest.mark.parametrize("images", [3, 40])  # of 40 one batch is not enough
@pytest.mark.parametrize("measure", MEASURES)
def test_the_maps_that_the_reader_sees_are_compared(measure: str, images: int):
    model, x = plain(), noise(images)
    with torch.no_grad():
        conv, seen = model[0](x), model[:3](x)
    for tap, maps in (("activation", seen), ("conv", conv)):
        for span in ("layer", "image", 4.0):
            got = rank(measure, model, "0", x, tap=tap, data_range=span)
            matrix = similarity_matrix(maps, SimilarityOptions(measure, data_range=span))
            order, scores = removal_order(matrix)
            assert got.order.tolist() == order.tolist()
            assert np.allclose(got.errors[:-1], error(measure, scores[:-1]), rtol=1e-5, atol=1e-7)
            assert got.errors[-1] == (2.0 if measure == "ssim" else max(1.0, error(measure, matrix.min())))
            assert (np.diff(got.errors) >= -1e-12).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_rules(measure: str):
    model, x = plain(), noise()
    with torch.no_grad():
        maps = model[:3](x)
    matrix = similarity_matrix(maps, SimilarityOptions(measure))
    norms = maps.double().square().sum((0, 2, 3))
    expected = {
        ("mean", "total"): removal_order(matrix, rule="mean"),
        ("max", "total"): removal_order(matrix, rule="max"),
        ("pair", "norm"): removal_order(matrix, who="norm", norms=norms),
    }
    for (rule, who), (order, _) in expected.items():
        assert rank(measure, model, "0", x, rule=rule, who=who).order.tolist() == order.tolist()
    with pytest.raises(ConvpareError, match="norms together with who='norm' and rule='pair'"):
        rank(measure, model, "0", x, rule="mean", who="norm")


def test_windows():
    model, x = plain(), noise(4, side=16)
    with torch.no_grad():
        maps = model[:3](x)
    order, scores = removal_order(similarity_matrix(maps, SimilarityOptions("ssim", "gaussian")))
    got = rank("ssim", model, "0", x, window="gaussian")
    assert got.order.tolist() == order.tolist()
    assert np.allclose(got.errors[:-1], 1 - scores[:-1], atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("twins", [(1, 6), (0, 7), (3, 4)])
def test_one_of_two_equal_channels_goes_first(measure: str, twins: tuple[int, int]):
    model = plain()
    a, b = twins
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[b] = tensor[a]
    for tap in ("activation", "conv"):
        got = rank(measure, model, "0", noise(), tap=tap)
        assert got.order[0] in twins
        assert got.errors[0] < 1e-9
        assert got.errors[1] > 1e-4


@pytest.mark.parametrize("measure", MEASURES)
def test_all_but_one_of_the_dead_go_first(measure: str):
    model = plain()
    dead = [1, 2, 5, 6]
    with torch.no_grad():
        model[0].weight[dead] = 0
        model[0].bias[dead] = 0
    got = rank(measure, model, "0", noise())
    assert set(got.order[:3]) < set(dead)
    assert (got.errors[:3] < 1e-9).all()
    assert got.errors[3] > 1e-3


@pytest.mark.parametrize("measure", MEASURES)
def test_constant_maps(measure: str):
    """A layer of one constant is wholly redundant; constants far apart are not alike."""
    model = plain()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    same = rank(measure, model, "0", noise())
    assert (same.errors[:-1] < 1e-9).all()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, 1, 2, 4, 8, 16, 32, 64]))
    got = rank(measure, model, "0", noise())
    assert got.order[0] in (0, 1)
    assert got.errors[0] < 1e-9 < got.errors[1]
    assert np.isfinite(got.errors).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_maps_of_one_position(measure: str):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Pooled()
    with torch.no_grad():
        model.conv.weight[4], model.conv.bias[4] = model.conv.weight[2], model.conv.bias[2]
        x = noise()
        maps = F.relu(model.conv(x)).mean((2, 3))
    got = rank(measure, model, "conv", x)
    assert got.order.tolist() == removal_order(similarity_matrix(maps, SimilarityOptions(measure))).order.tolist()
    assert got.order[0] in (2, 4)
    assert np.isfinite(got.errors).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_readers_are_averaged(measure: str):
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.stem(x)
            return self.a(torch.sigmoid(y)), self.b(F.relu(y))

    torch.manual_seed(3)
    model, x = Forked(), noise()
    with torch.no_grad():
        maps = [torch.sigmoid(model.stem(x)), F.relu(model.stem(x))]
    mean = torch.stack([similarity_matrix(m, SimilarityOptions(measure)) for m in maps]).mean(0)
    order, scores = removal_order(mean)
    got = rank(measure, model, "stem", x)
    assert got.order.tolist() == order.tolist()
    assert np.allclose(got.errors[:-1], error(measure, scores[:-1]), rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_gone_goes_first_and_is_not_compared(measure: str):
    model, x = plain(), noise()
    with torch.no_grad():
        matrix = similarity_matrix(model[:3](x), SimilarityOptions(measure))
    gone = (2, 5)
    left = [c for c in range(8) if c not in gone]
    order = removal_order(matrix[left][:, left]).order.tolist()
    got = rank(measure, model, "0", x, gone=gone)
    assert got.order.tolist() == [*gone, *(left[i] for i in order)]
    assert got.errors[:2].tolist() == [0, 0]
    alone = rank(measure, model, "0", x, gone=tuple(range(7)))
    assert alone.order[-1] == 7
    assert alone.errors[-1] >= 1


def test_the_last_channel_is_the_worst_in_any_range():
    """A range smaller than the maps' makes PSNR negative."""
    errors = rank("psnr", plain(), "0", noise(), data_range=0.01).errors
    assert errors[0] > 1
    assert errors[-1] == errors.max()


class Separable(nn.Module):
    """Expand, depthwise, project, as MobileNetV2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.bn2(self.depth(F.relu6(self.bn1(self.expand(x)))))))


@pytest.mark.parametrize("measure", MEASURES)
def test_expand_depthwise_and_project_go_together(measure: str):
    torch.manual_seed(0)
    model, x = Separable().eval(), noise()
    with torch.no_grad():  # channels 4 and 9 are equal before and after the depthwise layer
        for tensor in (model.expand.weight, model.depth.weight):
            tensor[9] = tensor[4]
    graph = trace(model, x[:1])
    assert [(g.name, g.producers) for g in graph.groups] == [("expand", ("expand", "depth"))]
    made = plan(model, x[:1], x, macs=0.5, criterion=f"qsfm-{measure}", graph=graph)
    (edit,) = made.edits
    assert not {4, 9} <= set(edit.keep)
    small = apply(model, made)
    keep = list(edit.keep)
    for name in ("expand.weight", "bn1.weight", "depth.weight", "bn2.running_var"):
        assert torch.equal(small.state_dict()[name], model.state_dict()[name][keep]), name
    assert torch.equal(small.project.weight, model.project.weight[:, keep])
    assert small.depth.groups == len(keep)


def test_needs_images():
    graph = trace(plain(), noise()[:1])
    for measure in MEASURES:
        with pytest.raises(ConvpareError, match=f"qsfm-{measure} compares feature maps and needs images"):
            get_criterion(f"qsfm-{measure}").rank(Context(plain(), graph, graph.keep_all()))


def test_options_travel_with_the_plan():
    model, x = plain(), noise()
    make = partial(plan, model, x[:1], x, macs=0.6, criterion="qsfm-psnr")
    made = make(options=PlanOptions(criterion_options={"tap": "conv", "who": "norm"}))
    assert made.options["criterion_options"] == {"tap": "conv", "who": "norm"}
    assert made.options["allocation"] == "uniform"
    assert made.edits != make().edits
