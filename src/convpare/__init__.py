"""Find what a convolutional network does not need, remove it, prove that the result is right, and say what it cost."""

from convpare.errors import ConvpareError

__version__ = "0.1.0"
__all__ = ["ConvpareError"]
