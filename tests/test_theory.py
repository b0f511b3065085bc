"""The simulation as a whole: its points, its store, its text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from convpare import theory as module
from convpare.errors import ConvpareError
from convpare.redundancy.complexity import Design
from convpare.redundancy.estimation import Setup, estimation_error, fit_line
from convpare.theory import Theory, TheoryOptions, theory

OPTIONS = TheoryOptions(
    lengths=(2, 2),
    pooled=(2, 2),
    R=1,
    ranks=(1, 1),
    K=(1, 2),
    ratios=(3, 9, 25),
    repetitions=2,
    setup=Setup(strides=(2, 2), pools=(2, 1)),
)


@pytest.fixture(scope="module")
def measured() -> Theory:
    return theory(OPTIONS)


@pytest.fixture
def calls(monkeypatch):
    """Data sets that were simulated, each with an error of its own that takes no time."""
    made: list[tuple[Design, str, int, int]] = []

    def error(design, inputs, n, seed, setup):
        made.append((design, inputs, n, seed))
        return 1 / n**0.5 + 1e-3 * len(made) ** 0.5

    monkeypatch.setattr(module, "estimation_error", error)
    return made


def test_points(measured):
    assert len(measured.points) == 3 * 2 * 2 * 3 * 2
    point = measured.points[0]
    assert (point.kind, point.inputs, point.K, point.n, point.d_M, point.seed) == ("cnn", "independent", 1, 27, 9, 0)
    assert point.error == estimation_error(Design("cnn", (2, 2), (2, 2), 1), "independent", 27, 0, OPTIONS.setup)
    assert {(p.kind, p.d_M) for p in measured.points} == {("cnn", 9), ("cnn", 18), ("tucker", 9), ("cp", 8)}
    assert len({p.error for p in measured.points}) == len(measured.points)


def test_fits_leave_out_the_smallest_n(measured):
    mine = [p for p in measured.points if (p.kind, p.inputs, p.K) == ("cp", "autoregressive", 2)]
    straight = [p for p in mine if p.n >= 9 * p.d_M]
    fit = measured.fits[-1]
    assert (fit.kind, fit.inputs, fit.K, fit.points) == ("cp", "autoregressive", 2, 4)
    assert fit.line == fit_line([p.t for p in straight], [p.error for p in straight])
    few = [p.error / p.t for p in mine if p.n == 24]
    assert fit.bend == pytest.approx(sum(few) / 2 / fit.line.rate.value - 1)
    assert len(measured.fits) == 12
    assert len(measured.comparisons) == 6


def test_ranks_are_computed(measured):
    assert len(measured.ranks) == 6
    assert all(rank.jacobian == rank.intrinsic for rank in measured.ranks)
    assert [(r.kind, r.K, r.naive, r.sample, r.jacobian) for r in measured.ranks[1:4]] == [
        ("cnn", 2, 16, 18, 12),
        ("tucker", 1, 10, 9, 6),
        ("tucker", 2, 15, 9, 6),
    ]


def test_text_and_json(measured):
    text = str(measured)
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[1].split() == ["cnn", "1", "8", "9", "-1", "7", "7"]
    assert f"{measured.fits[0].line.slope.value:.3f} ±" in text
    content = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert content["points"][0].keys() == {"kind", "inputs", "K", "n", "d_M", "error", "seed"}
    assert content["fits"][0]["slope"]["low"] == measured.fits[0].line.slope.low
    assert content["options"]["setup"]["strides"] == [2, 2]
    assert content["ranks"][0]["jacobian"] == 7


def test_one_k_is_not_compared(calls):
    alone = theory(replace(OPTIONS, K=(2,)))
    assert alone.comparisons == ()
    assert "F-tests" not in str(alone)


def test_a_second_run_measures_nothing(tmp_path, calls):
    store, told = tmp_path / "points.jsonl", []
    first = theory(OPTIONS, store)
    made = len(calls)
    second = theory(OPTIONS, store, on_progress=lambda *what: told.append(what))
    assert len(calls) == made == 72
    assert second == first
    assert told[0] == ("simulating", 0, 72)
    assert told[-1] == ("simulating", 72, 72)


def test_other_options_are_measured_beside(tmp_path, calls):
    store = tmp_path / "points.jsonl"
    theory(OPTIONS, store)
    theory(replace(OPTIONS, repetitions=3), store)
    assert len(calls) == 72 + 36
    theory(replace(OPTIONS, setup=replace(OPTIONS.setup, noise=0.3)), store)
    assert len(calls) == 72 + 36 + 72
    theory(OPTIONS, store)
    assert len(calls) == len(store.read_text().splitlines()) == 180


@pytest.mark.parametrize("left", [1, 8, 30, -1])
def test_an_interrupted_line_is_measured_again(tmp_path, calls, left):
    store = tmp_path / "points.jsonl"
    whole = theory(OPTIONS, store)
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:10]) + lines[10][:left])
    calls.clear()
    again = theory(OPTIONS, store)
    assert len(calls) == 62
    assert again.points[:10] == whole.points[:10]
    stored = [json.loads(line)["found"]["error"] for line in store.read_text().splitlines()]
    assert stored == [p.error for p in again.points]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"simulation": {"kind": "cnn"}}',
        b'{"simulation": {"kind": "cnn"}, "found": {}}',
        b'{"simulation": {"kind": "cnn"}, "found": {"error": NaN}}',
        b'{"simulation": {"kind": "cnn"}, "found": {"error": -0.5}}',
        b'{"simulation": {"kind": "cnn"}, "found": {"error": "0.5"}}',
        b'{"simulation": ["cnn"], "found": {"error": 0.5}}',
        b'{"truncation": {"kind": "cnn"}, "found": {"error": 0.5}}',
    ],
)
def test_a_corrupt_line_is_named(tmp_path, calls, line):
    store = tmp_path / "points.jsonl"
    theory(OPTIONS, store)
    lines = store.read_bytes().splitlines()
    content = b"\n".join([*lines[:4], line, *lines[5:]]) + b"\n"
    store.write_bytes(content)
    with pytest.raises(ConvpareError, match=r"line 5 of .*points.jsonl is no point of a simulation"):
        theory(OPTIONS, store)
    assert store.read_bytes() == content


def test_the_file_of_someone_else_is_left_as_it_is(tmp_path, calls):
    store = tmp_path / "notes.txt"
    store.write_text("no newline at the end")
    with pytest.raises(ConvpareError, match="line 1"):
        theory(OPTIONS, store)
    assert store.read_text() == "no newline at the end"
    assert not calls


def test_places_that_hold_no_store_are_refused(tmp_path, calls):
    for place, message in ((tmp_path, "no ordinary file"), (tmp_path / "none" / "points.jsonl", "give another file")):
        with pytest.raises(ConvpareError, match=message):
            theory(OPTIONS, place)
    assert not calls


def test_a_store_that_is_full_is_an_error(tmp_path, calls, monkeypatch):
    opened = Path.open

    def full(self, mode="r", *args):
        if mode == "ab":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *args)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ConvpareError, match="No space left on device"):
        theory(OPTIONS, tmp_path / "points.jsonl")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratios": (3, 4, 9)}, "two from 9 on"),
        ({"ratios": (0.5, 9, 16)}, "1 or more"),
        ({"ratios": (9, 16, float("nan"))}, "finite"),
        ({"ratios": (9, 9, 16)}, "each value once"),
        ({"K": (2, 2)}, "each value once"),
        ({"K": ()}, "K is"),
        ({"K": (1, 2), "R": 2}, "R is 2, but K=1"),
        ({"inputs": ("dependent",)}, "inputs are"),
        ({"inputs": ()}, "inputs are"),
        ({"repetitions": 1}, "two or more"),
        ({"seed": -1}, "seed >= 0"),
        ({"setup": Setup()}, "strides are"),
        ({"ranks": (3, 1)}, "ranks are"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConvpareError, match=message):
        replace(OPTIONS, **wrong)
