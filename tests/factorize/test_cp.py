"""The search for components only ever improves, finds planted ones, and keeps them from degenerating."""

import itertools
import math

import numpy as np
import pytest
import torch
from layers import noise, seeded
from torch import Tensor, nn

from convpare import ConvpareError
from convpare.factorize import factorize
from convpare.factorize.cp import (
    Cp,
    Search,
    Vectors,
    alternating,
    balanced,
    best_of,
    error_of,
    exact,
    intensity,
    sensitivity,
    stabilised,
)

tensorly = pytest.importorskip("tensorly")
LONG = Search(starts=3, sweeps=3000, tolerance=1e-10)


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.ndim - 1))


def product(vectors: Vectors) -> Tensor:
    """The sum of the outer products, by a route of its own: (b, *sizes)."""
    names = "abcde"[: len(vectors)]
    return torch.einsum(",".join(f"z{n}r" for n in names) + f"->z{names}", *vectors)


def drawn(rank: int, *sizes: int, blocks: int = 1, seed: int = 0) -> Vectors:
    return [noise(blocks, n, rank, seed=seed + k) for k, n in enumerate(sizes)]


@pytest.mark.parametrize("form", [Cp(search=LONG), Cp(True, LONG)], ids=lambda f: f.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_planted_components_are_found(form: Cp, groups: int):
    sizes = (8, 6, 3, 3) if form.separable else (8, 6, 9)
    layer = nn.Conv2d(6 * groups, 8 * groups, 3, groups=groups).double()
    with torch.no_grad():
        layer.weight.copy_(product(drawn(4, *sizes, blocks=groups)).reshape(layer.weight.shape))
    assert factorize(layer, form, 4).relative_error < 1e-6
    assert factorize(layer, form, 3).relative_error > 0.01


@pytest.mark.parametrize("shape", [(1, 8, 6, 9), (3, 5, 4, 3, 3), (2, 7, 2, 9), (1, 4, 4, 2, 3, 2)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_least_squares_never_raise_the_error(shape: tuple[int, ...], rank: int):
    tensor = unit(noise(*shape))
    start = drawn(rank, *shape[1:], blocks=shape[0], seed=5)
    steps = list(alternating(tensor, start, Search(sweeps=60, tolerance=0)))
    assert len(steps) > 5
    for vectors, error in steps:
        assert torch.allclose(error, error_of(tensor, vectors), atol=1e-7)
        assert torch.allclose(error, (tensor - product(vectors)).flatten(1).norm(dim=1), atol=1e-7)
    errors = torch.stack([error for _, error in steps])
    assert bool((errors.diff(dim=0) <= 1e-7).all())
    assert bool((errors[-1] < error_of(tensor, start)).all())


def test_the_error_is_tensorlys_or_less():
    tensor = unit(noise(1, 8, 6, 9))
    for rank in (2, 4, 6):
        weights, factors = tensorly.decomposition.parafac(tensor[0].numpy(), rank, n_iter_max=500, init="svd", tol=1e-9)
        theirs = np.linalg.norm(tensor[0].numpy() - tensorly.cp_to_tensor((weights, factors)))
        ours = error_of(tensor, best_of(tensor, rank, Search(starts=3, sweeps=500, tolerance=1e-9)))
        assert float(ours) <= 1.01 * theirs


def test_more_starts_are_no_worse():
    tensor = unit(noise(2, 8, 6, 9))
    errors = [error_of(tensor, best_of(tensor, 6, Search(starts=n, sweeps=50))) for n in (1, 2, 4)]
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(errors))


def test_the_search_is_reproducible_and_leaves_torch_alone():
    layer, state = seeded(nn.Conv2d(4, 6, 3)), torch.get_rng_state()
    first, again = (factorize(layer, Cp(search=Search(seed=3)), 10) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(first.links, again.links, strict=True))


CASES = {
    "noise": (unit(noise(2, 6, 5, 9)), 7),
    "separable": (unit(noise(1, 6, 5, 3, 3)), 9),
    "low rank": (unit(product(drawn(3, 6, 5, 9))), 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("objective", ["sensitivity", "intensity"])
def test_the_correction_preserves_the_error(name: str, objective: str):
    tensor, rank = CASES[name]
    search = Search(starts=1, sweeps=150, objective=objective)
    rough = best_of(tensor, rank, search)
    bound = error_of(tensor, rough)
    measure = {"sensitivity": sensitivity, "intensity": intensity}[objective]
    values = [measure(rough)]
    for rounds in (1, 2, 5, 50):
        vectors = stabilised(tensor, rough, Search(objective=objective, rounds=rounds))
        assert bool((error_of(tensor, vectors) <= bound).all())
        values.append(measure(vectors))
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(values))
    if name != "low rank":
        assert bool((values[-1] < 0.95 * values[0]).all())


@pytest.mark.parametrize("objective", ["sensitivity", "intensity"])
def test_the_correction_cures_degenerate_components(objective: str):
    """Two huge components that nearly cancel shrink to the size of the others."""
    tensor = unit(noise(1, 6, 5, 9))
    sound = best_of(tensor, 5, Search())
    pair = [100 * v.expand(-1, -1, 2) for v in drawn(1, 6, 5, 9)]
    pair[0] = pair[0] * torch.tensor([1.0, -1.0]) + 1e-6 * noise(1, 6, 2)
    rough = [torch.cat(both, 2) for both in zip(sound, pair, strict=True)]
    cured = stabilised(tensor, rough, Search(objective=objective, rounds=200))
    assert float(intensity(rough)) > 1e12
    assert float(intensity(cured)) < 20
    assert float(error_of(tensor, cured)) <= float(error_of(tensor, rough))


@pytest.mark.parametrize("options", [{"starts": 0}, {"sweeps": 0}, {"objective": "norm"}])
def test_searches_that_are_none(options: dict[str, object]):
    with pytest.raises(ConvpareError, match="cannot search; give starts and sweeps from 1"):
        Search(**options)


def test_no_correction():
    tensor = unit(noise(1, 6, 5, 9))
    rough = best_of(tensor, 4, Search())
    assert stabilised(tensor, rough, Search(objective=None)) is rough


def test_what_is_reported():
    layer = seeded(nn.Conv2d(6, 8, 3, groups=2).double())
    with torch.no_grad():
        layer.weight[4:] *= 5
    factors = factorize(layer, "cp", 5)
    assert set(factors.details) == {"intensity_before", "intensity_after", "sensitivity_before", "sensitivity_after"}
    assert factors.details["intensity_after"] < factors.details["intensity_before"]
    assert factors.details["sensitivity_after"] < factors.details["sensitivity_before"]
    first, depthwise, last = (link.tensor for link in factors.links)
    columns = [first.flatten(3).squeeze(3).mT, depthwise.reshape(2, 5, 9).mT, last.flatten(3).squeeze(3)]
    total = float(intensity(columns).sum() / layer.weight.detach().square().sum())
    assert factors.details["intensity_after"] == pytest.approx(total, rel=1e-9)
    rough = factorize(layer, Cp(search=Search(objective=None)), 5)
    assert factors.relative_error <= rough.relative_error
    assert rough.details["intensity_after"] == rough.details["intensity_before"] == factors.details["intensity_before"]


@pytest.mark.parametrize("sizes", [(5, 4, 3), (4, 3, 2, 2)])
def test_sensitivity_is_the_squared_norm_of_the_jacobian(sizes: tuple[int, ...]):
    vectors = drawn(3, *sizes)
    jacobians = torch.autograd.functional.jacobian(lambda *v: product(list(v)), tuple(vectors))
    assert float(sensitivity(vectors)) == pytest.approx(sum(float(j.square().sum()) for j in jacobians), rel=1e-12)


def test_intensity_is_the_sum_of_the_components_squares():
    vectors = drawn(3, 5, 4, 6)
    alone = [product([v[..., r : r + 1] for v in vectors]) for r in range(3)]
    assert float(intensity(vectors)) == pytest.approx(sum(float(x.square().sum()) for x in alone), rel=1e-12)


def test_balanced_vectors_have_equal_norms_and_the_same_product():
    vectors = drawn(4, 5, 3, 6, blocks=2)
    even = balanced(vectors)
    assert torch.allclose(product(even), product(vectors))
    norms = [v.norm(dim=1) for v in even]
    assert all(torch.allclose(n, norms[0]) for n in norms)


@pytest.mark.parametrize("sizes", [(5, 4, 9), (4, 20, 3, 2), (2, 3, 40)])
def test_enough_components_are_exact(sizes: tuple[int, ...]):
    tensor = noise(2, *sizes)
    vectors = exact(tensor)
    assert vectors[0].shape[2] == math.prod(sizes) // max(sizes)
    assert torch.equal(product(vectors), tensor)


def test_blocks_are_searched_apart():
    both, start = unit(noise(2, 6, 5, 9)), drawn(4, 6, 5, 9, blocks=2)
    search = Search(sweeps=20, tolerance=0, rounds=3)
    *_, (rough, _) = alternating(both, start, search)
    together = stabilised(both, rough, search)
    for n in range(2):
        one = slice(n, n + 1)
        *_, (rough, _) = alternating(both[one], [v[one] for v in start], search)
        alone = stabilised(both[one], rough, search)
        assert all(torch.allclose(t[one], a, atol=1e-8) for t, a in zip(together, alone, strict=True))
