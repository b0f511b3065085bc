"""The redundancy of a network's kernels, and what is superfluous in its blocks."""

import pytest
import torch
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.redundancy.kernels import measure_kernels
from convpare.redundancy.kr import kr_blocks
from convpare.redundancy.network_complexity import network_complexity

IMAGE = torch.zeros(1, 3, 8, 8)


def of_low_rank(rank: int) -> nn.Module:
    """A 3×3 convolution to 32 channels whose kernel has this rank across o|ihw."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        net[2].weight.copy_((torch.randn(32, rank) @ torch.randn(rank, 216)).reshape(32, 24, 3, 3))
    return net


def test_a_kernel_of_low_rank():
    net = of_low_rank(4)
    graph = trace(net, IMAGE)
    told = []
    found = measure_kernels(net, graph, 1.0, lambda done, total: told.append((done, total)))["2"]
    assert found.spectra["o|ihw"].rank == found.output_rank == 4
    assert found.k_over_rank == 8
    assert found.dense.macs == 64 * 32 * 24 * 9
    assert found.cut == "o|ihw"
    assert found.least_macs == found.chains["o|ihw"].macs == 64 * 4 * (24 * 9 + 32)
    assert found.saved == pytest.approx(1 - 4 * 248 / 6912)
    assert told == [(1, 2), (2, 2)]


def test_nothing_to_save_in_a_kernel_of_noise():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 1))
    (found,) = measure_kernels(net, trace(net, IMAGE), 1.0).values()
    assert (found.cut, found.least_macs, found.saved) == (None, found.dense.macs, 0)


def test_threads_are_left_alone():
    before = torch.get_num_threads()
    net = of_low_rank(2)
    measure_kernels(net, trace(net, IMAGE))
    assert torch.get_num_threads() == before


def test_weights_that_are_computed_are_left_out():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert list(measure_kernels(net, trace(net, IMAGE))) == ["2"]


def test_weights_that_are_no_numbers():
    net = of_low_rank(2)
    graph = trace(net, IMAGE)
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ConvpareError, match="NaN or infinity"):
        measure_kernels(net, graph)


def bottleneck(w: int, k: int) -> nn.Module:
    """k → w → w → k, and a classifier of 5 channels."""
    return nn.Sequential(
        nn.Conv2d(3, k, 3, padding=1), nn.ReLU(), nn.Conv2d(k, w, 1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1),
        nn.ReLU(), nn.Conv2d(w, k, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(k, 5),
    )  # fmt: skip


def test_what_is_superfluous_in_a_bottleneck():
    """K·R + (K - R)·P with P the classifier's 5 weights for a channel; the stem has K ≤ R."""
    net = bottleneck(8, 24)
    blocks = kr_blocks(net, IMAGE)
    assert [(b.layers, b.k, b.r) for b in blocks] == [(("0",), 24, 24), (("2", "4", "6"), 24, 8)]
    found = network_complexity(trace(net, IMAGE), blocks)
    stem, block = found.blocks
    assert (stem.d_naive, stem.d_sample) == (648 + 24 * 8,) * 2
    assert block.d_naive == 24 * 8 + 8 * 8 * 9 + 8 * 24 + 24 * 5
    assert block.d_naive - block.d_sample == 24 * 8 + (24 - 8) * 5
    assert found.d_naive == 648 + 192 + 576 + 192 + 120
    assert found.d_naive - found.d_sample == 24 * 8 + (24 - 8) * 5
    assert found.to_json()["d_sample"] == found.d_sample


def test_a_depthwise_reader_has_its_own_weights_for_a_channel():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    blocks = kr_blocks(net, IMAGE)
    gap = next(g for g in network_complexity(trace(net, IMAGE), blocks).blocks if g.name == "4")
    assert gap.d_naive - gap.d_sample == 16 * 4 + (16 - 4) * 9
