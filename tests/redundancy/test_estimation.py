"""The oracles are plain least squares, truncated SVD, scipy's regressions and the error of a linear model."""

import numpy as np
import pytest
import torch
from scipy import stats

from convpare.errors import ConvpareError
from convpare.redundancy.complexity import Design
from convpare.redundancy.estimation import (
    Setup,
    draw_inputs,
    draw_truth,
    equal_rates,
    equal_slopes,
    estimation_error,
    fit_line,
    least_squares,
)
from convpare.redundancy.tuckerlike import jacobian, random_factors, rearranged, weight_tensor

SMALL = Setup(strides=(2, 2), pools=(2, 1), noise=0.1)
CNN = Design("cnn", (2, 2), (2, 2), 2)
TUCKER = Design("tucker", (2, 2), (2, 2), 3, R=2, ranks=(1, 2))
CP = Design("cp", (2, 2), (2, 2), 3, R=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


class TestInputs:
    def test_independent(self) -> None:
        x = draw_inputs(20_000, (2, 3), 0.0, seeded()).flatten(1)
        np.testing.assert_allclose(x.T @ x / len(x), np.eye(6), atol=0.04)
        np.testing.assert_allclose(x[1:].T @ x[:-1] / len(x), np.zeros((6, 6)), atol=0.04)

    def test_autoregressive(self) -> None:
        """Of covariance one; and 0.6 to the h between x_i and x_{i-h}, shifted by h entries."""
        x = draw_inputs(40_000, (2, 3), 0.6, seeded()).flatten(1)
        np.testing.assert_allclose(x.T @ x / len(x), np.eye(6), atol=0.05)
        for lag in (1, 2):
            shift = np.roll(np.eye(6), lag, axis=0)
            np.testing.assert_allclose(x[lag:].T @ x[:-lag] / len(x), 0.6**lag * shift, atol=0.05)

    def test_starts_stationary(self) -> None:
        firsts = torch.stack([draw_inputs(2, (4,), 0.9, seeded(seed)) for seed in range(2000)])
        np.testing.assert_allclose(firsts.var(0), np.ones((2, 4)), atol=0.15)

    def test_shape(self) -> None:
        assert draw_inputs(5, (2, 3, 4), 0.5, seeded()).shape == (5, 2, 3, 4)


@pytest.mark.parametrize("design", [CNN, TUCKER, CP])
def test_the_truth_has_norm_one(design):
    assert float(weight_tensor(design, draw_truth(design, seeded())).norm()) == pytest.approx(1)


class TestLeastSquares:
    def test_of_all_matrices_is_linear_regression(self) -> None:
        design = Design("cnn", (2, 2), (2, 2), 4)
        z, y = normal(50, 16), normal(50, seed=1)
        found = least_squares(design, z.T @ z / 50, z.T @ y / 50, random_factors(design, seeded()))
        expected = torch.linalg.lstsq(z, y[:, None]).solution[:, 0]
        torch.testing.assert_close(weight_tensor(design, found).flatten(), expected, rtol=0, atol=1e-5)

    def test_of_white_features_is_the_truncated_svd(self) -> None:
        cross = normal(4, 4)
        left, values, right = torch.linalg.svd(rearranged(cross, (2, 2)))
        found = least_squares(CNN, torch.eye(16).double(), cross.flatten(), random_factors(CNN, seeded()))
        expected = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(rearranged(weight_tensor(CNN, found), (2, 2)), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("design", [TUCKER, CP])
    def test_no_direction_leads_down(self, design: Design) -> None:
        z, y = normal(60, 16), normal(60, seed=1)
        gram, cross = z.T @ z / 60, z.T @ y / 60
        found = least_squares(design, gram, cross, draw_truth(design, seeded(2)))
        slope = jacobian(design, found).T @ (cross - gram @ weight_tensor(design, found).flatten())
        assert slope.abs().max() < 1e-5


class TestError:
    @pytest.mark.parametrize("inputs", ["independent", "autoregressive"])
    @pytest.mark.parametrize("design", [CNN, TUCKER, CP])
    def test_is_that_of_a_linear_model_of_the_models_dimension(self, design: Design, inputs: str) -> None:
        """Covariance of Z is 1/2, so E error² = noise² 2 dimension / n; over 40 draws of n = 1000."""
        errors = [estimation_error(design, inputs, 1000, seed, SMALL) for seed in range(40)]  # type: ignore[arg-type]
        expected = 0.1**2 * 2 * design.intrinsic_dimension / 1000
        assert np.mean(np.square(errors)) == pytest.approx(expected, rel=0.25)

    @pytest.mark.parametrize("design", [CNN, TUCKER, CP])
    def test_a_random_start_finds_the_same(self, design: Design) -> None:
        random = Setup((2, 2), (2, 1), 0.1, start="random")
        near = [estimation_error(design, "independent", 300, seed, SMALL) for seed in range(3)]
        far = [estimation_error(design, "independent", 300, seed, random) for seed in range(3)]
        assert far == pytest.approx(near, rel=1e-3)

    def test_follows_from_its_arguments(self) -> None:
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        first = estimation_error(CP, "independent", 100, 3, SMALL)
        torch.rand(5)
        assert estimation_error(CP, "independent", 100, 3, SMALL) == first
        assert estimation_error(CP, "autoregressive", 100, 3, SMALL) != first
        assert estimation_error(CP, "independent", 100, 4, SMALL) != first
        torch.random.set_rng_state(state)
        estimation_error(CP, "independent", 100, 3, SMALL)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ConvpareError, match="modes are 2, strides"):
            estimation_error(CP, "independent", 100, 0)
        with pytest.raises(ConvpareError, match="n is 0"):
            estimation_error(CP, "independent", 0, 0, SMALL)


class TestLines:
    def test_a_line_is_found(self) -> None:
        t = np.array([0.1, 0.2, 0.3, 0.4])
        line = fit_line(t, 3 * t + 0.5)
        np.testing.assert_allclose(line.slope, [3, 3, 3], atol=1e-9)
        np.testing.assert_allclose(line.intercept, [0.5, 0.5, 0.5], atol=1e-9)
        assert line.r2 == pytest.approx(1)

    def test_intervals_are_scipys(self) -> None:
        t = np.tile([0.1, 0.15, 0.25, 0.4], 5)
        errors = t * (2 + 0.1 * normal(20).numpy()) + 0.01
        line = fit_line(t, errors)
        oracle = stats.linregress(1 / t, errors / t)  # weighted by 1/t², intercept and slope change places
        half = stats.t.ppf(0.975, 18)
        assert line.slope.value == pytest.approx(oracle.intercept)
        assert line.slope.high - line.slope.value == pytest.approx(half * oracle.intercept_stderr)
        assert line.intercept.value == pytest.approx(oracle.slope)
        assert line.intercept.value - line.intercept.low == pytest.approx(half * oracle.stderr)
        interval = stats.ttest_1samp(errors / t, 0).confidence_interval()
        assert line.rate[1:] == pytest.approx((interval.low, interval.high))
        assert 0.9 < line.r2 < 1

    def test_equal_slopes_of_two_groups_is_a_t_test(self) -> None:
        t = np.tile([0.1, 0.2, 0.4], 6)
        groups = [(t, t * (slope + 0.2 * normal(18, seed=int(slope)).numpy())) for slope in (2.0, 3.0)]
        fits = [stats.linregress(1 / t, errors / t) for _, errors in groups]
        pairs = zip(fits, groups, strict=True)
        residual = sum(float(((e / t - f.intercept - f.slope / t) ** 2).sum()) for f, (_, e) in pairs)
        columns = np.stack([np.ones_like(t), 1 / t], 1)
        spread = np.sqrt(2 * residual / 32 * np.linalg.inv(columns.T @ columns)[0, 0])
        expected = 2 * stats.t.sf(abs(fits[0].intercept - fits[1].intercept) / spread, 32)
        assert equal_slopes(groups) == pytest.approx(expected)

    def test_tests_tell_lines_apart(self) -> None:
        t = np.tile([0.1, 0.2, 0.4], 10)
        groups = [(t, t * (2 + 0.1 * normal(30, seed=seed).numpy())) for seed in range(3)]
        shifted = [*groups[:2], (t, groups[2][1] + 0.2)]
        steeper = [*groups[:2], (t, groups[2][1] + 0.5 * t)]
        assert equal_slopes(groups) > 0.01
        assert equal_rates(groups) > 0.01
        assert equal_slopes(shifted) == pytest.approx(equal_slopes(groups))
        assert equal_slopes(steeper) < 1e-6
        assert equal_rates(steeper) < 1e-6

    @pytest.mark.parametrize("t", [[0.1, 0.2], [0.1, 0.1, 0.1], [0.0, 0.1, 0.2]])
    def test_too_few_points_are_refused(self, t: list[float]) -> None:
        with pytest.raises(ConvpareError, match="three points"):
            fit_line(t, t)

    def test_one_group_is_refused(self) -> None:
        with pytest.raises(ConvpareError, match="give two or more"):
            equal_rates([([0.1, 0.2, 0.3], [1, 2, 3])])


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": (1, 2)},
        {"strides": (0, 1, 1)},
        {"pools": (0, 1, 1)},
        {"noise": 0.0},
        {"correlation": 1.0},
        {"start": "zero"},
        {"restarts": 0},
    ],
)
def test_a_setup_out_of_range_is_refused(wrong):
    with pytest.raises(ConvpareError, match=r"give "):
        Setup(**wrong)
