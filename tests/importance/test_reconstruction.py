"""The criterion's errors are those of brute-force least squares over all positions, step by step."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.importance import Context, Ranking, get_criterion, reconstruction
from convpare.redundancy import moments
from convpare.redundancy.moments import Sampling, output_moments


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All positions, no ridge to speak of, one channel at a time."""
    monkeypatch.setattr(moments, "SAMPLING", Sampling(per_unknown=10**9))
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-10)
    yield


def rank(model: nn.Module, group: str, images: Tensor, gone: tuple[int, ...] = ()) -> tuple[Ranking, Graph]:
    graph = trace(model, images[:1])
    alive = graph.keep_all()
    alive[graph.group(group).start + np.array(gone, int)] = False
    context = Context(model, graph, alive, images, {}, (graph.group(group),))
    return get_criterion("reconstruction").rank(context)[group], graph


def test_sensitivity_is_the_error_of_the_networks_output():
    """The same errors, the reader's outputs weighted by F; together about the relative error of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 4)).eval()
    images = torch.randn(64, 3, 6, 6)
    graph = trace(model, images[:1])
    context = Context(model, graph, graph.keep_all(), images, {}, (graph.group("0"),))
    found = get_criterion("sensitivity").rank(context)["0"]
    weights = output_moments(model, [graph.layer("2")], images, moments.SAMPLING)["2"][0]
    values, vectors = torch.linalg.eigh(weights)
    root = ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).numpy()
    cols = F.unfold(model[:2](images), 3).movedim(1, 0).flatten(1).detach().double().numpy()
    weight = model[2].weight.detach().double().reshape(5, -1).numpy()
    for count in range(1, 7):
        gone = [9 * c + t for c in found.order[:count].tolist() for t in range(9)]
        expected = brute(root @ weight, cols, gone) / len(images)
        assert found.errors[:count].sum() == pytest.approx(expected, rel=5e-3, abs=1e-6)
    whole, y = model(images), model[2](model[:2](images))
    everything = (model[3:](y - F.conv2d(model[:2](images), model[2].weight)) - whole).square().sum()
    share = float(everything / (whole - whole.mean(0)).square().sum())
    assert found.errors.sum() == pytest.approx(share, rel=0.5)


def brute(weight: np.ndarray, x: np.ndarray, gone: list[int]) -> float:
    """‖W x − W' x'‖² with the best W' for the inputs x' without `gone`, for one group of a layer."""
    left = np.setdiff1d(np.arange(len(x)), gone)
    y = weight @ x
    fit = np.linalg.lstsq(x[left].T, y.T, rcond=None)[0]
    return float(np.square(y - (x[left].T @ fit).T).sum())


class Reader:
    """What a layer reads and multiplies, by `F.unfold` and plain slices, as (weight, x, blocks) of each group."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]], taps: int, copies: int = 1) -> None:
        self.parts = [(w.detach().double().numpy(), x.detach().double().numpy()) for w, x in parts]
        self.taps, self.copies = taps, copies

    def error(self, channels: list[int]) -> float:
        gone = [self.taps * c + t for c in channels for t in range(self.taps)]
        energy = sum(float(np.square(w @ x).sum()) for w, x in self.parts)
        return sum(brute(w, x, gone) for w, x in self.parts) / energy


def unfolded(conv: nn.Conv2d, x: Tensor) -> Reader:
    cols = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (b, channels · taps, positions)
    taps = conv.weight[0, 0].numel()
    parts = cols.reshape(len(x), conv.groups, -1, cols.shape[2]).permute(1, 2, 0, 3).flatten(2)
    return Reader(list(zip(conv.weight.reshape(conv.groups, -1, parts.shape[1]), parts, strict=True)), taps)


def assert_exact(ranking: Ranking, readers: list[Reader], channels: int) -> None:
    """The order is the greedy one, and its errors add up to those of brute force."""
    singles = [sum(r.error([c]) for r in readers) for c in range(channels)]
    assert ranking.order[0] == int(np.argmin(singles))
    assert ranking.errors[0] == pytest.approx(min(singles), rel=1e-3, abs=1e-7)
    for count in range(1, channels + 1):
        gone = ranking.order[:count].tolist()
        expected = sum(r.error(gone) for r in readers)
        assert ranking.errors[:count].sum() == pytest.approx(expected, rel=2e-3, abs=1e-6)
        if count < channels:  # no other channel would have been cheaper next
            others = [c for c in range(channels) if c not in gone[:-1]]
            best = min(sum(r.error([*gone[:-1], c]) for r in readers) for c in others)
            assert expected <= best * (1 + 1e-3) + 1e-7


IMAGES = torch.randn(12, 3, 7, 7, generator=torch.Generator().manual_seed(0))


def front(channels: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
        nn.Conv2d(6, 4, 1),
    ],
    ids=str,
)
def test_a_convolution_reads(conv: nn.Conv2d):
    model = nn.Sequential(front(), conv)
    ranking, _ = rank(model, "0.0", IMAGES)
    assert_exact(ranking, [unfolded(conv, model[0](IMAGES))], 6)
    assert sorted(ranking.order.tolist()) == list(range(6))
    assert ranking.errors.sum() == pytest.approx(1.0)  # without inputs nothing is left of the output


def test_a_grouped_convolution_reads():
    """A channel of the group stands in every group of the convolution, and goes from all of them."""
    model = nn.Sequential(front(12), nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    ranking, graph = rank(model, "0.0", IMAGES)
    assert graph.group("0.0").channels == 6
    assert_exact(ranking, [unfolded(model[1], model[0](IMAGES))], 6)


def test_a_linear_layer_reads():
    model = nn.Sequential(front(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    images = torch.cat([IMAGES, 2 * IMAGES.flip(2), IMAGES.exp() / 3])
    ranking, _ = rank(model, "0.0", images)
    x = model[0](images).mean((2, 3)).T
    assert_exact(ranking, [Reader([(model[3].weight, x)], taps=1)], 6)


def test_a_linear_layer_reads_flattened_maps():
    model = nn.Sequential(front(4), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(4 * 4, 3))
    images = torch.randn(90, 3, 7, 7, generator=torch.Generator().manual_seed(4))
    ranking, _ = rank(model, "0.0", images)
    assert_exact(ranking, [Reader([(model[3].weight, model[:3](images).T)], taps=4)], 4)


def test_a_linear_layer_reads_every_position():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.mix = front(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.front(x).permute(0, 2, 3, 1))

    model = Mixer()
    ranking, _ = rank(model, "front.0", IMAGES)
    x = model.front(IMAGES).permute(1, 0, 2, 3).flatten(1)
    assert_exact(ranking, [Reader([(model.mix.weight, x)], taps=1)], 6)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_reads(groups: int):
    """Position by position: each input element spreads its weights over the output."""
    up = nn.ConvTranspose2d(6 * groups, 4, 2, stride=2, groups=groups)  # no overlap: exact
    model = nn.Sequential(front(6 * groups), up, nn.ReLU(), nn.Conv2d(4, 2, 1))
    ranking, graph = rank(model, "0.0", IMAGES)
    assert graph.group("0.0").channels == 6
    x = model[0](IMAGES).permute(1, 0, 2, 3).flatten(1).reshape(groups, 6, -1)
    weight = up.weight.reshape(groups, 6, -1).transpose(1, 2)
    assert_exact(ranking, [Reader(list(zip(weight, x, strict=True)), taps=1)], 6)


def test_readers_add_up_and_depthwise_ones_do_not_count():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = front()
            self.depth, self.a, self.b = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.front(x)
            return self.a(F.relu(self.depth(y))), self.b(y)

    model = Forked()
    ranking, graph = rank(model, "front.0", IMAGES)
    assert graph.group("front.0").consumers == ("a", "b")
    assert graph.group("front.0").producers == ("front.0", "depth")
    y = model.front(IMAGES)
    assert_exact(ranking, [unfolded(model.a, F.relu(model.depth(y))), unfolded(model.b, y)], 6)


def test_a_layer_that_reads_several_groups():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = front(5), front(4), nn.Conv2d(9, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.two(x).sigmoid(), self.one(x)], 1))

    model = Joined()
    ranking, _ = rank(model, "one.0", IMAGES)
    x = torch.cat([model.two(IMAGES).sigmoid(), model.one(IMAGES)], 1)
    reader = unfolded(model.last, x)
    singles = [reader.error([4 + c]) for c in range(5)]  # behind the other group's four
    assert ranking.order[0] == int(np.argmin(singles))
    assert ranking.errors.sum() == pytest.approx(reader.error([4, 5, 6, 7, 8]), rel=1e-3)


def test_what_depends_on_others_costs_nothing_and_goes_first(monkeypatch: pytest.MonkeyPatch):
    """Channel 3 is the sum of channels 0 and 5, and nothing bends them before they are read."""
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[3] = tensor[0] + tensor[5]
    ranking, _ = rank(model, "0", IMAGES)
    assert ranking.order[0] in (0, 3, 5)
    assert ranking.errors[0] < 1e-4
    assert ranking.errors[1] > 1e-2


def test_a_dead_channel_costs_nothing():
    model = nn.Sequential(front(), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[0][0].weight[2] = 0
        model[0][0].bias[2] = -1.0
    ranking, _ = rank(model, "0.0", IMAGES)
    assert ranking.order[0] == 2
    assert ranking.errors[0] == pytest.approx(0, abs=1e-9)


def test_of_many_twins_one_of_each_goes(monkeypatch: pytest.MonkeyPatch):
    """Several channels go at a time; two that make up for each other do not."""
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 8, 1))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[128:] = tensor[:128]
    ranking, _ = rank(model, "0", torch.randn(20, 3, 12, 12, generator=torch.Generator().manual_seed(2)))
    first = ranking.order[:100] % 128
    assert len(set(first.tolist())) == 100
    assert ranking.errors[:100].sum() < 1e-3
    assert sorted(ranking.order.tolist()) == list(range(256))


def test_wide_readers_are_scored_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moments, "SAMPLING", Sampling(widest=20))
    model = nn.Sequential(front(), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1))
    ranking, _ = rank(model, "0.0", IMAGES)
    ((weight, x),) = unfolded(model[1], model[0](IMAGES)).parts
    parts = (np.square(weight).sum(0) * np.square(x).mean(1)).reshape(6, 9).sum(1)
    assert ranking.order.tolist() == parts.argsort().tolist()
    assert np.allclose(ranking.errors, np.sort(parts) / parts.sum(), rtol=1e-5)


def test_what_is_gone_goes_first():
    model = nn.Sequential(front(), nn.Conv2d(6, 4, 3))
    ranking, graph = rank(model, "0.0", IMAGES)
    again, _ = rank(model, "0.0", IMAGES, gone=(4, 1))
    assert again.order[:2].tolist() == [1, 4]
    assert again.errors[:2].tolist() == [0, 0]
    assert again.order[2] == next(c for c in ranking.order if c not in (1, 4))
    assert graph.group("0.0").consumers == ("1",)


def test_fewer_positions_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(front(), nn.Conv2d(6, 4, 3))
    images = torch.randn(60, 3, 15, 15, generator=torch.Generator().manual_seed(2))
    every, _ = rank(model, "0.0", images)
    monkeypatch.setattr(moments, "SAMPLING", Sampling(per_unknown=32))
    monkeypatch.setattr(moments, "SAMPLING", Sampling(least=2000))
    some, _ = rank(model, "0.0", images)
    assert some.order.tolist() == every.order.tolist()
    assert not np.array_equal(some.errors, every.errors)
    assert np.allclose(some.errors, every.errors, rtol=0.15)
    assert np.array_equal(rank(model, "0.0", images)[0].errors, some.errors)


def test_errors():
    model = nn.Sequential(front(), nn.Conv2d(6, 4, 3))
    graph = trace(model, IMAGES[:1])
    with pytest.raises(ConvpareError, match="looks at activations and needs images"):
        get_criterion("reconstruction").rank(Context(model, graph, graph.keep_all()))
    with torch.no_grad():
        model[0][0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConvpareError, match=r"layer '1' .*reads NaN or infinite values; take l2"):
        rank(model, "0.0", IMAGES)
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6))
    assert trace(depthwise, IMAGES[:1]).groups == ()  # no reader: the output

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.kernel = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(2, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.a(x), self.kernel)

    with pytest.raises(ConvpareError, match="layer 'kernel' does not run as a module"):
        rank(Scaled(), "a", IMAGES)
