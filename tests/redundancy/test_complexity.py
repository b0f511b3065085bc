"""Counts by hand, from the definitions entry by entry, and dimensions against ranks of Jacobians."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convpare.errors import ConvpareError
from convpare.redundancy.complexity import Complexity, Design, Kind, layer_complexity
from convpare.redundancy.tuckerlike import factor_shapes, jacobian_rank

LENGTHS, POOLED = (3, 3, 2), (3, 2, 2)  # L = 18, P = 12


@st.composite
def designs(draw, kinds: tuple[Kind, ...] = ("cnn", "tucker", "cp")):
    order = draw(st.integers(1, 3))
    lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=order, max_size=order)))
    pooled = tuple(draw(st.lists(st.integers(1, 3), min_size=order, max_size=order)))
    K = draw(st.integers(1, 6))
    match draw(st.sampled_from(kinds)):
        case "tucker":
            ranks = tuple(draw(st.integers(1, length)) for length in lengths)
            return Design("tucker", lengths, pooled, K, draw(st.integers(1, K)), ranks)
        case "cp":
            return Design("cp", lengths, pooled, K, draw(st.integers(1, 8)))
    return Design("cnn", lengths, pooled, K)


@pytest.mark.parametrize(("K", "naive", "sample", "dimension"), [(1, 30, 31, 29), (2, 60, 62, 56), (5, 150, 155, 125)])
def test_cnn(K, naive, sample, dimension):
    design = Design("cnn", LENGTHS, POOLED, K)
    assert (design.order, design.L, design.P) == (3, 18, 12)
    assert (design.naive_count, design.sample_complexity(), design.intrinsic_dimension) == (naive, sample, dimension)
    assert design.gap() == -K


@pytest.mark.parametrize(("K", "naive"), [(3, 85), (4, 100), (6, 130), (9, 175)])
def test_tucker(K, naive):
    design = Design("tucker", LENGTHS, POOLED, K, R=3, ranks=(2, 2, 2))
    assert (design.naive_count, design.sample_complexity(), design.intrinsic_dimension) == (naive, 76, 55)


@pytest.mark.parametrize(("K", "naive"), [(3, 69), (4, 84), (6, 114), (9, 159)])
def test_cp(K, naive):
    design = Design("cp", LENGTHS, POOLED, K, R=3)
    assert (design.naive_count, design.sample_complexity(), design.intrinsic_dimension) == (naive, 60, 51)
    assert design.sample_complexity(cp_core=True) == 60 + 3**4
    assert design.gap(cp_core=True) == design.gap() - 3**4


def test_more_kernels_than_the_matrix_has_rows_or_columns_add_nothing():
    assert [Design("cnn", (2, 2), (3,) * 2, K).intrinsic_dimension for K in (3, 4, 5, 40)] == [30, 36, 36, 36]


def test_cp_with_fewer_channels_than_its_rank():
    """Two outputs over six separable filters, as where an inverted residual projects: K/R = 1/3."""
    design = Design("cp", LENGTHS, POOLED, 2, R=6)
    assert design.naive_count == 6 * (8 + 2) + 2 * 12
    assert design.intrinsic_dimension == 2 * 18 + 2 * (12 - 2)  # as many filters as span all pairs of kernels


@settings(max_examples=60, deadline=None)
@given(designs())
def test_the_naive_count_is_the_entries_of_the_factors(design):
    assert design.naive_count == sum(map(prod, factor_shapes(design)))


@settings(max_examples=60, deadline=None)
@given(designs(("tucker", "cp")))
def test_the_gap_is_free_of_the_kernels_sizes(design):
    assert design.gap() == design.K * design.R + (design.K - design.R) * design.P


@settings(max_examples=60, deadline=None)
@given(designs())
def test_the_dimension_is_the_rank_of_the_jacobian(design):
    assert design.intrinsic_dimension == jacobian_rank(design)


@pytest.mark.parametrize(
    ("lengths", "K", "R", "short"),
    [((3, 3), 3, 4, 1), ((4, 4), 3, 5, 1), ((2, 2, 2), 2, 3, 1), ((3, 3, 2), 2, 5, 1), ((3, 3), 3, 3, 0)],
)
def test_formats_of_cp_that_fall_one_short(lengths, K, R, short):
    design = Design("cp", lengths, (K, *[1] * (len(lengths) - 1)), K, R)
    expected = min(R * (sum(lengths) + K - len(lengths)), prod(lengths) * K)
    assert design.intrinsic_dimension == jacobian_rank(design) == expected - short


def test_a_dense_layer():
    # 64 filters of 3 x 3 x 16 and as many weights behind the pooling; of rank 20
    assert layer_complexity((64, 16, 3, 3), 20) == Complexity(64 * 144 + 64, 20 * 144 + 20)
    assert layer_complexity((64, 16, 3, 3), 64).gap == 0
    assert layer_complexity(torch.Size([8, 4]), 3, pooled=5) == Complexity(8 * (4 + 5), 3 * (4 + 5))


def test_a_layer_stored_as_tucker_factors():
    counted = layer_complexity((64, 16, 3, 3), 20, (8, 3, 3), pooled=49)
    factors = 20 * 8 * 9 + 16 * 8 + 9 + 9
    assert counted == Complexity(factors + 64 * 20 + 64 * 49, factors + 20 * 49)
    assert counted.gap == 64 * 20 + 44 * 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tt", (3,), (2,), 4), "'tt'; give one of 'cnn', 'tucker', 'cp'"),
        (("cnn", (3, 0), (2, 2), 4), "no positive integer"),
        (("cnn", (3,), (2,), 2.0), "no positive integer"),
        (("cnn", (3, 3), (2,), 4), "one of each for every mode"),
        (("cnn", (), (), 4), "at least one"),
        (("cnn", (3,), (2,), 4, 2), "give none for 'cnn'"),
        (("cp", (3,), (2,), 4), "R for 'cp'"),
        (("cp", (3,), (2,), 4, 2, (1,)), "R for 'cp'"),
        (("tucker", (3,), (2,), 4, 2), "R and ranks for 'tucker'"),
        (("tucker", (3, 3), (2, 2), 4, 2, (1, 4)), r"ranks are \(1, 4\) for lengths \(3, 3\)"),
        (("tucker", (3, 3), (2, 2), 4, 2, (1,)), "give one for each"),
        (("tucker", (3,), (2,), 4, 5, (1,)), "K=4 output channels have a rank of at most 4"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ConvpareError, match=message):
        Design(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8,), 2), "give \\(K, C, \\*kernel\\)"),
        (((8, 4), 5), "rank_out is 5; give 1 to 4"),
        (((8, 4), 0), "rank_out is 0"),
        (((8, 4), 9, (2,)), "R is 9"),
        (((8, 4), 2, (5,)), "ranks are"),
        (((8, 4), 2, None, 0), "no positive integer"),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ConvpareError, match=message):
        layer_complexity(*arguments)
