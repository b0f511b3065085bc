"""The oracles are hand-computed numbers, plain numpy, scikit-image and torchmetrics."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.redundancy.similarity import (
    PSNR_MAX,
    DataRange,
    SimilarityAccumulator,
    SimilarityOptions,
    removal_order,
    similarity_matrix,
)

GLOBAL, WINDOWED, PSNR = SimilarityOptions(), SimilarityOptions(window="gaussian"), SimilarityOptions(measure="psnr")


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    """Correlated maps, of channels of different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
    own = torch.randn(shape, generator=generator, dtype=torch.float64)
    return common + own * torch.rand(channel, generator=generator) + torch.randn(channel, generator=generator)


def pairwise(maps: Tensor, measure: Callable[[np.ndarray, np.ndarray], float]) -> Tensor:
    """The mean over the images of a measure of two maps, pair by pair."""
    images = maps.double().numpy()
    values = [[[measure(x, y) for y in image] for x in image] for image in images]
    return torch.tensor(values, dtype=torch.float64).mean(0)


def plain_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    numerator = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
    return float(numerator / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))


def assert_close(actual: Tensor, expected: Tensor | list[Any] | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


class TestSsim:
    def test_opposite_maps_by_hand(self) -> None:
        maps = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
        off = (-0.5 + 0.0009) / (0.5 + 0.0009)  # means 1/2, variances 1/4, covariance -1/4, D = 1
        assert_close(similarity_matrix(maps), [[1, off], [off, 1]])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("spatial", [(7,), (8, 5), (3, 4, 2)])
    def test_global_is_the_formula(self, dtype: torch.dtype, spatial: tuple[int, ...]) -> None:
        maps = random_maps(3, 5, *spatial).to(dtype)
        data_range = float(maps.double().max() - maps.double().min())
        assert_close(similarity_matrix(maps), pairwise(maps, lambda x, y: plain_ssim(x, y, data_range)))

    @pytest.mark.parametrize("spatial", [(11, 11), (12, 17), (32, 20)])
    def test_gaussian_is_scikit_image(self, spatial: tuple[int, ...]) -> None:
        maps = random_maps(2, 4, *spatial)
        expected = pairwise(
            maps,
            lambda x, y: structural_similarity(
                x, y, data_range=5.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            ),
        )
        assert_close(similarity_matrix(maps, replace(WINDOWED, data_range=5.0)), expected)

    def test_gaussian_is_torchmetrics_inside_the_border(self) -> None:
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure as ssim
        except (ImportError, RuntimeError) as error:  # RuntimeError: it imports torchvision, built for another torch
            pytest.skip(f"torchmetrics cannot be imported: {error}")
        maps = random_maps(3, 2, 16, 14)
        _, full = ssim(maps[:, :1], maps[:, 1:], data_range=5.0, return_full_image=True)
        actual = similarity_matrix(maps, replace(WINDOWED, data_range=5.0))[0, 1]
        torch.testing.assert_close(actual, full[..., 5:-5, 5:-5].mean(), rtol=0, atol=1e-12)

    def test_gaussian_keeps_its_digits_far_from_zero(self) -> None:
        maps = random_maps(2, 3, 13, 13)
        near, far = (similarity_matrix(maps + offset, WINDOWED) for offset in (1e4, 1e7))
        assert_close(near, far, 1e-6)  # at both the luminance factor is 1

    @pytest.mark.parametrize("options", [GLOBAL, WINDOWED, PSNR])
    def test_rounding_does_not_show(self, options: SimilarityOptions) -> None:
        maps = random_maps(3, 64, 16, 16)
        maps[:, 32:] = maps[:, :32]
        actual, largest = similarity_matrix(maps, options), PSNR_MAX if options is PSNR else 1.0
        assert torch.equal(actual, actual.T)
        assert actual.max() == largest
        assert actual.diagonal().tolist() == [largest] * 64
        assert_close(actual.diagonal(32), [largest] * 32)

    @pytest.mark.parametrize("spatial", [(10, 30), (8, 8), (40,), (11, 11, 11), ()])
    def test_gaussian_is_global_where_no_window_fits(self, spatial: tuple[int, ...]) -> None:
        maps = random_maps(2, 3, *spatial)
        assert torch.equal(similarity_matrix(maps, WINDOWED), similarity_matrix(maps, GLOBAL))


class TestPsnr:
    @pytest.mark.parametrize(("data_range", "decibel"), [(1.0, 20.0), (0.2, 6.020599913279624), ("layer", 0.0)])
    def test_constant_difference_by_hand(self, data_range: str | float, decibel: float) -> None:
        maps = torch.tensor([0.0, 0.1], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
        actual = similarity_matrix(maps, replace(PSNR, data_range=data_range))
        assert_close(actual, [[100, decibel], [decibel, 100]])

    def test_is_scikit_image(self) -> None:
        maps = random_maps(2, 4, 6, 7)
        with np.errstate(divide="ignore"):
            expected = pairwise(maps, lambda x, y: min(100, peak_signal_noise_ratio(x, y, data_range=5.0)))
        assert_close(similarity_matrix(maps, replace(PSNR, data_range=5.0)), expected, 1e-11)

    def test_averages_decibels(self) -> None:
        maps = torch.zeros(2, 2, 1, dtype=torch.float64)
        maps[0, 1], maps[1, 1] = 0.1, 0.001
        assert_close(similarity_matrix(maps, replace(PSNR, data_range=1))[0, 1], (20 + 60) / 2)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_accuracy_for_nearly_equal_maps(self, offset: float, seed: int) -> None:
        noise = torch.logspace(0, -5, 11, dtype=torch.float64)[:, None, None] * random_maps(1, 11, 20, 20, seed=seed)[0]
        common = torch.rand(20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        maps = (noise + common + offset)[None]
        error = (maps[0, :, None] - maps[0]).square().mean((2, 3)) / (maps.max() - maps.min()) ** 2
        direct = -10 * error.clamp_min(1e-10).log10()
        deviation = (similarity_matrix(maps, PSNR) - direct).abs()
        assert direct[-1, -2] > 85
        assert deviation[direct < 50].max() < 1e-7
        assert deviation.max() < 1e-5


class TestDataRange:
    def test_layer_is_the_range_over_all_images(self) -> None:
        maps = random_maps(4, 3, 5, 5)
        number = float(maps.max() - maps.min())
        assert torch.equal(similarity_matrix(maps), similarity_matrix(maps, replace(GLOBAL, data_range=number)))

    @pytest.mark.parametrize("options", [GLOBAL, WINDOWED, PSNR])
    def test_image_is_the_range_of_each(self, options: SimilarityOptions) -> None:
        maps = random_maps(3, 4, 12, 12)
        expected = torch.stack([similarity_matrix(image[None], options) for image in maps]).mean(0)
        scale = torch.tensor([1.0, 30.0, 1e-3]).reshape(3, 1, 1, 1)
        assert_close(similarity_matrix(maps * scale, replace(options, data_range="image")), expected)


@pytest.mark.parametrize("data_range", ["layer", "image", 2.0])
@pytest.mark.parametrize("options", [GLOBAL, WINDOWED])
class TestDegenerateMaps:
    def test_dead_maps_are_identical(self, options: SimilarityOptions, data_range: str | float) -> None:
        maps = random_maps(2, 3, 12, 12)
        maps[:, :2] = 0
        ssim = similarity_matrix(maps, replace(options, data_range=data_range))
        psnr = similarity_matrix(maps, replace(PSNR, data_range=data_range))
        assert (float(ssim[0, 1]), float(psnr[0, 1])) == (1, PSNR_MAX)
        assert ssim[0, 2] < 0.5
        assert psnr[0, 2] < 30

    def test_constant_maps_have_the_luminance_factor(self, options: SimilarityOptions, data_range: str | float) -> None:
        maps = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 12, 12)
        actual = similarity_matrix(maps, replace(options, data_range=data_range))  # each range is 2
        assert_close(actual[0, 1], 1.5004 / 2.5004)
        assert_close(actual[0, 2], 2.5004 / 6.5004)

    def test_single_positions_have_the_luminance_factor(
        self, options: SimilarityOptions, data_range: str | float
    ) -> None:
        values = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
        expected = [[1, -1.9996 / 2.0004, 1.0004 / 1.2504]]
        for maps in (values, values[..., None, None]):
            assert_close(similarity_matrix(maps, replace(options, data_range=data_range))[:1], expected)

    def test_one_constant_everywhere_is_identical(self, options: SimilarityOptions, data_range: str | float) -> None:
        for constant in (0.0, 0.1, -3.0):
            maps = torch.full((2, 3, 12, 12), constant)
            ssim = similarity_matrix(maps, replace(options, data_range=data_range))
            assert torch.equal(ssim, torch.ones(3, 3).double())
            psnr = similarity_matrix(maps, replace(PSNR, data_range=data_range))
            assert torch.equal(psnr, torch.full((3, 3), PSNR_MAX).double())

    def test_one_channel(self, options: SimilarityOptions, data_range: str | float) -> None:
        maps = random_maps(2, 1, 12, 12)
        assert similarity_matrix(maps, replace(options, data_range=data_range)).tolist() == [[1.0]]
        assert similarity_matrix(maps, replace(PSNR, data_range=data_range)).tolist() == [[100.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("data_range", ["layer", "image", 1.0])
def test_non_finite_maps_are_refused(bad: float, data_range: str | float) -> None:
    maps = random_maps(2, 3, 4, 4)
    maps[1, 2, 3, 3] = bad
    with pytest.raises(ConvpareError, match="finite maps"):
        similarity_matrix(maps, SimilarityOptions(data_range=data_range))


@pytest.mark.parametrize("shape", [(4,), (0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_maps_without_values_or_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConvpareError, match="n, C"):
        similarity_matrix(torch.zeros(shape))


def test_complex_maps_are_refused() -> None:
    with pytest.raises(ConvpareError, match="real"):
        similarity_matrix(torch.zeros(1, 2, 2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"measure": "mse"},
        {"window": "box"},
        {"data_range": "batch"},
        {"data_range": -1.0},
        {"data_range": float("nan")},
        {"data_range": float("inf")},
        {"memory_limit": 0},
    ],
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConvpareError, match=next(iter(wrong))):
        SimilarityOptions(**wrong)


def test_works_inside_autograd_inference_and_autocast() -> None:
    maps = random_maps(2, 3, 12, 12)
    expected = similarity_matrix(maps)
    assert not similarity_matrix(maps.clone().requires_grad_()).requires_grad
    accumulator = SimilarityAccumulator(SimilarityOptions(data_range="image"))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_matrix(maps), expected)
        accumulator.update(maps)
    accumulator.update(maps)
    assert_close(accumulator.result(), similarity_matrix(maps, SimilarityOptions(data_range="image")))
    assert maps.equal(random_maps(2, 3, 12, 12))  # nothing is done in place


class TestAccumulator:
    @pytest.mark.parametrize("data_range", ["image", 5.0])
    @pytest.mark.parametrize("options", [GLOBAL, WINDOWED, PSNR])
    def test_batches_and_memory_change_nothing(self, options: SimilarityOptions, data_range: str | float) -> None:
        maps = random_maps(7, 4, 12, 13)
        options = replace(options, data_range=data_range)
        accumulator = SimilarityAccumulator(replace(options, memory_limit=1))
        for batch in (maps[:1], maps[1:4], maps[4:]):
            accumulator.update(batch)
        assert_close(accumulator.result(), similarity_matrix(maps, options))

    def test_two_passes_are_the_layer_range(self) -> None:
        maps = random_maps(6, 4, 5, 5).bfloat16()
        data_range = DataRange()
        for batch in maps.chunk(3):
            data_range.update(batch)
        assert data_range.result() == float(maps.double().max() - maps.double().min())
        accumulator = SimilarityAccumulator(SimilarityOptions(data_range=data_range.result()))
        for batch in maps.chunk(2):
            accumulator.update(batch)
        assert_close(accumulator.result(), similarity_matrix(maps))

    def test_a_dead_layer_goes_through_both_passes(self) -> None:
        dead, data_range = torch.zeros(2, 3, 4, 4), DataRange()
        data_range.update(dead)
        accumulator = SimilarityAccumulator(SimilarityOptions(data_range=data_range.result()))
        accumulator.update(dead)
        assert torch.equal(accumulator.result(), torch.ones(3, 3).double())
        with pytest.raises(ConvpareError, match="data_range is 0 but"):
            accumulator.update(random_maps(2, 3, 4, 4))

    def test_spatial_size_may_change_and_images_count_equally(self) -> None:
        small, large = random_maps(1, 3, 4, 4), random_maps(3, 3, 12, 12, seed=1)
        options = replace(WINDOWED, data_range=5.0)
        accumulator = SimilarityAccumulator(options)
        accumulator.update(small)
        accumulator.update(large)
        expected = (similarity_matrix(small, options) + 3 * similarity_matrix(large, options)) / 4
        assert_close(accumulator.result(), expected)

    def test_misuse_is_refused(self) -> None:
        with pytest.raises(ConvpareError, match="DataRange"):
            SimilarityAccumulator(SimilarityOptions(data_range="layer"))
        with pytest.raises(ConvpareError, match="no maps"):
            DataRange().result()
        accumulator = SimilarityAccumulator(SimilarityOptions(data_range="image"))
        with pytest.raises(ConvpareError, match="no maps"):
            accumulator.result()
        accumulator.update(torch.ones(1, 3, 2, 2))
        with pytest.raises(ConvpareError, match="4 channels"):
            accumulator.update(torch.ones(1, 4, 2, 2))


maps_strategy = array_shapes(min_dims=3, max_dims=4, max_side=4).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(-1000, 1000))
)


@settings(max_examples=60, deadline=None)
@given(values=maps_strategy, seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6), window=st.booleans())
def test_similarity_properties(values: np.ndarray, seed: int, scale: float, window: bool) -> None:
    maps = torch.from_numpy(values).double() / 8
    if window:
        maps = torch.nn.functional.pad(maps, (0, 11, *[0, 11] * (maps.ndim - 3)), mode="constant")
    options = WINDOWED if window else GLOBAL
    ssim = similarity_matrix(maps, options)
    assert torch.equal(ssim, ssim.T)
    assert torch.equal(ssim.diagonal(), torch.ones(len(ssim)).double())
    assert ssim.abs().max() <= 1
    permutation = torch.randperm(len(ssim), generator=torch.Generator().manual_seed(seed))
    assert_close(similarity_matrix(maps[:, permutation], options), ssim[permutation][:, permutation])
    assert_close(similarity_matrix(maps * scale, options), ssim, 1e-9)


def plain_pair_order(similarity: Tensor, norms: Tensor | None) -> tuple[list[int], list[float]]:
    """The loop as the paper's digest words it, searching all the pairs that are left each time."""
    left, order, scores = list(range(len(similarity))), [], []
    while len(left) > 1:
        pairs = [(float(similarity[i, j]), i, j) for i in left for j in left if i < j]
        score, i, j = max(pairs, key=lambda pair: (pair[0], -pair[1], -pair[2]))
        if norms is None:
            weight = {k: float(sum(similarity[k, other] for other in left if other != k)) for k in (i, j)}
        else:
            weight = {k: -float(norms[k]) for k in (i, j)}
        gone = i if weight[i] > weight[j] else j
        left.remove(gone)
        order.append(gone)
        scores.append(score)
    return [*order, *left], [*scores, -float("inf")]


class TestRemovalOrder:
    SIMILARITY = torch.tensor(
        [[1.0, 0.9, 0.1, 0.65], [0.9, 1.0, 0.5, 0.2], [0.1, 0.5, 1.0, 0.7], [0.65, 0.2, 0.7, 1.0]], dtype=torch.float64
    )

    def test_pair_by_hand(self) -> None:
        order, scores = removal_order(self.SIMILARITY)
        # (0, 1): totals 1.65 and 1.6, 0 goes. (2, 3): totals 1.2 and 0.9, 2 goes. (1, 3): equal, the later goes.
        assert order.tolist() == [0, 2, 3, 1]
        assert scores.tolist() == [0.9, 0.7, 0.2, -float("inf")]

    def test_norm_by_hand(self) -> None:
        order, scores = removal_order(self.SIMILARITY, who="norm", norms=torch.tensor([2.0, 1.0, 3.0, 4.0]))
        assert order.tolist() == [1, 2, 0, 3]
        assert scores.tolist() == [0.9, 0.7, 0.65, -float("inf")]

    def test_mean_and_max_by_hand(self) -> None:
        similarity = torch.tensor([[9.0, 4.0, 1.0], [4.0, 9.0, 3.0], [1.0, 3.0, 9.0]])
        mean, largest = removal_order(similarity, rule="mean"), removal_order(similarity, rule="max")
        assert (mean.order.tolist(), mean.scores.tolist()) == ([1, 0, 2], [3.5, 2.5, 2.0])
        assert (largest.order.tolist(), largest.scores.tolist()) == ([1, 0, 2], [4.0, 4.0, 3.0])
        assert mean.scores.dtype == torch.float32

    @settings(max_examples=40, deadline=None)
    @given(channels=st.integers(1, 9), seed=st.integers(0, 999), levels=st.sampled_from([3, 2**20]), norm=st.booleans())
    def test_pair_is_the_plain_loop(self, channels: int, seed: int, levels: int, norm: bool) -> None:
        generator = torch.Generator().manual_seed(seed)  # dyadic values, so that totals and ties are exact
        upper = torch.randint(levels, (channels, channels), generator=generator).double().triu(1) / 2**20
        norms = torch.randint(4, (channels,), generator=generator) if norm else None
        similarity = upper + upper.T
        actual = removal_order(similarity, who="norm" if norm else "total", norms=norms)
        assert (actual.order.tolist(), actual.scores.tolist()) == plain_pair_order(similarity, norms)

    def test_all_dead_maps_but_one_go_first(self) -> None:
        maps = random_maps(3, 6, 5, 5)
        maps[:, [1, 3, 4]] = 0
        for options in (GLOBAL, PSNR):
            order, scores = removal_order(similarity_matrix(maps, options))
            assert set(order[:2].tolist()) < {1, 3, 4}
            assert scores[:2].tolist() == [1.0 if options is GLOBAL else PSNR_MAX] * 2
            assert scores[2] < scores[1]

    @pytest.mark.parametrize("rule", ["pair", "mean", "max"])
    def test_any_channel_order(self, rule: str) -> None:
        similarity = similarity_matrix(random_maps(3, 12, 5, 5))
        permutation = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        order, scores = removal_order(similarity, rule=rule)
        permuted, same_scores = removal_order(similarity[permutation][:, permutation], rule=rule)
        if rule != "max":  # both members of a pair have the same largest similarity, a tie
            assert torch.equal(permutation[permuted], order)
        assert_close(same_scores[:-1], scores[:-1])
        assert sorted(order.tolist()) == list(range(12))
        assert (scores.diff() <= 0).all()

    @pytest.mark.parametrize("rule", ["pair", "mean", "max"])
    def test_one_channel(self, rule: str) -> None:
        order, scores = removal_order(torch.ones(1, 1), rule=rule)
        assert (order.tolist(), scores.tolist()) == ([0], [-float("inf")])

    def test_equal_channels_go_from_the_last(self) -> None:
        for rule in ("pair", "mean", "max"):
            order = removal_order(torch.ones(4, 4), rule=rule).order.tolist()
            assert order == ([1, 2, 3, 0] if rule == "pair" else [3, 2, 1, 0])

    def test_input_is_left_alone(self) -> None:
        similarity = self.SIMILARITY.clone()
        for rule in ("pair", "mean", "max"):
            removal_order(similarity, rule=rule)
        assert torch.equal(similarity, self.SIMILARITY)

    def test_wide_layers_are_fast(self) -> None:
        features = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        similarity = features @ features.T / 64
        start = time.perf_counter()
        order, _ = removal_order((similarity + similarity.T) / 2)
        assert time.perf_counter() - start < 5  # seconds; about 1 on one thread
        assert len(set(order.tolist())) == 2048

    @pytest.mark.parametrize(
        ("similarity", "match"),
        [
            (torch.ones(3), "give a floating-point"),
            (torch.ones(2, 3), "give a floating-point"),
            (torch.ones(0, 0), "give a floating-point"),
            (torch.ones(2, 2, dtype=torch.int64), "give a floating-point"),
            (torch.full((2, 2), float("nan")), "finite"),
            (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        ],
    )
    def test_unusable_matrices_are_refused(self, similarity: Tensor, match: str) -> None:
        with pytest.raises(ConvpareError, match=match):
            removal_order(similarity)

    def test_unusable_options_are_refused(self) -> None:
        norms = torch.ones(4)
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"rule": "min"}, "rule"),
            ({"who": "both"}, "who"),
            ({"who": "norm"}, "norms"),
            ({"norms": norms}, "norms"),
            ({"rule": "mean", "who": "norm", "norms": norms}, "norms"),
            ({"who": "norm", "norms": norms[:3]}, "4 finite"),
            ({"who": "norm", "norms": norms * float("inf")}, "4 finite"),
        )
        for wrong, match in cases:
            with pytest.raises(ConvpareError, match=match):
                removal_order(self.SIMILARITY, **wrong)
