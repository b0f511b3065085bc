"""The exception of this package, and the kind of it that others act upon."""


class ConvpareError(Exception):
    """Something the user gave, or the network they gave, cannot be worked with.

    The message says what was given, what is expected and what to do. The command line prints it and exits with 1.
    """


class Infeasible(ConvpareError):  # noqa: N818 - a finding
    """What was asked for cannot be reached; the message says what can."""
