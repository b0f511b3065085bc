"""Commands in several processes: the main one speaks and writes, and all end together."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from convpare import terminal
from convpare.errors import ConvpareError
from convpare.recovery.processes import Lost, current, leave, several

TRAINING = ("compress", "apply", "recover")  # the commands that can train


class _Ended(SystemExit):
    """By a signal; no `except` for errors on the way stops it."""


@contextmanager
def together(arguments: Sequence[str]) -> Iterator[None]:
    """Around a command: nothing where it runs in one process."""
    try:
        if several():
            _prepare(arguments)
        yield
    except _Ended:
        how = "SIGTERM, which the launcher sends then, or whoever ends the job"
        terminal.fail(str(Lost(current(), how)), anyway=True)
        raise
    except SystemExit as end:
        if not end.code:
            leave()
        raise
    leave()


def _prepare(arguments: Sequence[str]) -> None:
    """Connect the processes, and let the main one alone speak. Refuse what they cannot share."""
    if os.environ.get("RANK", "0") != "0":
        terminal.silence()
    if not arguments or arguments[0] not in TRAINING:
        raise ConvpareError(
            f"several processes were launched, and only the training of {', '.join(TRAINING)} is shared by them: start "
            "this without accelerate launch or torchrun"
        )
    if not current().main:
        terminal.silence()
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended(1)
