"""How long a step will still take."""

import pytest

from convpare import terminal


def test_the_end_of_a_step_is_foretold_by_its_pace(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    pace = terminal._Pace()
    assert pace.left("training", 40, 1040) == ""  # taken up where it was stopped: 40 cost no time
    now += 4
    assert pace.left("training", 44, 1040) == ""
    now += 6
    assert pace.left("training", 50, 1040) == ", 17 min left"
    assert pace.left("training", 1030, 1040) == ""
    now += 90
    assert pace.left("training", 50, 1040) == ", 2 h 45 min left"
    assert pace.left("accuracy", 1, 10) == ""
