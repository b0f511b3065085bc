"""The oracles are PyTorch's convolution, pooling and Kronecker product, and definitions written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convpare.errors import ConvpareError
from convpare.redundancy import tuckerlike
from convpare.redundancy.complexity import Design
from convpare.redundancy.tuckerlike import (
    factor_shapes,
    features,
    input_length,
    jacobian,
    jacobian_rank,
    kernels_of,
    kronecker_sum,
    pooled_windows,
    predict,
    random_factors,
    rearranged,
    weight_tensor,
    window_matrices,
)

CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_windows_by_hand():
    windows = window_matrices(5, 2, 2)
    assert windows.tolist() == [[[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [1, 0], [0, 1], [0, 0]]]
    pooled = pooled_windows(4, 2, 1, 2)  # windows at 0 and 1, averaged; the third is left over
    assert pooled.tolist() == [[0.5, 0], [0.5, 0.5], [0, 0.5], [0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_model_is_convolution_pooling_and_a_linear_layer(data):
    order = data.draw(st.integers(1, 3), "order")
    modes = [
        data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)), f"mode {j}")
        for j in range(order)
    ]
    lengths, strides, pools, pooled = zip(*modes, strict=True)
    left_over = data.draw(st.integers(0, 2), "left over")
    sizes = [input_length(*mode) + left_over for mode in modes]
    windows = [pooled_windows(size, *mode[:3]) for size, mode in zip(sizes, modes, strict=True)]
    pooled = tuple(matrix.shape[1] // length for matrix, length in zip(windows, lengths, strict=True))
    x, kernels, heads = normal(2, *sizes), normal(3, *lengths, seed=1), normal(3, *pooled, seed=2)

    maps = POOL[order - 1](CONVOLVE[order - 1](x[:, None], kernels[:, None], stride=strides), pools)
    expected = F.linear(maps.flatten(1), heads.reshape(1, -1))[:, 0]
    torch.testing.assert_close(predict(x, kronecker_sum(kernels, heads), windows), expected, rtol=0, atol=1e-12)


def test_the_shortest_input():
    assert pooled_windows(input_length(3, 2, 4, 5), 3, 2, 4).shape == (input_length(3, 2, 4, 5), 15)
    assert pooled_windows(input_length(3, 2, 4, 5) - 1, 3, 2, 4).shape[1] == 12


def test_features_are_pooled_windows():
    x, windows = normal(1, 6, 5), [pooled_windows(6, 3, 1, 2), pooled_windows(5, 2, 3)]
    z = features(x, windows)[0]
    assert z.shape == (2 * 3, 2 * 2)
    # second pooled row window, of windows at rows 2 and 3; second column window at column 3
    torch.testing.assert_close(z[3:, 2:], (x[0, 2:5, 3:5] + x[0, 3:6, 3:5]) / 2, rtol=0, atol=1e-15)


def test_kronecker_sum_is_torch_kron():
    kernels, heads = normal(3, 2, 3, 2), normal(3, 2, 1, 4, seed=1)
    expected = sum(torch.kron(b, a) for a, b in zip(kernels, heads, strict=True))
    torch.testing.assert_close(kronecker_sum(kernels, heads), expected)


def test_rearranged_is_a_sum_of_outer_products():
    kernels, heads = normal(2, 3, 3, 2), normal(2, 2, 2, 3, seed=1)
    matrix = rearranged(kronecker_sum(kernels, heads), (3, 3, 2))
    torch.testing.assert_close(matrix, kernels.flatten(1).T @ heads.flatten(1))
    assert torch.linalg.matrix_rank(matrix) == 2


def test_kernels_of_the_decompositions():
    tucker = Design("tucker", (3, 4), (2, 1), 5, R=3, ranks=(2, 3))
    core, first, second, expansion, heads = factors = random_factors(tucker, torch.Generator().manual_seed(0))
    assert tuple(factor.shape for factor in factors) == factor_shapes(tucker)
    expected = torch.einsum("abr,ia,jb,kr->kij", core, first, second, expansion)
    torch.testing.assert_close(kernels_of(tucker, factors), expected)
    torch.testing.assert_close(weight_tensor(tucker, factors), kronecker_sum(expected, heads))

    cp = Design("cp", (3, 4), (2, 1), 2, R=3)
    first, second, expansion, heads = factors = random_factors(cp, torch.Generator().manual_seed(0))
    expected = torch.einsum("ir,jr,kr->kij", first, second, expansion)
    torch.testing.assert_close(kernels_of(cp, factors), expected)

    cnn = Design("cnn", (3, 4), (2, 1), 2)
    factors = random_factors(cnn, torch.Generator().manual_seed(0))
    assert kernels_of(cnn, factors) is factors[0]


def test_without_the_expansion_the_functions_are_the_same():
    """K = 5 channels of rank 2 are the two inner channels, read by other heads."""
    wide = Design("tucker", (3, 3), (2, 2), 5, R=2, ranks=(2, 2))
    *inner, expansion, heads = random_factors(wide, torch.Generator().manual_seed(0))
    narrow = Design("tucker", (3, 3), (2, 2), 2, R=2, ranks=(2, 2))
    absorbed = torch.einsum("kr,kij->rij", expansion, heads)
    expected = weight_tensor(wide, (*inner, expansion, heads))
    torch.testing.assert_close(weight_tensor(narrow, (*inner, torch.eye(2).double(), absorbed)), expected)


def test_the_jacobian_is_the_derivative():
    design = Design("cp", (2, 3), (2, 1), 2, R=2)
    factors = random_factors(design, torch.Generator().manual_seed(0))
    derivative = jacobian(design, factors)
    column = 0
    for i, factor in enumerate(factors):
        for entry in range(factor.numel()):
            moved = factor.clone()
            moved.view(-1)[entry] += 1  # W is linear in every factor
            change = weight_tensor(design, (*factors[:i], moved, *factors[i + 1 :])) - weight_tensor(design, factors)
            torch.testing.assert_close(derivative[:, column], change.flatten(), rtol=0, atol=1e-12)
            column += 1
    assert column == derivative.shape[1]


@pytest.mark.parametrize("K", [3, 4, 6, 9])
def test_ranks_do_not_depend_on_the_number_of_channels(K):
    assert jacobian_rank(Design("tucker", (3, 3, 2), (3, 2, 2), K, R=3, ranks=(2, 2, 2))) == 55
    assert jacobian_rank(Design("cp", (3, 3, 2), (3, 2, 2), K, R=3)) == 51


def test_ranks_of_the_cnn():
    assert [jacobian_rank(Design("cnn", (3, 3, 2), (3, 2, 2), K)) for K in (1, 2, 3, 5)] == [29, 56, 81, 125]


def test_a_rank_that_is_not_clear_is_refused(monkeypatch):
    monkeypatch.setattr(tuckerlike, "jacobian", lambda *_: torch.logspace(0, -16, 17, dtype=torch.float64).diag())
    with pytest.raises(ConvpareError, match="no clear gap; give another seed"):
        jacobian_rank(Design("cnn", (3,), (2,), 1))


def test_dtype_gradients_and_random_state():
    state = torch.random.get_rng_state()
    design = Design("tucker", (2, 2), (2, 1), 3, R=2, ranks=(2, 1))
    factors = tuple(f.float().requires_grad_() for f in random_factors(design, torch.Generator().manual_seed(0)))
    x = normal(3, 3, 2).float()
    y = predict(x, weight_tensor(design, factors), [pooled_windows(3, 2), pooled_windows(2, 2)])
    y.sum().backward()
    jacobian_rank(design)
    assert y.dtype == torch.float32
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in factors)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [(3, 4, 1), (3, 0, 1), (3, 2, 0), (3, 2, 1, 3), (3, 2, 1, 0)])
def test_windows_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ConvpareError, match="give 1"):
        pooled_windows(*arguments)
