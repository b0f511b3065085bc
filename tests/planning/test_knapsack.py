"""The multiple-choice knapsack against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convpare.errors import ConvpareError, Infeasible
from convpare.planning import knapsack
from convpare.planning.knapsack import choose, estimated


def brute(costs: list[np.ndarray], errors: list[np.ndarray], limits: list[float]) -> float | None:
    """The least error of all choices within the limits."""
    best = None
    for at in itertools.product(*(range(len(e)) for e in errors)):
        spent = sum(c[i] for c, i in zip(costs, at, strict=True))
        error = float(sum(e[i] for e, i in zip(errors, at, strict=True)))
        if (spent <= np.asarray(limits)).all() and (best is None or error < best):
            best = error
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), things=st.integers(1, 5), budgets=st.integers(1, 3), share=st.floats(0.05, 1.1))
def test_as_good_as_brute_force(seed: int, things: int, budgets: int, share: float):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, things)
    costs = [rng.integers(1, 10**6, (n, budgets)).astype(float) for n in counts]
    errors = [rng.exponential(size=n) * 10.0 ** rng.integers(-3, 3) for n in counts]
    limits = list(share * sum(c.mean(0) for c in costs))
    best = brute(costs, errors, limits)
    if best is None:
        with pytest.raises(ConvpareError, match="infeasible"):
            choose(costs, errors, limits)
        return
    found = choose(costs, errors, limits)
    assert found.error == pytest.approx(best, rel=1e-9)
    assert (sum(c[i] for c, i in zip(costs, found.at, strict=True)) <= np.asarray(limits)).all()
    assert found.bound <= found.error
    assert found.gap <= 1e-9


def test_many_options_to_a_proven_gap():
    """As many as a large network has."""
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.integers(1, 10**8, (60, 2)), 0)[::-1].astype(float) for _ in range(55)]
    errors = [np.sort(rng.exponential(size=60)) for _ in range(55)]
    limits = [0.5 * sum(c[0, k] for c in costs) for k in range(2)]
    found = choose(costs, errors, limits)
    assert found.gap <= 1e-5
    assert (sum(c[i] for c, i in zip(costs, found.at, strict=True)) <= np.asarray(limits)).all()


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_what_is_given_up_is_in_the_bound(monkeypatch: pytest.MonkeyPatch, budgets: int):
    """With room for few beginnings the best may be missed, but the bound says so."""
    monkeypatch.setattr(knapsack, "STATES", 3)
    gaps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        costs = [rng.integers(1, 100, (6, budgets)).astype(float) for _ in range(6)]
        errors = [rng.exponential(size=6) for _ in costs]
        limits = list(0.7 * sum(c.mean(0) for c in costs))
        best = brute(costs, errors, limits)
        try:
            found = choose(costs, errors, limits)
        except Infeasible:
            continue
        assert best is not None and found.bound <= best * (1 + 1e-9) and found.error >= best * (1 - 1e-9)
        gaps.append(found.gap)
    assert len(gaps) > 20 and max(gaps) > 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), many=st.integers(1, 200), budgets=st.integers(1, 3))
def test_only_what_another_beats_is_left_out(seed: int, many: int, budgets: int):
    rng = np.random.default_rng(seed)
    spent, error = rng.integers(0, 12, (many, budgets)).astype(float), rng.integers(0, 12, many).astype(float)
    now = knapsack._Beginnings(spent, error, error, np.arange(many))
    table = np.column_stack([spent, error])
    stays = knapsack._undominated(now)
    for gone in np.setdiff1d(np.arange(many), stays):
        assert (table[stays] <= table[gone]).all(1).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), things=st.integers(1, 5), budgets=st.integers(1, 3), share=st.floats(0.3, 1.1))
def test_an_estimate_is_the_error_of_a_choice(seed: int, things: int, budgets: int, share: float):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, things)
    costs = [rng.integers(1, 10**6, (n, budgets)).astype(float) for n in counts]
    errors = [rng.exponential(size=n) for n in counts]
    limits = list(share * sum(c.mean(0) for c in costs))
    best = brute(costs, errors, limits)
    try:
        estimate = estimated(costs, errors, limits)
    except Infeasible:
        estimate = np.inf
    assert estimate >= (np.inf if best is None else best * (1 - 1e-9))
    sums = {round(sum(e[i] for e, i in zip(errors, at, strict=True)), 9)
            for at in itertools.product(*(range(n) for n in counts))}  # fmt: skip
    assert estimate == np.inf or round(estimate, 9) in sums


def test_what_is_of_no_interest():
    costs, errors = [np.array([[0.0], [1.0]])] * 2, [np.array([2.0, 0.5])] * 2
    assert choose(costs, errors, [1.0]).error == 2.5
    assert choose(costs, errors, [1.0], below=3.0).at in ((0, 1), (1, 0))
    with pytest.raises(Infeasible, match=r"no choice is within the budgets with an error below 2\.4"):
        choose(costs, errors, [1.0], below=2.4)


def test_solvers_do_not_print(capfd: pytest.CaptureFixture[str]):
    """A solver of integer programs that was here before printed where options are near each other."""
    rng = np.random.default_rng(0)
    for share in np.linspace(0.2, 0.8, 7):
        costs = [-np.linspace(0, 10**6, 40)[:, None] * rng.uniform(0.5, 1.5) for _ in range(40)]
        errors = [np.linspace(0, 1, 40) ** 2 * rng.exponential() for _ in costs]
        found = choose(costs, errors, [share * float(sum(c.min() for c in costs))])
        assert found.gap <= 1e-5
    assert capfd.readouterr() == ("", "")


def test_without_a_limit_the_least_error():
    found = choose([np.zeros((3, 0)), np.zeros((2, 0))], [np.array([3.0, 1.0, 2.0]), np.array([0.5, 4.0])], [])
    assert (found.at, found.error, found.bound) == ((1, 0), 1.5, 1.5)


def test_nothing_to_choose():
    assert choose([], [], [3.0]).at == ()
    with pytest.raises(ConvpareError, match="exceeded already"):
        choose([], [], [-1.0])
