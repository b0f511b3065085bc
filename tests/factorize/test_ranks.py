"""Ranks by number, share, energy, size and noise."""

import math

import pytest
import torch
from layers import noise, seeded
from torch import Tensor, nn

from convpare import ConvpareError
from convpare.factorize import Ranks, chain, factorize, forms_of, get_form, layout
from convpare.factorize.ranks import vbmf_rank, vbmf_threshold
from convpare.redundancy.cuts import Cut, Kernel, spectrum


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", Ranks("number", (16,))),
        ("16,8", Ranks("number", (16, 8))),
        ("0.5", Ranks("fraction", (0.5,))),
        ("1.0", Ranks("fraction", (1.0,))),
        ("0.5, 0.25", Ranks("fraction", (0.5, 0.25))),
        ("energy:0.99", Ranks("energy", (0.99,))),
        ("energy:1", Ranks("energy", (1.0,))),
        ("break-even", Ranks("break-even")),
        ("vbmf", Ranks("vbmf")),
    ],
)
def test_texts(text: str, expected: Ranks):
    assert Ranks.parse(text) == expected == Ranks.of(text) == Ranks.of(expected)
    assert Ranks.parse(str(expected)) == expected


def test_numbers():
    assert Ranks.of(16) == Ranks.of([16]) == Ranks("number", (16,))
    assert Ranks.of((16, 8)) == Ranks("number", (16, 8))
    assert Ranks.of(0.5) == Ranks("fraction", (0.5,))
    assert Ranks.of([0.5, 1]) == Ranks("fraction", (0.5, 1))


@pytest.mark.parametrize(
    "value",
    ["", "0", "-1", "1.5", "0.0", "nan", "a", "16;8", "16,", "energy", "energy:", "energy:2", "vbmf:3", "noise:1",
     "energy:energy:0.5", 0, -3, 2.5, (16, 0.5), ()],
)  # fmt: skip
def test_values_that_are_none(value: object):
    with pytest.raises(ConvpareError, match=r"ranks are .*; expected numbers from 1"):
        Ranks.of(value)


def resolved(layer: nn.Module, form: str, ranks: object) -> tuple[int, ...]:
    kernel = Kernel.of(layer.weight, layer.groups)
    return Ranks.of(ranks).resolve(get_form(form), kernel)


LAYER = seeded(nn.Conv2d(6, 8, 3))


def test_full_ranks():
    expected = {
        "o|ihw": (8,), "i|ohw": (6,), "h|oiw": (3,), "w|oih": (3,), "oi|hw": (9,), "oh|iw": (18,), "ow|ih": (18,),
        "tucker2": (8, 6), "tucker": (8, 6, 3, 3), "tt:ihwo": (6, 18, 8), "tt:iwho": (6, 18, 8), "cp": (48,),
        "cp:separable": (54,),
    }  # fmt: skip
    assert {name: resolved(LAYER, name, 1.0) for name in forms_of(2)} == expected


def test_ranks_are_those_of_a_group():
    layer = seeded(nn.Conv2d(6, 8, 3, groups=2))
    assert resolved(layer, "o|ihw", 1.0) == (4,)
    assert resolved(layer, "tucker2", 1.0) == (4, 3)
    assert resolved(layer, "oi|hw", 1.0) == (9,)
    depthwise = seeded(nn.Conv2d(8, 8, 3, groups=8))
    assert [resolved(depthwise, name, 1.0) for name in ("o|ihw", "h|oiw", "ow|ih")] == [(1,), (3,), (3,)]


def test_fractions_are_rounded():
    assert resolved(LAYER, "tucker2", 0.5) == (4, 3)
    assert resolved(LAYER, "tucker2", (0.25, 1.0)) == (2, 6)
    assert resolved(LAYER, "o|ihw", 0.01) == (1,)
    assert resolved(seeded(nn.Conv2d(128, 100, 1)), "o|ihw", 0.29) == (29,)


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        ("o|ihw", 9, r"ranks are \(9,\) for o\|ihw; the full ranks of this kernel are \(8,\)"),
        ("tucker2", (8, 7), r"ranks are \(8, 7\) for tucker2; .* \(8, 6\)"),
        ("tucker", 4, r"the full ranks of this kernel are \(8, 6, 3, 3\)"),
        ("o|ihw", (2, 2), r"ranks are 2,2, for o\|ihw; give 1 or 1"),
        ("tucker", (2, 2), "ranks are 2,2, for tucker; give 1 or 4"),
        ("tt:ihwo", "0.5,0.5", "ranks are 0.5,0.5, for tt:ihwo; give 1 or 3"),
        ("tucker", "energy:0.5,0.5", "give 1 or 4"),
    ],
)
def test_ranks_that_do_not_suit(form: str, ranks: object, message: str):
    with pytest.raises(ConvpareError, match=message):
        resolved(LAYER, form, ranks)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_energy_is_kept_by_every_cut(share: float):
    kernel = Kernel.of(LAYER.weight)
    for name in ("o|ihw", "i|ohw", "oh|iw", "oi|hw", "h|oiw"):
        (rank,) = resolved(LAYER, name, f"energy:{share}")
        assert rank == spectrum(kernel, Cut.parse(name)).rank_at(share)
        assert factorize(LAYER, name, rank).relative_error ** 2 <= 1 - share + 1e-9
        assert rank == 1 or factorize(LAYER, name, rank - 1).relative_error ** 2 > 1 - share
    ranks = resolved(LAYER, "tucker2", f"energy:{share}")
    assert ranks == resolved(LAYER, "o|ihw", f"energy:{share}") + resolved(LAYER, "i|ohw", f"energy:{share}")
    assert factorize(LAYER, "tucker2", ranks).relative_error ** 2 <= 2 * (1 - share) + 1e-9


def test_energy_of_groups_is_their_sum():
    layer = seeded(nn.Conv2d(6, 8, 3, groups=2).double())
    with torch.no_grad():
        layer.weight[4:] *= 3
    values = torch.linalg.svdvals(layer.weight.detach().reshape(2, 4, -1))
    kept = values.square().sum(0).cumsum(0) / values.square().sum()
    for share in (0.3, 0.6, 0.9):
        assert resolved(layer, "o|ihw", f"energy:{share}") == (int((kept < share).sum()) + 1,)
    assert layer.weight.grad is None


def test_energy_of_cp_is_that_of_its_hardest_cut():
    kernel = Kernel.of(LAYER.weight)
    hardest = max(spectrum(kernel, Cut.parse(c)).rank_at(0.9) for c in ("o|ihw", "i|ohw", "oi|hw"))
    assert resolved(LAYER, "cp", "energy:0.9") == (hardest,)


def params(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def test_ranks_that_break_even():
    assert resolved(LAYER, "o|ihw", "break-even") == (
        spectrum(Kernel.of(LAYER.weight), Cut.parse("o|ihw")).break_even_rank,
    )
    for name in forms_of(2):
        try:
            ranks = resolved(LAYER, name, "break-even")
        except ConvpareError:
            assert layout(LAYER, name, 1).params >= params(LAYER)
            continue
        assert params(chain(LAYER, factorize(LAYER, name, ranks))) < params(LAYER)
        if len(ranks) == 1:
            assert layout(LAYER, name, ranks[0] + 1).params >= params(LAYER)
        else:
            full = resolved(LAYER, name, 1.0)
            more = next(r for step in range(1, 100) if (r := resolved(LAYER, name, _scaled(full, step))) > ranks)
            assert layout(LAYER, name, more).params >= params(LAYER)


def _scaled(full: tuple[int, ...], step: int) -> tuple[int, ...]:
    return tuple(max(1, step * f // max(full)) for f in full) if step <= max(full) else full


def test_layers_that_no_rank_makes_smaller():
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    with pytest.raises(ConvpareError, match=r"o\|ihw has at no rank fewer parameters than the kernel \(8, 1, 3, 3\)"):
        factorize(depthwise, "o|ihw", "break-even")


def test_atoms_break_even_as_they_are_stored():
    """One copy of each atom an input channel; of a transposed convolution one an output channel."""
    layer, mirrored = nn.Conv2d(4, 40, 5, bias=False), nn.ConvTranspose2d(40, 4, 5, bias=False)
    for each in (layer, mirrored):
        ranks = factorize(each, "oi|hw", "break-even").ranks
        assert ranks == (math.ceil(4 * 40 * 25 / (4 * 25 + 4 * 40)) - 1,)


def noisy(rows: int, columns: int, rank: int, noise_level: float, seed: int = 0) -> Tensor:
    """A matrix with `rank` singular values from 1 to 2 times √(rows · columns), in Gaussian noise."""
    left, right = (
        torch.linalg.qr(noise(rows, rank, seed=seed))[0],
        torch.linalg.qr(noise(columns, rank, seed=seed + 1))[0],
    )
    values = math.sqrt(rows * columns) * torch.linspace(2, 1, rank, dtype=torch.float64)
    return (left * values) @ right.T + noise_level * noise(rows, columns, seed=seed + 2)


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (100, 100), (40, 900)])
@pytest.mark.parametrize("rank", [1, 5, 15])
@pytest.mark.parametrize("level", [0.01, 0.3, 1.0])
def test_variational_bayes_finds_the_rank_in_noise(shape: tuple[int, int], rank: int, level: float):
    values = torch.linalg.svdvals(noisy(*shape, rank, level))
    assert vbmf_rank(values[None], *shape) == rank
    assert vbmf_rank(1e-3 * values[None], *shape) == rank


def test_variational_bayes_finds_nothing_in_noise():
    for seed in range(5):
        assert vbmf_rank(torch.linalg.svdvals(noise(80, 200, seed=seed))[None], 80, 200) == 0
    assert vbmf_rank(torch.zeros(1, 4), 4, 9) == 0


def test_variational_bayes_needs_a_signal_above_the_noise():
    """Components are found from the threshold on: γ² > x M σ², where x exceeds the edge (1 + √α)² of noise itself."""
    rows, columns, level = 100, 400, 1.0
    edge = math.sqrt(vbmf_threshold(rows / columns) * columns)
    for factor, expected in ((0.3, 0), (1.3, 1)):
        matrix = noisy(rows, columns, 1, 0.0) * (factor * edge / math.sqrt(rows * columns) / 2)
        values = torch.linalg.svdvals(matrix + level * noise(rows, columns, seed=7))
        assert vbmf_rank(values[None], rows, columns) == expected


def test_variational_bayes_takes_an_exact_rank():
    assert vbmf_rank(torch.linalg.svdvals(noisy(30, 50, 4, 0.0))[None], 30, 50) == 4


def test_thresholds():
    """For square matrices (1 + τ)² / τ · ... with log(1 + τ) = τ / 2, so τ = 2.5129; above the edge of noise always."""
    assert vbmf_threshold(1.0) == pytest.approx(3.51286 * (1 + 1 / 2.51286), rel=1e-5)
    for aspect in (0.01, 0.1, 0.5, 0.9):
        edge = (1 + math.sqrt(aspect)) ** 2
        assert edge < vbmf_threshold(aspect) < 1.3 * edge


def test_groups_share_the_noise():
    """The largest rank of the groups counts."""
    layer = nn.Conv2d(80, 120, 1, groups=2).double()
    with torch.no_grad():
        layer.weight[:60] = noisy(60, 40, 3, 0.2)[:, :, None, None]
        layer.weight[60:] = noisy(60, 40, 7, 0.2, seed=9)[:, :, None, None]
    assert resolved(layer, "o|ihw", "vbmf") == (7,)
    assert resolved(layer, "tucker2", "vbmf") == (7, 7)
    assert resolved(layer, "cp", "vbmf") == (7,)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1), nn.Linear(9, 1), nn.Linear(1, 1)])
def test_variational_bayes_of_thin_kernels(layer: nn.Module):
    form = "o|i" if isinstance(layer, nn.Linear) else "o|ihw"
    kernel = Kernel.of(seeded(layer).weight, getattr(layer, "groups", 1))
    assert Ranks.of("vbmf").resolve(get_form(form), kernel) == (1,)


def test_noise_keeps_one_component():
    layer = nn.Conv2d(64, 64, 3)
    with torch.no_grad():
        layer.weight.copy_(noise(64, 64, 3, 3))
    assert resolved(layer, "o|ihw", "vbmf") == (1,)
    assert resolved(layer, "tucker2", "vbmf") == (1, 1)
