"""The one exception type of this package."""


class ConvpareError(Exception):
    """Something the user gave, or the network they gave, cannot be worked with.

    The message says what was given, what is expected and what to do. The command line prints it and exits with 1.
    """
