"""Zeroed == removed on random networks. `fuzz.py` beside this file runs thousands of them."""

import fuzz
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

FOUND: list[fuzz.Finding] = []


@settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 18))
@example(seed=0, size=12)
def test_zeroed_is_removed(seed: int, size: int):
    FOUND.append(fuzz.check(seed, size, rounds=1))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_can_be_traced_and_cut_again(seed: int):
    assert fuzz.check(seed, size=10, rounds=3).error <= 1e-9


def test_networks_are_the_same_for_the_same_seed():
    first, second = fuzz.RandomNet(3, 14), fuzz.RandomNet(3, 14)
    assert first.steps == second.steps
    assert str(first) == str(second)
    assert [p.tolist() for p in first.parameters()] == [p.tolist() for p in second.parameters()]


def test_the_random_networks_are_no_vacuous_proof():
    """Runs after the property: most networks lost channels, and felt it."""
    if len(FOUND) < 20:
        pytest.skip("the property did not run before this")
    assert sum(f.removed > 0 for f in FOUND) >= 0.6 * len(FOUND)
    assert sum(f.effect > 1e-3 for f in FOUND) >= 0.5 * len(FOUND)
    assert max(f.error for f in FOUND) <= 1e-9
