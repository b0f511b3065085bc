"""How pixels become a network's input."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convpare.errors import ConvpareError


@dataclass(frozen=True)
class Preprocessing:
    """Pixels in [0, 1] are resized, cropped and normalised, in this order.

    Attributes:
        mean: what is subtracted, one number a channel.
        std: what the difference is divided by, one number a channel.
        resize: the shorter side becomes this many pixels (bilinear, antialiased); None leaves the size alone.
        crop: the central square of this many pixels is kept; None keeps everything.

    Raises:
        ConvpareError: on construction, if the numbers make no sense.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ConvpareError(f"mean {self.mean} and std {self.std} need the same length: one number a channel.")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ConvpareError(f"mean {self.mean} must be finite and std {self.std} finite and above zero.")
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            if value is not None and value < 1:
                raise ConvpareError(f"{name} is {value}; it must be a number of pixels, 1 or more.")

    @property
    def channels(self) -> int:
        """How many channels an image must have."""
        return len(self.mean)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this size has after resizing, before cropping."""
        if self.resize is None or self.resize == min(height, width):
            return height, width
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this size has after resizing and cropping.

        Raises:
            ConvpareError: the image is smaller than the crop.
        """
        height, width = self.resized(height, width)
        if self.crop is None:
            return height, width
        if self.crop > min(height, width):
            raise ConvpareError(
                f"a crop of {self.crop} pixels does not fit into an image of {height}x{width}: "
                f"use --resize {self.crop} or more, or a smaller --crop."
            )
        return self.crop, self.crop

    def fit(self, images: Tensor) -> Tensor:
        """Resize and crop (n, c, h, w) images in [0, 1]."""
        height, width = images.shape[-2:]
        crop_height, crop_width = self.fitted(height, width)
        size = self.resized(height, width)
        if size != (height, width):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        top, left = round((size[0] - crop_height) / 2), round((size[1] - crop_width) / 2)
        return images[..., top : top + crop_height, left : left + crop_width]

    def normalise(self, images: Tensor) -> Tensor:
        """(x - mean) / std for (n, c, h, w) images."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` reads it back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_json` wrote.

        Raises:
            ConvpareError: a field is missing, unknown or of the wrong type.
        """
        names = {"mean", "std", "resize", "crop"}
        if set(data) != names:
            raise ConvpareError(f"a preprocessing has the fields {sorted(names)}, not {sorted(data)}.")
        for name in ("mean", "std"):
            if not isinstance(data[name], list) or not all(_is_number(value) for value in data[name]):
                raise ConvpareError(f"preprocessing field {name!r} must be a list of numbers, not {data[name]!r}.")
        for name in ("resize", "crop"):
            if data[name] is not None and type(data[name]) is not int:
                raise ConvpareError(f"preprocessing field {name!r} must be a whole number or null, not {data[name]!r}.")
        mean, std = (tuple(float(value) for value in data[name]) for name in ("mean", "std"))
        return cls(mean, std, data["resize"], data["crop"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
