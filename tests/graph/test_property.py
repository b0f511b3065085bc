"""Zeroed == removed on random networks, in both forms. `fuzz.py` beside this file runs thousands of them."""

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

FOUND: list[list[fuzz.Finding]] = []


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 14))
def test_zeroed_is_removed(seed: int, size: int):
    try:
        FOUND.append(fuzz.check(fuzz.grow(seed, size), rounds=1))
    except fuzz.UselessError:
        reject()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_can_be_traced_and_cut_again(seed: int):
    assert all(found.error <= 1e-9 for found in fuzz.check(fuzz.grow(seed, 6), rounds=3))


@pytest.mark.parametrize(("seed", "size"), [(105, 10), (106, 11), (233, 10), (272, 1), (910, 15), (6676, 5)])
def test_networks_that_once_failed(seed: int, size: int):
    """Parts of one channel several times; k and 2k counting what is no multiple; a norm of its direction's shape; the
    number of one group standing for that of another; half of an odd number of channels."""
    assert all(found.error <= 1e-9 for found in fuzz.check(fuzz.grow(seed, size)))


def test_the_random_networks_are_no_vacuous_proof():
    """Runs after the property: most networks lost channels, and felt it."""
    if len(FOUND) < 20:
        pytest.skip("the property did not run before this")
    for form in range(len(fuzz.FORMS)):
        assert sum(found[form].removed > 0 for found in FOUND) >= 0.6 * len(FOUND)
        assert sum(found[form].effect > 1e-3 for found in FOUND) >= 0.5 * len(FOUND)
        assert max(found[form].error for found in FOUND) <= 1e-9


def test_networks_are_the_same_for_the_same_seed():
    first, second = fuzz.grow(3, 14), fuzz.grow(3, 14)
    assert first == second
    one, other = first.build().state_dict(), second.build().state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_kind_of_step_is_made_and_runs():
    """A plan's module, built from its source, makes what the plan says."""
    made = set()
    for seed in range(150):
        plan = fuzz.grow(seed, 12)
        made |= {step.kind for step in plan.steps}
        if seed < 30:
            model = plan.build()
            heads = [shape for step in plan.steps if step.head for shape in step.shapes]
            assert [tuple(x.shape) for x in fuzz.outputs(model, plan.inputs())] == heads
    assert made >= {maker.__name__ for maker, _ in fuzz.MAKERS} - {"parts"} | {"stem", "head", "joined"}


def test_a_failing_network_is_made_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Whatever holds an attention step fails here: what is printed holds little else, and runs."""

    def broken(plan: fuzz.Plan, *_: object, **__: object) -> list[fuzz.Finding]:
        plan.build()(*plan.inputs())
        if any(step.kind == "attention" for step in plan.steps):
            raise fuzz.BrokenError("graph: attention", "on purpose")
        return [fuzz.Finding(form, 1, 1, 1, 0, 1, 0.0, 1.0) for form in fuzz.FORMS]

    monkeypatch.setattr(fuzz, "check", broken)
    seed = next(n for n in range(100) if any(step.kind == "attention" for step in fuzz.grow(n, 8).steps))
    small = fuzz.shrink(fuzz.grow(seed, 8), "graph: attention", fuzz.FORMS, rounds=1)
    assert sorted(step.kind for step in small.steps if step.kind != "stem") == ["attention", "head"]
    assert fuzz.main(["--graphs", "1", "--seed", str(seed), "--size", "8"]) == 1
    told = capsys.readouterr().out
    assert f"FAILED: python tests/graph/fuzz.py --graphs 1 --seed {seed} --size 8" in told
    assert "class Net(nn.Module):" in told
    assert fuzz.main(["--graphs", "1", "--seed", "0", "--size", "1"]) == 0
