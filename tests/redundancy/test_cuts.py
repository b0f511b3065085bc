"""Cuts of kernels: names, unfoldings, spectra and their measures."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.redundancy.cuts import Cut, Kernel, Spectrum, cuts_of, norm_loss_of, spectra, spectrum

SEVEN = ["o|ihw", "i|ohw", "h|oiw", "w|oih", "oi|hw", "oh|iw", "ow|ih"]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def with_values(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """A square matrix (o, i) with these singular values."""
    n = len(values)
    left = torch.linalg.qr(noise(n, n, dtype=torch.float64)).Q
    right = torch.linalg.qr(noise(n, n + 1, dtype=torch.float64)[:, 1:]).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).to(dtype)


@pytest.mark.parametrize(("dimensions", "count"), [(0, 1), (1, 3), (2, 7), (3, 15)])
def test_as_many_cuts_as_there_are(dimensions: int, count: int):
    cuts = cuts_of(dimensions)
    assert len(cuts) == len({frozenset([frozenset(c.left), frozenset(c.right)]) for c in cuts}) == count
    assert all(Cut.parse(c.name) == c == Cut.parse(f"{c.right[::-1]} | {c.left}") for c in cuts)


def test_the_seven_cuts_of_a_random_kernel():
    found = spectra(Kernel.of(noise(8, 6, 3, 3)))
    assert [cut.name for cut in cuts_of(2)] == SEVEN == list(found)
    assert [s.rank for s in found.values()] == [8, 6, 3, 3, 9, 18, 18]
    assert [s.full_rank for s in found.values()] == [8, 6, 3, 3, 9, 18, 18]


@pytest.mark.parametrize("name", ["o|i|hw", "oihw|", "o|ihx", "o|ih", "oo|ihw", ""])
def test_what_is_no_cut(name: str):
    with pytest.raises(ConvpareError, match="is no cut"):
        Cut.parse(name)


@pytest.mark.parametrize("name", SEVEN)
def test_unfolding_is_the_plain_one(name: str):
    weight = noise(4, 5, 3, 2)
    cut = Cut.parse(name)
    expected = torch.einsum(f"oihw->{cut.left}{cut.right}", weight)
    rows = math.prod(weight.shape["oihw".index(c)] for c in cut.left)
    (block,) = Kernel.of(weight).unfold(cut)
    assert torch.equal(block, expected.reshape(rows, -1))


LAYERS = {
    "conv1d": nn.Conv1d(6, 8, 3),
    "conv2d": nn.Conv2d(6, 8, (3, 2)),
    "conv3d": nn.Conv3d(4, 6, (2, 3, 2)),
    "grouped": nn.Conv2d(6, 9, 3, groups=3),
    "depthwise with multiplier": nn.Conv2d(5, 10, 3, groups=5),
    "grouped 3-D": nn.Conv3d(4, 6, 2, groups=2),
    "linear": nn.Linear(7, 5),
    "transposed": nn.ConvTranspose2d(6, 8, 3),
    "transposed grouped": nn.ConvTranspose2d(6, 8, 3, groups=2),
}


def dense(layer: nn.Module) -> Tensor:
    """The kernel (o, i, *spatial) of the layer without groups, found from the layer's answers to unit impulses."""
    weight = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    blocks = weight.unflatten(0, (groups, -1))
    blocks = blocks.transpose(1, 2) if transposed else blocks
    full = blocks.new_zeros(groups, blocks.shape[1], groups, *blocks.shape[2:])
    for g in range(groups):
        full[g, :, g] = blocks[g]
    return full.flatten(0, 1).flatten(1, 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("route", ["gram", "svd"])
def test_spectra_are_those_of_the_dense_kernel(name: str, route):
    layer = LAYERS[name]
    full = dense(layer)
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, nn.ConvTranspose2d)
    kernel = Kernel.of(layer.weight, groups, transposed)
    assert torch.equal(kernel.weight(transposed), layer.weight)
    letters = "oi" + ("", "w", "hw", "dhw")[kernel.dimensions]
    assert kernel.sizes == dict(zip(letters, full.shape, strict=True))
    for cut in cuts_of(kernel.dimensions):
        found = spectrum(kernel, cut, route)
        rows = math.prod(full.shape[letters.index(c)] for c in cut.left)
        matrix = torch.einsum(f"{letters}->{cut.left}{cut.right}", full).reshape(rows, -1)
        expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
        np.testing.assert_allclose(found.values.numpy(), expected[: found.full_rank], rtol=1e-6, atol=1e-7)
        assert not expected[found.full_rank :].any() or expected[found.full_rank :].max() < 1e-12
        assert torch.equal(kernel.fold(kernel.unfold(cut), cut).tensor, kernel.tensor)


@pytest.mark.parametrize("shape", [(8, 6, 1, 1), (8, 6, 3, 1), (6, 1, 3, 3)])
def test_cuts_that_are_one_matrix(shape: tuple[int, ...]):
    groups = 6 if shape[1] == 1 else 1
    kernel = Kernel.of(noise(*shape), groups)
    for name, found in spectra(kernel).items():
        alone = spectrum(kernel, Cut.parse(name))
        torch.testing.assert_close(found.values, alone.values, rtol=1e-6, atol=1e-6)
        assert (found.cut, found.rows, found.columns, found.blocks) == (
            alone.cut,
            alone.rows,
            alone.columns,
            alone.blocks,
        )
        assert (found.rank, found.break_even_rank) == (alone.rank, alone.break_even_rank)


def flat(*values: float) -> Spectrum:
    return spectrum(Kernel.of(with_values(list(values))), Cut.parse("o|i"))


def test_measures_of_a_known_spectrum():
    found = flat(2.0, 2.0, 1.0, 0.0)
    p = [4 / 9, 4 / 9, 1 / 9]
    entropy = -sum(x * math.log(x) for x in p)
    assert found.rank == 3
    assert found.entropy == pytest.approx(entropy, rel=1e-12)
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-12)
    assert found.participation_ratio == pytest.approx(1 / sum(x * x for x in p), rel=1e-12)
    assert found.stable_rank == pytest.approx(9 / 4, rel=1e-12)
    assert [found.rank_at(e) for e in (0.3, 4 / 9, 0.5, 8 / 9, 0.9, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert found.relative_error(2) == pytest.approx(1 / 3, rel=1e-12)
    assert found.norm_loss(2) == pytest.approx(1 - math.sqrt(8 / 9), rel=1e-12)
    assert found.relative_error(0) == found.norm_loss(0) == 1
    assert found.relative_error(4) == 0


def test_equal_components():
    found = flat(1.0, 1.0, 1.0, 1.0)
    for value in (found.rank, found.effective_rank, found.participation_ratio, found.stable_rank):
        assert value == pytest.approx(4, rel=1e-12)


def test_a_kernel_of_zeros():
    found = spectra(Kernel.of(torch.zeros(4, 3, 3, 3)))
    for s in found.values():
        assert (s.rank, s.entropy, s.effective_rank, s.participation_ratio, s.stable_rank, s.rank_at(0.99)) == (0,) * 6


def test_the_two_scales():
    """10 % of the norm is 43.6 % of the error, 1 % is 14.1 %."""
    assert norm_loss_of(math.sqrt(1 - 0.9**2)) == pytest.approx(0.1, rel=1e-12)
    assert math.sqrt(1 - 0.9**2) == pytest.approx(0.436, abs=5e-4)
    assert norm_loss_of(0.141) == pytest.approx(0.01, abs=5e-5)


@pytest.mark.parametrize("name", SEVEN)
def test_losses_are_those_of_the_truncated_kernel(name: str):
    kernel, cut = Kernel.of(noise(8, 6, 3, 3, dtype=torch.float64)), Cut.parse(name)
    found = spectrum(kernel, cut)
    u, s, v = torch.linalg.svd(kernel.unfold(cut), full_matrices=False)
    for rank in range(found.full_rank):
        kept = kernel.fold(u[..., :rank] * s[:, None, :rank] @ v[:, :rank], cut).tensor
        whole = kernel.tensor
        assert found.relative_error(rank) == pytest.approx(float((whole - kept).norm() / whole.norm()), rel=1e-9)
        assert found.norm_loss(rank) == pytest.approx(float(1 - kept.norm() / whole.norm()), abs=1e-12)


@pytest.mark.parametrize(("m", "n"), [(8, 54), (6, 72), (3, 144), (9, 48), (18, 24), (1, 9), (2, 2)])
def test_break_even(m: int, n: int):
    found = spectrum(Kernel.of(noise(m, n)), Cut.parse("o|i"))
    rank = found.break_even_rank
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


def test_break_even_of_groups_counts_every_block():
    found = spectrum(Kernel.of(noise(8, 4, 3, 3), groups=2), Cut.parse("o|ihw"))
    assert (found.blocks, found.rows, found.columns, found.full_rank) == (2, 4, 36, 8)
    assert found.break_even_rank == 2 * 3  # 3 · (4 + 36) < 4 · 36 in each


def test_where_gram_suffices():
    """Down to about 1e-8 of the largest singular value; below, the decomposition itself must be taken."""
    values = [10.0**-k for k in range(13)]
    kernel, cut = Kernel.of(with_values(values)), Cut.parse("o|i")
    errors = {route: (spectrum(kernel, cut, route).values.numpy() / np.array(values) - 1) for route in ("gram", "svd")}
    assert np.abs(errors["gram"][:7]).max() < 1e-3
    assert np.abs(errors["gram"][9:]).max() > 0.1
    assert np.abs(errors["svd"]).max() < 1e-3
    assert spectrum(kernel, cut).rank == 13 == spectrum(kernel, cut, "svd").rank
    assert spectrum(kernel, cut, "gram").rank < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_low_rank_is_seen_in_every_type(dtype: torch.dtype):
    whole = torch.randint(-3, 4, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    weight = (whole @ whole[:30].T).to(dtype)  # integers, exact in all of them but for the largest
    rank = int(np.linalg.matrix_rank(weight.double().numpy()))
    assert spectrum(Kernel.of(weight), Cut.parse("o|i")).rank == rank
    assert dtype is not torch.float32 or rank == 5


def test_gram_is_taken_for_float32_and_svd_for_float64():
    weight = with_values([1.0, 1e-10])
    assert spectrum(Kernel.of(weight), Cut.parse("o|i")).values[1] == pytest.approx(1e-10, rel=1e-3)
    assert spectrum(Kernel.of(weight), Cut.parse("o|i")).rank == 2
    assert spectrum(Kernel.of(weight.float()), Cut.parse("o|i")).rank == 1


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, float("nan")])
def test_an_energy_that_is_none(energy: float):
    with pytest.raises(ConvpareError, match="share of the squared norm"):
        flat(1.0, 0.5).rank_at(energy)


def test_what_is_no_kernel():
    for weight in (torch.zeros(3), torch.zeros(2, 2, 1, 1, 1, 1), torch.zeros(0, 3)):
        with pytest.raises(ConvpareError, match="is no kernel"):
            Kernel.of(weight)
    with pytest.raises(ConvpareError, match="NaN or infinity"):
        Kernel.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ConvpareError, match="o\\|iw is no cut of a kernel with the indices oihw"):
        spectrum(Kernel.of(noise(2, 2, 3, 3)), Cut.parse("o|iw"))
