"""Truncations lose what the singular values say, and agree with TensorLy."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from layers import noise, seeded
from torch import Tensor, nn

from convpare import ConvpareError
from convpare.factorize import Form, factorize, form, forms, forms_of, get_form
from convpare.factorize.forms import block_sizes
from convpare.factorize.subspaces import basis, singular_values, split
from convpare.factorize.tucker import Tucker, Tucker2
from convpare.redundancy.cuts import Cut, Kernel, cuts_of, spectrum


def convolution(*sizes: int, groups: int = 1, seed: int = 0, decay: float = 0.0) -> nn.Module:
    """Of kernel size sizes[2:], from sizes[1] to sizes[0] channels, in float64; channels decay by a power law."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 3]
    layer = seeded(kind(sizes[1], sizes[0], sizes[2:], groups=groups).double(), seed)
    with torch.no_grad():
        layer.weight *= (1 + torch.arange(sizes[0])).pow(-decay).reshape(-1, *[1] * (len(sizes) - 1))
    return layer


LAYERS = [
    convolution(8, 6, 3, 3),
    convolution(8, 6, 3, 2, groups=2),
    convolution(5, 4, 3),
    convolution(4, 3, 2, 3, 2),
    convolution(6, 6, 3, 3, groups=6),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: str(tuple(x.weight.shape)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_a_cut_is_the_tail_of_its_singular_values(layer: nn.Module, dtype: torch.dtype):
    layer = layer.to(dtype)
    kernel = Kernel.of(layer.weight, layer.groups)
    for cut in cuts_of(kernel.dimensions):
        blocks = torch.linalg.svdvals(kernel.unfold(cut).double())  # (blocks, full rank)
        for rank in range(1, blocks.shape[1] + 1):
            factors = factorize(layer, cut.name, rank)
            expected = math.sqrt(float(blocks[:, rank:].square().sum() / blocks.square().sum()))
            assert factors.relative_error == pytest.approx(expected, rel=1e-5, abs=1e-6)
            if len(blocks) == 1:
                assert factors.relative_error == pytest.approx(spectrum(kernel, cut).relative_error(rank), abs=1e-6)
            difference = kernel.tensor - factors.kernel().tensor
            assert factors.relative_error == pytest.approx(
                float(difference.norm() / kernel.tensor.norm()), rel=1e-5, abs=1e-6
            )
            assert torch.linalg.matrix_rank(factors.kernel().unfold(cut)[0].double(), rtol=1e-5) <= rank


def test_each_factor_of_a_cut_carries_half_the_scale():
    layer = convolution(8, 6, 3, 3)
    first, second = factorize(layer, "o|ihw", 4).links
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1))[:4]
    assert torch.allclose(first.tensor[0].flatten(1).norm(dim=1), values.sqrt())
    assert torch.allclose(second.tensor[0].flatten(1).norm(dim=0), values.sqrt())


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_are_the_singular_vectors(shape: tuple[int, ...], dtype: torch.dtype):
    matrix = noise(*shape, dtype=dtype)
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    for rank in range(1, min(shape[1:]) + 1):
        found = basis(matrix, rank)
        assert found.shape == (shape[0], shape[1], rank)
        assert torch.allclose(found.mT @ found, torch.eye(rank, dtype=dtype).expand(shape[0], -1, -1), atol=2e-6)
        both = (found @ found.mT).double(), exact.U[..., :rank] @ exact.U[..., :rank].mT
        assert torch.allclose(*both, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_of_large_matrices(dtype: torch.dtype):
    """Of more rows than are multiplied at once."""
    matrix = noise(2, 300, 400, dtype=dtype)
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = basis(matrix, 70).double()
    assert torch.allclose((found.mT @ matrix.double()).square().sum((1, 2)), exact.S[:, :70].square().sum(1), rtol=1e-7)
    assert torch.allclose(singular_values(matrix), exact.S, rtol=1e-6)


def test_small_singular_values_of_float32_weights():
    """A Gram matrix in float32 would lose them in its rounding."""
    left, right = torch.linalg.qr(noise(12, 12))[0], torch.linalg.qr(noise(40, 12, seed=1))[0]
    values = 10.0 ** -torch.arange(12, dtype=torch.float64).div(2)  # down to 3e-6
    matrix = ((left * values) @ right.T).float()[None]
    for rank in (4, 7, 9):
        outer, inner = split(matrix, rank)
        lost = float((matrix - outer @ inner).double().norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=0.05, abs=3e-7)


def dropped(kernel: Kernel, cut: Cut, rank: int) -> float:
    """What the cut alone drops of the squared norm."""
    return float(torch.linalg.svdvals(kernel.unfold(cut).double())[:, rank:].square().sum())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: str(tuple(x.weight.shape)))
@pytest.mark.parametrize("name", ["tucker2", "tucker", "tt"])
def test_several_cuts_lose_at_most_what_each_drops(layer: nn.Module, name: str):
    kernel = Kernel.of(layer.weight, layer.groups)
    orders = itertools.permutations(block_sizes(kernel)) if name == "tt" else [None]
    for order in itertools.islice(orders, 0, None, 5):
        chosen = get_form(f"tt:{''.join(order)}" if order else name)
        factors = factorize(layer, chosen, 0.6)
        drops = [dropped(kernel, c, r) for c, r in zip(chosen.cuts(kernel), factors.ranks, strict=True)]
        total = float(kernel.tensor.square().sum())
        lost = factors.relative_error**2 * total
        assert max(drops) - 1e-9 <= lost <= sum(drops) + 1e-9
        assert float((kernel.tensor - factors.kernel().tensor).square().sum()) == pytest.approx(lost, abs=1e-9 * total)
        for cut, rank in zip(chosen.cuts(kernel), factors.ranks, strict=True):
            assert torch.linalg.matrix_rank(factors.kernel().unfold(cut)[0], rtol=1e-9) <= rank


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: str(tuple(x.weight.shape)))
@pytest.mark.parametrize("form_of", [Tucker2, Tucker])
def test_orthogonal_iteration_only_gains(layer: nn.Module, form_of: type[Tucker]):
    for share in (0.3, 0.6):
        errors = [factorize(layer, form_of(sweeps), share).relative_error for sweeps in (0, 1, 2, 3, 5, 30)]
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))


def test_orthogonal_iteration_gains_something():
    layer = LAYERS[0]
    assert factorize(layer, Tucker2(20), 0.4).relative_error < 0.999 * factorize(layer, Tucker2(), 0.4).relative_error


@pytest.mark.parametrize("ranks", [(4, 3), (6, 4), (3, 5)])
def test_tucker2_finds_tensorlys_error(ranks: tuple[int, int]):
    layer = convolution(8, 6, 3, 3, decay=1.0)
    weight = layer.weight.detach().numpy()
    (core, bases), _ = tensorly.decomposition.partial_tucker(
        weight, list(ranks), modes=[0, 1], n_iter_max=300, tol=1e-12
    )
    found = tensorly.tenalg.multi_mode_dot(core, bases, modes=[0, 1])
    expected = np.linalg.norm(weight - found) / np.linalg.norm(weight)
    assert factorize(layer, Tucker2(300), ranks).relative_error == pytest.approx(expected, rel=1e-4)


def test_tucker_finds_tensorlys_error():
    layer = convolution(8, 6, 3, 3, decay=1.0)
    weight, ranks = layer.weight.detach().numpy(), (4, 3, 2, 2)
    core, bases = tensorly.decomposition.tucker(weight, list(ranks), n_iter_max=300, tol=1e-12)
    expected = np.linalg.norm(weight - tensorly.tucker_to_tensor((core, bases))) / np.linalg.norm(weight)
    assert factorize(layer, Tucker(300), ranks).relative_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("oihw")])
def test_tensor_trains_are_tensorlys(order: str):
    layer = convolution(7, 6, 3, 2)
    weight, ranks = layer.weight.detach().numpy(), (2, 5, 2)
    axes = ["oihw".index(c) for c in order]
    moved = np.transpose(weight, axes)
    full = [min(math.prod(moved.shape[:n]), math.prod(moved.shape[n:])) for n in range(1, 4)]
    ranks = tuple(map(min, ranks, full))
    cores = tensorly.decomposition.tensor_train(moved, [1, *ranks, 1])
    expected = np.transpose(tensorly.tt_to_tensor(cores), np.argsort(axes))
    found = factorize(layer, f"tt:{order}", ranks).kernel().tensor[0].numpy()
    assert np.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_tensor_trains_are_truncations_in_turn(groups: int):
    """The cores of a chain multiply to what the cuts' truncations, one after the other, leave of the dense kernel."""
    layer = convolution(8, 6, 3, 3, groups=groups)
    chained = factorize(layer, "tt:iwho", 2)
    kernel = Kernel.of(layer.weight, groups)
    for name, rank in zip(("i|who", "iw|ho", "iwh|o"), chained.ranks, strict=True):
        cut = Cut.parse(name)
        u, s, v = torch.linalg.svd(kernel.unfold(cut), full_matrices=False)
        kernel = kernel.fold(u[..., :rank] * s[:, None, :rank] @ v[:, :rank], cut)
    assert torch.allclose(chained.kernel().tensor, kernel.tensor, atol=1e-12)


def test_orders_without_a_chain():
    layer = convolution(8, 6, 3, 3, groups=2)
    factors = factorize(layer, "tt:hoiw", 1.0)
    assert factors.relative_error < 1e-12
    assert torch.allclose(factors.kernel().weight(), layer.weight)
    with pytest.raises(ConvpareError, match="tt:hoiw has no chain"):
        _ = factors.params
    with pytest.raises(ConvpareError, match="begins with i and ends with o, such as tt:ihwo"):
        factorize(layer, "tt:hoiw", "break-even")


def test_a_kernel_of_zeros():
    layer = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight.zero_()
    for name in forms_of(2):
        factors = factorize(layer, name, 0.5)
        assert factors.relative_error == 0
        assert not factors.kernel().tensor.any()
        assert not any(factors.details.values())


def test_ranks_that_others_make_superfluous_go():
    layer = convolution(16, 4, 3, 3)
    assert factorize(layer, "tucker2", (16, 1)).ranks == (9, 1)
    assert factorize(layer, "tucker", (16, 1, 2, 1)).ranks == (2, 1, 2, 1)
    assert factorize(layer, "tt:ihwo", (1, 9, 16)).ranks == (1, 3, 9)
    assert factorize(layer, "tucker2", (16, 1)).relative_error == pytest.approx(
        factorize(layer, "i|ohw", 1).relative_error, abs=1e-12
    )


def test_names():
    assert forms_of(0) == ("o|i",)
    assert sorted(forms_of(1)) == ["cp", "cp:separable", "i|ow", "o|iw", "tt:iwo", "tucker", "tucker2", "w|oi"]
    assert len(forms_of(2)) == 7 + 2 + 2 + 2
    assert len(forms_of(3)) == 15 + 2 + 6 + 2
    for name in forms_of(3):
        assert get_form(name).name == name
    assert get_form("ihw|o").name == "o|ihw"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svd", "no form 'svd'; .* choose one of cp, .*tt:ihwo, .*tucker2, .*o|ihw"),
        ("o|h", "'o|h' is no cut"),
        ("o|iw", "o|iw is no cut of a kernel with the indices oihw"),
        ("tt:iwo", "tt:iwo is no form .* choose one of tt:ihwo, tt:iwho"),
        ("tt:ihho", "is no tensor train"),
        ("tt", "is no tensor train"),
        ("tucker:3", "takes no '3'"),
        ("cp:fast", "choose cp or cp:separable"),
    ],
)
def test_names_that_are_none(name: str, message: str):
    with pytest.raises(ConvpareError, match=message.replace("|", r"\|")):
        factorize(convolution(4, 4, 3, 3), name, 1)


@pytest.mark.parametrize("name", ["tucker2", "tucker", "cp", "tt:iwo"])
def test_linear_layers_have_one_form(name: str):
    with pytest.raises(ConvpareError, match=r"o\|i"):
        factorize(nn.Linear(4, 4), name, 1)


def test_a_form_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forms, "_FAMILIES", dict(forms._FAMILIES))

    @form("half")
    class Half(Form):
        """The output channels' SVD, by another name."""

        @classmethod
        def of(cls, argument: str) -> "Half":
            return cls()

        @classmethod
        def names(cls, dimensions: int) -> tuple[str, ...]:
            return ("half",) if dimensions == 2 else ()

        @property
        def name(self) -> str:
            return "half"

        def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
            return (Cut.parse("o|ihw"),)

        def shapes(self, kernel, ranks, transposed):
            return get_form("o|ihw").shapes(kernel, ranks, transposed)

        def fit(self, kernel, ranks, transposed):
            return get_form("o|ihw").fit(kernel, ranks, transposed)

    layer = convolution(6, 4, 3, 3)
    assert "half" in forms_of(2)
    assert factorize(layer, "half", 3).relative_error == factorize(layer, "o|ihw", 3).relative_error
    with pytest.raises(ConvpareError, match="registered already"):
        form("half")(Half)


def test_the_page_on_forms(monkeypatch: pytest.MonkeyPatch):
    """Its code runs, and it names every form."""
    page = (Path(__file__).parents[2] / "docs/factorizations.md").read_text().replace("\\|", "|")
    names = [name for dimensions in range(3) for name in forms_of(dimensions)]
    assert all(f"`{name}`" in page for name in names if not name.startswith("tt:"))
    assert "`tt:ORDER`" in page
    monkeypatch.setattr(forms, "_FAMILIES", dict(forms._FAMILIES))
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, found)
    assert "first-channels" in forms._FAMILIES


def test_float32_agrees_with_float64():
    layer = convolution(16, 12, 3, 3)
    weight: Tensor = layer.weight
    for name in (name for name in forms_of(2) if "cp" not in name):
        exact = factorize(layer, name, 0.5).kernel().tensor
        single = nn.Conv2d(12, 16, 3)
        with torch.no_grad():
            single.weight.copy_(weight)
        assert torch.allclose(factorize(single, name, 0.5).kernel().tensor.double(), exact, atol=1e-5)


@pytest.mark.parametrize("name", ["tucker", "tucker2"])
def test_hooi_by_name(name):
    layer = nn.Conv2d(12, 16, 3)
    plain, refined = (factorize(layer, form, 0.4) for form in (name, f"{name}:hooi"))
    assert refined.form == f"{name}:hooi" == get_form(refined.form).name
    assert refined.relative_error < plain.relative_error
    assert refined.ranks == plain.ranks
