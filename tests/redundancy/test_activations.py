"""The oracles are plain numpy and scipy over all maps at once, and channels whose likeness is known."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.redundancy.activations import (
    ActivationOptions,
    GroupActivations,
    Ranks,
    measure_activations,
    most_similar_pairs,
)
from convpare.redundancy.similarity import SimilarityOptions, similarity_matrix
from convpare.redundancy.taps import suited

CONVS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measure(model: nn.Module, images: Tensor, group: str = "0", **options: Any) -> GroupActivations:
    graph = trace(model, suited(images[:2], model))
    return measure_activations(model, graph, images, ActivationOptions(**options))[group]


def net(order: int = 2, channels: int = 6, between: Sequence[nn.Module] = (nn.ELU(),)) -> nn.Sequential:
    torch.manual_seed(1)
    kernel = (3,) if order else ()
    return nn.Sequential(CONVS[order](3, channels, *kernel), *between, CONVS[order](channels, 2, *kernel)).eval()


def linear(*rows: Sequence[float]) -> nn.Sequential:
    """A 1×1 convolution of three inputs with these weights (and a bias as the fourth), and a reader."""
    model = nn.Sequential(nn.Conv2d(3, len(rows), 1), nn.Conv2d(len(rows), 2, 1)).eval()
    with torch.no_grad():
        weights = torch.tensor(rows)
        model[0].weight.copy_(weights[:, :3, None, None])
        model[0].bias.copy_(weights[:, 3])
    return model


def plain_ranks(maps: Tensor, centred: bool = True) -> list[float]:
    x = maps.double().transpose(0, 1).flatten(1).numpy()
    moments = np.cov(x, bias=True) if centred else x @ x.T / x.shape[1]
    values = np.sort(np.linalg.eigvals(moments).real.clip(0))[::-1]
    share = np.cumsum(values) / values.sum()
    return [
        np.exp(scipy.stats.entropy(values)),
        values.sum() ** 2 / (values**2).sum(),
        values.sum() / values[0],
        1 + int((share < 0.99).sum()),
    ]


def plain_correlation(maps: Tensor) -> np.ndarray:
    return np.abs(np.corrcoef(maps.double().transpose(0, 1).flatten(1).numpy()))


def numbers(ranks: Ranks) -> list[float]:
    return [ranks.effective_rank, ranks.participation_ratio, ranks.stable_rank, ranks.rank_99]


def matrices(found: GroupActivations) -> Tensor:
    return torch.stack([found.ssim, found.psnr, found.correlation])


@pytest.mark.parametrize("images", [5, 40])  # of 40 one batch is not enough
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_everything_is_what_numpy_says_of_all_maps_at_once(order: int, images: int):
    model, x = net(order), noise(images, 3, *[8] * order)
    with torch.no_grad():
        maps = model[:2](x)
    found = measure(model, x)
    assert (found.group, found.channels, found.images, found.taps) == ("0", 6, images, ("2",))
    assert torch.allclose(found.ssim, similarity_matrix(maps), atol=1e-6)
    assert torch.allclose(found.psnr, similarity_matrix(maps, SimilarityOptions("psnr")), atol=1e-4)
    assert np.allclose(found.correlation, plain_correlation(maps), atol=1e-6)
    assert np.allclose(numbers(found.ranks), plain_ranks(maps), rtol=1e-5)
    assert np.allclose(numbers(measure(model, x, centred=False).ranks), plain_ranks(maps, centred=False), rtol=1e-5)
    assert (found.dead, found.nearly_dead) == ((), ())
    assert all(m.dtype == torch.float64 for m in (found.ssim, found.psnr, found.correlation))


@pytest.mark.parametrize("options", [{"tap": "conv"}, {"window": "gaussian"}, {"data_range": "image"}])
def test_options_reach_the_maps_and_the_similarity(options: dict[str, Any]):
    model, x = net(), noise(4, 3, 16, 16)
    with torch.no_grad():
        maps = model[:1](x) if "tap" in options else model[:2](x)
    how = {k: v for k, v in options.items() if k != "tap"}
    found = measure(model, x, **options)
    assert torch.allclose(found.ssim, similarity_matrix(maps, SimilarityOptions("ssim", **how)), atol=1e-6)
    assert torch.allclose(found.psnr, similarity_matrix(maps, SimilarityOptions("psnr", **how)), atol=1e-4)
    assert np.allclose(found.correlation, plain_correlation(maps), atol=1e-6)


def test_equal_scaled_and_independent_channels():
    found = measure(linear([1, 2, 3, 0.5], [1, 2, 3, 0.5], [-2, -4, -6, 1], [0, 3, -2, 0]), noise(8, 3, 9, 9))
    assert found.ssim[0, 1] == pytest.approx(1, abs=1e-12)
    assert found.psnr[0, 1] == 100
    assert found.correlation[0, 1:3].tolist() == pytest.approx([1, 1], abs=1e-9)
    assert found.ssim[0, 2] < 0
    assert found.correlation[0, 3] < 0.1
    for measure_name, value in (("ssim", 1), ("psnr", 100), ("correlation", 1)):
        assert found.pairs[measure_name][0] == (0, 1, pytest.approx(value))
    assert found.ranks.rank_99 == 2
    assert 1 < found.ranks.stable_rank < 2


def test_orthogonal_channels_of_equal_energy_have_full_rank():
    model = linear(*(torch.eye(3, 4) * 5).tolist())
    x = torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 2, 2)
    found = measure(model, torch.cat([x, -x]))
    assert numbers(found.ranks) == pytest.approx([3, 3, 3, 3])
    assert found.correlation.tolist() == torch.eye(3).tolist()


def test_dead_constant_and_nearly_dead_channels():
    tiny = 1e-4
    model = linear([0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0.7], [tiny, 0, 0, 9], [0, 1, 1, 0], [0.1, 0, 0, 0])
    found = measure(model, noise(4, 3, 5, 5))
    assert found.dead == (0, 2)
    assert found.nearly_dead == (3,)
    off = ~torch.eye(6, dtype=torch.bool)
    assert (found.correlation[[0, 2]][off[[0, 2]]] == 0).all()
    assert (found.correlation.diagonal() == 1).all()
    for pairs in found.pairs.values():
        assert len(pairs) == 4 * 3 / 2
        assert not {0, 2} & {channel for pair in pairs for channel in pair[:2]}
    assert found.correlation[3, 5] == pytest.approx(1, abs=1e-2)  # float32 maps 9 ± 1e-4


def test_a_channel_counts_as_nearly_dead_below_a_millionth_of_the_mean_variance():
    x = noise(4, 3, 6, 6)
    for scale, expected in ((1.1e-3, ()), (0.9e-3, (1,))):
        variance = (scale * x[:, :1]).double().var(correction=0) / (1 * x[:, :1]).double().var(correction=0)
        weight = scale * float(np.sqrt(1 / 2))  # two channels: the mean is half of the large one's
        assert variance == pytest.approx(scale**2)
        assert measure(linear([1, 0, 0, 0], [weight, 0, 0, 0]), x).nearly_dead == expected


def test_a_group_without_life():
    found = measure(linear([0, 0, 0, 0], [0, 0, 0, 2]), noise(4, 3, 5, 5))
    assert numbers(found.ranks) == [0, 0, 0, 0]
    assert found.dead == (0, 1)
    assert found.correlation.tolist() == [[1, 0], [0, 1]]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["pairs"] == {
        "ssim": [],
        "psnr": [],
        "correlation": [],
    }
    about_zero = measure(linear([0, 0, 0, 0], [0, 0, 0, 2]), noise(4, 3, 5, 5), centred=False)
    assert numbers(about_zero.ranks) == pytest.approx([1, 1, 1, 1])


class Residual(nn.Module):
    """A stream that two layers read, before and after something is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.last = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.last(y + self.branch(y))


def test_several_readers_are_averaged():
    torch.manual_seed(3)
    model, x = Residual().eval(), noise(6, 3, 8, 8)
    with torch.no_grad():
        model.stem.weight[1] = 0
        model.stem.bias[1] = 0  # dead for the first reader, not for the second
        model.stem.weight[4] = model.branch.weight[4] = 0  # for both
        model.stem.bias[4] = model.branch.bias[4] = 0
        first = F.relu(model.stem(x))
        second = first + model.branch(first)
    found = measure(model, x, "stem")
    assert found.taps == ("branch", "last")
    assert found.dead == (4,)
    for got, options in ((found.ssim, SimilarityOptions()), (found.psnr, SimilarityOptions("psnr"))):
        expected = (similarity_matrix(first, options) + similarity_matrix(second, options)) / 2
        assert torch.allclose(got, expected, atol=1e-4)
    live = [0, 2, 3]
    expected = (plain_correlation(first[:, live]) + plain_correlation(second[:, live])) / 2
    assert np.allclose(found.correlation[live][:, live], expected, atol=1e-6)
    expected = (np.array(plain_ranks(first)) + plain_ranks(second)) / 2
    assert np.allclose(numbers(found.ranks), expected, rtol=1e-5)


def three_groups() -> nn.Sequential:
    torch.manual_seed(2)
    between = [nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)]
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), *between).eval()


def passes_of(model: nn.Module, call: Callable[[], object]) -> list[int]:
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    call()
    handle.remove()
    return sizes


def test_batches_and_passes_fit_into_memory_and_do_not_change_the_result():
    model, x = three_groups(), noise(35, 3, 12, 12)
    graph = trace(model, x[:1])
    results, sizes = [], []
    per_image = 32 * 12 * 10 * 10  # the largest maps
    for limit in (2**28, 8 * per_image, 3 * 8 * 12**2, 1):
        options = ActivationOptions(memory_limit=limit)
        sizes.append(passes_of(model, lambda o=options: results.append(measure_activations(model, graph, x, o))))
    assert sizes[0] == [1, 32, 3, 32, 3]  # one image to see the sizes, two passes
    assert sizes[1] == [1, *[8, 8, 8, 8, 3] * 2]
    assert sizes[2] == [1, *[1] * 35 * 3]  # the sums of 12 channels in one pass, those of 8 and 5 in another
    assert sizes[3] == [1, *[1] * 35 * 4]
    for other in results[1:]:
        for name, found in results[0].items():
            assert torch.allclose(matrices(other[name]), matrices(found), rtol=1e-4, atol=1e-5)
            assert numbers(other[name].ranks) == pytest.approx(numbers(found.ranks), rel=1e-5)
            assert [p[:2] for p in other[name].pairs["ssim"]] == [p[:2] for p in found.pairs["ssim"]]


def test_the_split_changes_the_last_digits_only():
    model, x = three_groups().double(), noise(35, 3, 12, 12).double()
    graph = trace(model, x[:1])
    one, other = (measure_activations(model, graph, x, ActivationOptions(memory_limit=m)) for m in (2**28, 1))
    for name, found in one.items():
        assert torch.allclose(matrices(other[name]), matrices(found), rtol=0, atol=1e-9)
        assert numbers(other[name].ranks) == pytest.approx(numbers(found.ranks), rel=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_digits_stay_far_from_zero_and_at_any_scale(scale: float):
    model = linear([1, 2, 0, 1e6], [2, 1, 1, -1e6], [0, 1, 2, 3e6]).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale)
    x = noise(8, 3, 6, 6).double()
    with torch.no_grad():
        maps = model[0](x) / scale
    varying = maps - torch.tensor([1e6, -1e6, 3e6]).reshape(3, 1, 1)
    found = measure(model, x)
    assert np.allclose(found.correlation, plain_correlation(varying), atol=1e-8)
    assert np.allclose(numbers(found.ranks), plain_ranks(varying), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_may_have_any_precision(dtype: torch.dtype):
    model, x = net().to(dtype), noise(5, 3, 8, 8)
    with torch.no_grad():
        maps = model[:2](x.to(dtype))
    found = measure(model, x)
    assert torch.allclose(found.ssim, similarity_matrix(maps), atol=1e-9)
    assert np.allclose(found.correlation, plain_correlation(maps), atol=1e-9)


def test_the_model_is_left_as_it_was():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand_like(x)

    model, x = net(between=(nn.BatchNorm2d(6), nn.Dropout(), Noisy())), noise(5, 3, 8, 8)
    graph = trace(net(between=(nn.BatchNorm2d(6), nn.Dropout(), nn.Identity())), x[:1])
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure_activations(model, graph, x)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_counts_images_of_all_passes():
    model, x = net(), noise(40, 3, 8, 8)
    calls: list[tuple[int, int]] = []
    measure_activations(model, trace(model, x[:1]), x, on_progress=lambda *call: calls.append(call))
    assert calls == [(32, 80), (40, 80), (72, 80), (80, 80)]


def test_json_is_finite_and_whole():
    found = measure(linear([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1e-5, 0, 0]), noise(4, 3, 4, 4), pairs=2)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["group"] == "0"
    assert (told["channels"], told["images"], told["taps"]) == (4, 4, ["1"])
    assert (told["dead"], told["nearly_dead"]) == ([2], [3])
    assert told["pairs"]["psnr"][0] == [0, 1, 100.0]
    assert [len(pairs) for pairs in told["pairs"].values()] == [2, 2, 2]
    assert told["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert told["rank_99"] == 1
    assert set(told) == {
        "group", "channels", "images", "taps", "effective_rank", "participation_ratio", "stable_rank", "rank_99",
        "dead", "nearly_dead", "pairs",
    }  # fmt: skip


def test_most_similar_pairs_by_hand():
    matrix = torch.tensor([[9.0, 0.5, 0.75, 0.1], [0.5, 9, 0.75, 0.25], [0.75, 0.75, 9, 0.625], [0.1, 0.25, 0.625, 9]])
    everyone = torch.arange(4)
    assert most_similar_pairs(matrix, everyone, 3) == ((0, 2, 0.75), (1, 2, 0.75), (2, 3, 0.625))
    assert len(most_similar_pairs(matrix, everyone, 99)) == 6
    assert most_similar_pairs(matrix, torch.tensor([0, 1, 3]), 2) == ((0, 1, 0.5), (1, 3, 0.25))
    assert most_similar_pairs(matrix, torch.tensor([1]), 2) == ()
    assert most_similar_pairs(matrix, torch.tensor([], dtype=torch.long), 2) == ()
    assert most_similar_pairs(matrix, everyone, 0) == ()


def test_a_wide_group():
    x = noise(3, 3, 7, 7)
    model = net(channels=512, between=())
    with torch.no_grad():
        model[0].weight[500] = model[0].weight[3]
        model[0].bias[500] = model[0].bias[3]
    found = measure(model, x, pairs=1)
    assert found.ssim.shape == (512, 512)
    assert [pairs[0][:2] for pairs in found.pairs.values()] == [(3, 500)] * 3
    assert found.ranks.rank_99 <= 27  # the inputs of a 3×3 kernel on three channels


def test_a_network_without_groups():
    model, x = nn.Sequential(nn.Conv2d(3, 2, 1)), noise(2, 3, 4, 4)
    assert measure_activations(model, trace(model, x), x) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tap": "relu"}, "no tap 'relu'; choose one of activation, conv"),
        ({"window": "box"}, "window is 'box'"),
        ({"data_range": "batch"}, "data_range is 'batch'"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"pairs": -1}, "pairs is -1; expected 0 or more"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], message: str):
    with pytest.raises(ConvpareError, match=message):
        ActivationOptions(**wrong)


def test_images_are_checked():
    model = net()
    graph = trace(model, noise(1, 3, 8, 8))
    with pytest.raises(ConvpareError, match=r"images have shape \(0, 3, 8, 8\); expected \(n, channels"):
        measure_activations(model, graph, torch.zeros(0, 3, 8, 8))
    with pytest.raises(ConvpareError, match=r"the model failed on images of shape \(1, 4, 8, 8\)"):
        measure_activations(model, graph, torch.zeros(2, 4, 8, 8))
    for bad in (float("nan"), float("inf")):
        x = noise(2, 3, 8, 8)
        x[1, 0, 4, 4] = bad
        with pytest.raises(ConvpareError, match="feature maps of group '0' at layer '2' hold NaN or infinity"):
            measure_activations(model, graph, x)


def test_a_network_with_two_inputs_is_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(self.a(x + y))

    x = noise(1, 3, 4, 4)
    model = Two()
    with pytest.raises(ConvpareError, match="takes 2 inputs; activations can be measured of a network with one only"):
        measure_activations(model, trace(model, (x, x)), x)
