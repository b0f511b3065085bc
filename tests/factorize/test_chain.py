"""Chains of plain layers compute what the layer does: exactly at full rank, with the truncated kernel below it."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import counted, extent, layers, noise, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convpare
from convpare import ConvpareError
from convpare.factorize import Form, chain, factorize, forms_of, get_form, layout
from convpare.factorize.cp import Cp, Search
from convpare.graph.capture import as_args
from convpare.graph.trace import read

PLAIN = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}


def quick(name: str) -> Form:
    """The form, with a short search where it searches."""
    form = get_form(name)
    return replace(form, search=Search(starts=1, sweeps=10, rounds=3)) if isinstance(form, Cp) else form


def far(y: Tensor, z: Tensor) -> float:
    """Relative distance, and the same shape."""
    assert y.shape == z.shape
    return float((y - z).norm() / y.norm().clamp_min(1e-30))


def truncated(layer: nn.Module, factors) -> nn.Module:
    """The layer with the kernel T̂."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(factors.kernel().weight(factors.transposed))
    return other


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=layers(), data=st.data())
def test_chains_are_exact(drawn: tuple[nn.Module, Tensor], data: st.DataObject):
    layer, x = drawn
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-12
    name = data.draw(st.sampled_from(forms_of(layer.weight.ndim - 2)))
    with torch.no_grad():
        full = factorize(layer, name, 1.0)
        assert far(layer(x), chain(layer, full)(x)) <= tolerance
        assert full.relative_error <= tolerance
        cut = factorize(layer, quick(name), data.draw(st.floats(0.1, 0.9)))
        built = chain(layer, cut)
        size = max(1.0, cut.details.get("intensity_after", 1.0)) ** 0.5  # components that cancel lose digits
        assert far(truncated(layer, cut)(x), built(x)) <= tolerance * size
        assert cut.layout == layout(layer, name, cut.ranks)
        assert (cut.macs([extent(layer, x)]), cut.params) == counted(built, x)
        assert {type(module) for module in built} <= PLAIN


@pytest.mark.parametrize("form", forms_of(0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layers(form: str, dtype: torch.dtype):
    layer, x = seeded(nn.Linear(5, 7)).to(dtype), noise(2, 3, 5, dtype=dtype)
    with torch.no_grad():
        assert far(layer(x), chain(layer, factorize(layer, form, 1.0))(x)) <= (
            1e-5 if dtype == torch.float32 else 1e-12
        )
        cut = factorize(layer, form, 2)
        built = chain(layer, cut)
        assert far(truncated(layer, cut)(x), built(x)) <= 1e-5
    assert (cut.macs([extent(layer, x)]), cut.params) == counted(built, x) == (6 * 24, 24 + 7)
    assert [type(module) for module in built] == [nn.Linear, nn.Linear]


CASES = [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 8), "tucker2", (3, 2)),
    (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 8), "tt:iwho", 2),
    (nn.Conv2d(6, 8, (3, 5), padding="same"), (2, 6, 9, 8), "oi|hw", 4),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 8), "ow|ih", 2),
    (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 8), "i|ohw", 3),
    (nn.Conv2d(6, 8, 3), (2, 6, 9, 8), Cp(search=Search(1, 5)), 5),
    (nn.Conv1d(6, 8, 3, stride=2), (2, 6, 9), "tucker", (4, 3, 2)),
    (nn.Conv3d(3, 4, 3, stride=(1, 2, 1)), (1, 3, 5, 6, 4), "dh|oiw", 5),
    (nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, groups=2), (2, 6, 5, 4), "oi|hw", 3),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1), (2, 6, 5, 4), "tucker", (5, 4, 2, 2)),
    (nn.Linear(6, 8), (2, 6), "o|i", 3),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape", "form", "ranks"), CASES, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_costs_are_the_counted_ones(layer: nn.Module, shape: tuple[int, ...], form: str, ranks: object):
    x = noise(*shape, dtype=torch.float32)
    factors = factorize(layer, form, ranks)
    (traced,) = read(nn.Sequential(layer), as_args(x)).layers
    total = convpare.count(chain(layer, factors), x).total
    assert (factors.macs(traced.extents), factors.params) == (total.macs, total.params)


def test_strides_go_where_they_save_most():
    """A 1x1 convolution strides in its first link; a transposed one in its last."""
    layer = nn.Conv2d(4, 6, 1, stride=2)
    assert [m.stride for m in chain(layer, factorize(layer, "i|ohw", 2))] == [(2, 2), (1, 1)]
    layer = nn.ConvTranspose2d(4, 6, 1, stride=2, output_padding=1)
    links = chain(layer, factorize(layer, "o|ihw", 2))
    assert [type(m) for m in links] == [nn.Conv2d, nn.ConvTranspose2d]
    assert (links[1].stride, links[1].output_padding) == ((2, 2), (1, 1))


def test_shapes_of_the_chains():
    """Those that the field uses."""
    layer = nn.Conv2d(8, 10, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2))

    def shapes(form: str, ranks: object) -> list[tuple[int, ...]]:
        return [tuple(m.weight.shape) for m in chain(layer, factorize(layer, form, ranks))]

    assert shapes("o|ihw", 4) == [(4, 8, 3, 5), (10, 4, 1, 1)]
    assert shapes("i|ohw", 4) == [(4, 8, 1, 1), (10, 4, 3, 5)]
    assert shapes("ow|ih", 4) == [(4, 8, 3, 1), (10, 4, 1, 5)]
    assert shapes("oh|iw", 4) == [(4, 8, 1, 5), (10, 4, 3, 1)]
    assert shapes("h|oiw", 2) == [(16, 1, 3, 1), (10, 16, 1, 5)]
    assert shapes("w|oih", 2) == [(16, 1, 1, 5), (10, 16, 3, 1)]
    assert shapes("oi|hw", 2) == [(16, 1, 3, 5), (10, 16, 1, 1)]
    assert shapes("tucker2", (4, 3)) == [(3, 8, 1, 1), (4, 3, 3, 5), (10, 4, 1, 1)]
    assert shapes("tucker2", (10, 3)) == [(3, 8, 1, 1), (10, 3, 3, 5)]
    assert shapes("tucker", (4, 3, 2, 5)) == [(3, 8, 1, 1), (6, 1, 3, 1), (4, 6, 1, 5), (10, 4, 1, 1)]
    assert shapes("tucker", (4, 3, 2, 3)) == [(3, 8, 1, 1), (6, 1, 3, 1), (18, 1, 1, 5), (4, 18, 1, 1), (10, 4, 1, 1)]
    assert shapes("tt:ihwo", (3, 4, 5)) == [(3, 8, 1, 1), (4, 3, 3, 1), (5, 4, 1, 5), (10, 5, 1, 1)]
    assert shapes("cp", 6) == [(6, 8, 1, 1), (6, 1, 3, 5), (10, 6, 1, 1)]
    assert shapes("cp:separable", 6) == [(6, 8, 1, 1), (6, 1, 3, 1), (6, 1, 1, 5), (10, 6, 1, 1)]
    along_h = chain(layer, factorize(layer, "tt:ihwo", (3, 4, 5)))
    assert [m.stride for m in along_h] == [(1, 1), (2, 1), (1, 1), (1, 1)]
    assert [m.padding for m in along_h] == [(0, 0), (1, 0), (0, 2), (0, 0)]
    assert [m.dilation for m in along_h] == [(1, 1), (1, 1), (1, 2), (1, 1)]


def test_atoms_are_shared():
    layer = nn.Conv2d(4, 6, 3)
    atoms = chain(layer, factorize(layer, "oi|hw", 2))[0].weight.detach().reshape(4, 2, 3, 3)
    assert torch.equal(atoms, atoms[:1].expand_as(atoms))
    layer = nn.ConvTranspose2d(4, 6, 4, stride=2)
    mixing, last = chain(layer, factorize(layer, "oi|hw", 2))
    assert (type(mixing), tuple(mixing.weight.shape), last.groups) == (nn.Conv2d, (12, 4, 1, 1), 6)
    atoms = last.weight.detach().reshape(6, 2, 4, 4)
    assert torch.equal(atoms, atoms[:1].expand_as(atoms))


def test_factors_are_a_copy():
    layer = seeded(nn.Conv2d(4, 6, 3))
    factors, before = factorize(layer, "tucker2", 1.0), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(factors.kernel().weight(), before)


def test_layers_keep_what_they_have():
    layer = nn.Conv2d(4, 6, 3, bias=True, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    weight, state = layer.weight.clone(), torch.get_rng_state()
    built = chain(layer, factorize(layer, "tucker2", 0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, weight)
    assert layer.weight.grad_fn is None
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert not any(m.weight.requires_grad for m in built)
    assert built[-1].bias.requires_grad
    assert [m.bias is None for m in built] == [True, True, False]
    assert torch.equal(built[-1].bias, layer.bias)
    assert built[-1].bias.data_ptr() != layer.bias.data_ptr()
    assert not any(m.training for m in built.modules())
    assert all(p.is_contiguous() and not p.is_meta for p in built.parameters())


def test_chains_train():
    layer, x = seeded(nn.Conv2d(4, 6, 3)), noise(2, 4, 6, 6, dtype=torch.float32)
    built = chain(layer, factorize(layer, "cp", 4))
    built(x).square().sum().backward()
    assert all(bool(p.grad.norm() > 0) for p in built.parameters())


def test_a_layer_without_lossy_modes_stays_one_layer():
    layer = seeded(nn.Conv2d(4, 6, 3))
    (only,) = chain(layer, factorize(layer, "tucker2", 1.0))
    assert torch.equal(only.weight, layer.weight)


def test_computed_weights():
    """The kernel is the weight as it is in evaluation mode; reading it changes no buffer."""
    layer = parametrizations.spectral_norm(seeded(nn.Conv2d(4, 6, 3)))
    before = copy.deepcopy(layer.state_dict())
    factors = factorize(layer, "o|ihw", 1.0)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    chain(layer, factors)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    assert all(m.weight.requires_grad and m.weight.is_leaf for m in chain(layer, factors))
    layer.eval()
    x = noise(1, 4, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        assert far(layer(x), chain(layer, factors)(x)) < 1e-5
    assert all(type(module) is nn.Conv2d for module in chain(layer, factors))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), "type BatchNorm2d"),
        (Standardised(4, 4, 3), "type Standardised"),
        (nn.Bilinear(2, 3, 4), "type Bilinear"),
        (nn.LazyConv2d(4, 3), "UninitializedParameter"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), "complex64"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_layers_that_are_not_plain(layer: nn.Module, message: str):
    with pytest.raises(ConvpareError, match=message):
        factorize(layer, "o|ihw", 1)


def test_weights_that_are_no_numbers():
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight[1, 2, 0, 0] = torch.nan
    with pytest.raises(ConvpareError, match="NaN"):
        factorize(layer, "tucker2", 0.5)


def test_factors_of_another_layer():
    factors = factorize(nn.Conv2d(4, 6, 3), "o|ihw", 2)
    with pytest.raises(ConvpareError, match=r"\(1, 6, 4, 3, 3\), the layer's is \(1, 6, 4, 3, 2\)"):
        chain(nn.Conv2d(4, 6, (3, 2)), factors)
    with pytest.raises(ConvpareError, match="give the layer that was factorized"):
        chain(nn.ConvTranspose2d(4, 6, 3), factors)
