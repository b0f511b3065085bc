"""Factorizations fitted to activations: the cost is the output's error, and the fits make it small."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.factorize import chain, factorize
from convpare.factorize.metric import Metric, Whitening
from convpare.redundancy.cuts import Cut, Kernel
from convpare.redundancy.moments import Root

SIZES = {"i": 4, "h": 3, "w": 2}


def moment(size: int, seed: int, groups: int = 1, spread: float = 2.0) -> Tensor:
    """A second moment whose eigenvalues span several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(groups, size, size, generator=generator, dtype=torch.float64)).Q
    scale = torch.exp(spread * torch.randn(groups, size, generator=generator, dtype=torch.float64))
    return (basis * scale[:, None]) @ basis.mT


def product(groups: int = 1, spatial: tuple[int, ...] = (3, 2), into: int = 4) -> Tensor:
    """A second moment that is a product of its parts, alike in all groups but in i."""
    found = moment(into, 1, groups)
    for n, size in enumerate(spatial):
        part = moment(size, 2 + n)[0]
        part = part / part.diagonal().mean()
        found = torch.stack([torch.kron(h, part) for h in found])
    return found


def conv(out: int = 6, into: int = 4, size: tuple[int, ...] = (3, 2), groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
    return kind(into * groups, out * groups, size, groups=groups, dtype=torch.float64)


def kernel(layer: nn.Module, transposed: bool = False) -> Kernel:
    return Kernel.of(layer.weight.detach(), getattr(layer, "groups", 1), transposed)


def cost(layer: nn.Module, form: str, ranks: tuple[int, ...], metric: Metric, aware: bool) -> float:
    found = factorize(layer, form, ranks, metric if aware else None)
    dense = kernel(layer, found.transposed)
    return metric.cost(Kernel(dense.tensor - found.kernel().tensor)) / metric.cost(dense)


def test_the_cost_is_the_error_of_the_output():
    """Weighted by gradients: the mean over positions and images of the square of g · E x."""
    layer = conv(groups=2)
    x = torch.randn(5, 8, 9, 7, dtype=torch.float64)
    g = torch.randn(2, 50, 6, dtype=torch.float64)
    seen = F.unfold(x, (3, 2)).unflatten(1, (2, 24)).movedim(1, 0).movedim(2, 3).flatten(1, 2)  # (groups, n, unknowns)
    metric = Metric(seen.mT @ seen / seen.shape[1], g.mT @ g / 50)
    change = torch.randn_like(layer.weight)
    y = F.conv2d(x, change, groups=2).unflatten(1, (2, 6)).movedim(1, 0).movedim(2, 4).flatten(1, 3)  # (groups, n, o)
    expected = ((y @ metric.outputs) * y).sum() / y.shape[1]
    assert metric.cost(Kernel.of(change, 2)) == pytest.approx(float(expected), rel=1e-12)
    plain = Metric(metric.inputs)
    assert plain.cost(Kernel.of(change, 2)) == pytest.approx(float(y.square().sum() / y.shape[1]), rel=1e-12)


def test_the_cost_of_a_transposed_convolution():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, bias=False, dtype=torch.float64)
    x = torch.randn(5, 4, 7, 7, dtype=torch.float64)
    seen = x.movedim(1, 3).flatten(0, 2)
    metric = Metric((seen.mT @ seen / len(seen))[None])
    pieces = torch.einsum("ni,iohw->nohw", seen, layer.weight.detach())
    expected = pieces.square().sum() / len(seen)
    assert metric.cost(kernel(layer, True)) == pytest.approx(float(expected), rel=1e-12)


def test_parts_of_a_second_moment():
    x = torch.randn(100, 4, 3, 2, dtype=torch.float64)
    flat = x.flatten(1)
    metric = Metric((flat.mT @ flat / 100)[None])
    dense = kernel(conv())
    for axes, letters in (((), "i"), ((0,), "ih"), ((1,), "iw"), ((0, 1), "ihw")):
        order = [0, *("_ihw".index(c) for c in letters), *("_ihw".index(c) for c in "ihw" if c not in letters)]
        part = x.permute(order).flatten(1, len(letters)).flatten(2) if axes != (0, 1) else flat[:, :, None]
        samples = part.movedim(1, -1).reshape(-1, part.shape[1])
        torch.testing.assert_close(metric.marginal(dense, axes)[0], samples.mT @ samples / len(samples))
    rows = x.movedim(2, -1).reshape(-1, 3)
    expected = rows.mT @ rows / len(rows)
    torch.testing.assert_close(metric.spatial(dense, (0,))[0], expected / expected.diagonal().mean())


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_where_o_stands_alone_nothing_is_better(groups: int, outputs: bool):
    """For any second moment; Eckart and Young in the whitened space. The ridge is all that is lost."""
    layer = conv(groups=groups)
    metric = Metric(moment(24, 1, groups, 0.7), moment(6, 5, groups, 0.7) if outputs else None)
    left = Root.of(metric.outputs).root if outputs else torch.eye(6, dtype=torch.float64)
    white = left @ kernel(layer).tensor.reshape(groups, 6, 24) @ Root.of(metric.inputs).root.mT
    for rank in (1, 3, 5, 6):
        best = torch.linalg.svdvals(white)[:, rank:].square().sum() / white.square().sum()
        assert cost(layer, "o|ihw", (rank,), metric, True) == pytest.approx(float(best), rel=5e-3, abs=1e-12)


@pytest.mark.parametrize(
    ("form", "ranks"),
    [("o|ihw", 2), ("i|ohw", 2), ("oh|iw", 4), ("ow|ih", 3), ("oi|hw", 2), ("h|oiw", 1), ("w|oih", 1)],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_of_a_product_every_cut_is_optimal(form: str, ranks: int, groups: int):
    layer = conv(groups=groups)
    metric = Metric(product(groups), moment(6, 5, groups))
    dense = kernel(layer)
    space = Whitening(metric, dense, (0, 1))
    white = space.whiten(dense)
    values = torch.linalg.svdvals(white.unfold(Cut.parse(form)))
    best = float(values[:, ranks:].square().sum() / values.square().sum())
    found = cost(layer, form, (ranks,), metric, True)
    assert found == pytest.approx(best, rel=2e-2)
    assert found < cost(layer, form, (ranks,), metric, False)
    details = factorize(layer, form, ranks, metric).details
    assert details["output_error"] == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("form", "ranks"),
    [("tucker2", (3, 2)), ("tucker2", (6, 2)), ("tucker2:hooi", (3, 2)), ("tt:ihwo", (2, 4, 3)), ("cp", (6,))],
)
def test_other_forms_whiten_the_channels(form: str, ranks: tuple[int, ...]):
    layer = conv()
    metric = Metric(torch.stack([torch.kron(h, torch.eye(6, dtype=torch.float64)) for h in moment(4, 1)]), moment(6, 5))
    assert cost(layer, form, ranks, metric, True) < 0.9 * cost(layer, form, ranks, metric, False)


@pytest.mark.parametrize(
    ("form", "ranks"),
    [("o|ihw", (6,)), ("oh|iw", (8,)), ("oi|hw", (6,)), ("tucker2", (6, 4)), ("tt:ihwo", (4, 12, 6)), ("i|ohw", (4,))],
)
def test_full_rank_is_exact(form: str, ranks: tuple[int, ...]):
    layer = conv()
    found = factorize(layer, form, ranks, Metric(moment(24, 1), moment(6, 5)))
    assert found.relative_error < 1e-10
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(chain(layer, found)(x), layer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(3,), (3, 2), (2, 3, 2)])
def test_one_to_three_dimensions(size: tuple[int, ...]):
    layer = conv(size=size)
    metric = Metric(moment(4 * math.prod(size), 1))
    for form in ("o|i" + "dhw"[3 - len(size) :], "o" + "dhw"[3 - len(size)] + "|i" + "dhw"[4 - len(size) :]):
        assert cost(layer, form, (2,), metric, True) < cost(layer, form, (2,), metric, False)


def test_linear_and_transposed():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, dtype=torch.float64)
    metric = Metric(moment(8, 1), moment(6, 2))
    assert cost(linear, "o|i", (2,), metric, True) < 0.5 * cost(linear, "o|i", (2,), metric, False)
    up = nn.ConvTranspose2d(4, 6, 3, dtype=torch.float64)
    metric = Metric(moment(4, 1), moment(6, 2))
    for form, ranks in (("o|ihw", (3,)), ("i|ohw", (2,)), ("oh|iw", (5,)), ("tucker2", (3, 2))):
        assert cost(up, form, ranks, metric, True) < cost(up, form, ranks, metric, False), form
    with pytest.raises(ConvpareError, match="of a transposed convolution cannot be fitted"):
        factorize(up, "oi|hw", 2, metric)


def test_what_cannot_be_fitted_says_so():
    layer = conv()
    for wrong, message in (
        (Metric(moment(5, 1)), r"second moments are \(1, 5, 5\) for a kernel of \(1, 6, 4, 3, 2\)"),
        (Metric(moment(24, 1), moment(5, 1)), "give those of this layer"),
        (Metric(moment(24, 1) * math.nan), "NaN or infinity"),
    ):
        with pytest.raises(ConvpareError, match=message):
            factorize(layer, "o|ihw", 2, wrong)
    with pytest.raises(ConvpareError, match="cannot be fitted to activations"):
        factorize(layer, "tucker", (6, 4, 2, 2), Metric(moment(24, 1)))


def test_inputs_that_are_always_zero():
    """Their weights cost nothing and do no harm."""
    layer = conv()
    inputs = moment(24, 1)
    inputs[:, :6] = 0
    inputs[:, :, :6] = 0
    found = factorize(layer, "o|ihw", 3, Metric(inputs))
    assert all(bool(torch.isfinite(link.tensor).all()) for link in found.links)
    assert 0 < found.details["output_error"] < 1
    dead = factorize(layer, "o|ihw", 3, Metric(torch.zeros(1, 24, 24, dtype=torch.float64)))
    assert dead.details["output_error"] == 0.0
