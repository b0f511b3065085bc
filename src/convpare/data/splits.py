"""Images as they were stored, with their labels, split into training and test images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.optional import import_extra

Fit = Callable[[Tensor], Tensor]

HOLD_OUT_EVERY = 5


class Pixels(Protocol):
    """Stored images: how many, of what size, and their pixels."""

    @property
    def channels(self) -> int: ...

    def __len__(self) -> int: ...

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """(name, height, width) of every image; arrays, whose images all have one size, give one."""
        ...

    def read(self, indices: Sequence[int], fit: Fit) -> Tensor:
        """The images at `indices`: (b, c, h, w) float32 in [0, 1], passed through `fit`, which takes such a batch."""
        ...

    def select(self, indices: Sequence[int]) -> "Pixels": ...


@dataclass(frozen=True, eq=False)
class ArrayPixels:
    """Images in memory: `images` is (n, c, h, w), uint8 in 0..255 or float32 in [0, 1]; `name` is for messages."""

    name: str
    images: Tensor

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        yield self.name, self.images.shape[2], self.images.shape[3]

    def read(self, indices: Sequence[int], fit: Fit) -> Tensor:
        return fit(_unit(self.images[torch.as_tensor(indices)]))

    def select(self, indices: Sequence[int]) -> "ArrayPixels":
        return ArrayPixels(self.name, self.images[torch.as_tensor(indices, dtype=torch.long)])


@dataclass(frozen=True, eq=False)
class FilePixels:
    """RGB images in files, decoded when they are read. `shapes` holds every file's (height, width)."""

    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def channels(self) -> int:
        return 3

    def __len__(self) -> int:
        return len(self.paths)

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        for path, (height, width) in zip(self.paths, self.shapes, strict=True):
            yield str(path), height, width

    def read(self, indices: Sequence[int], fit: Fit) -> Tensor:
        return torch.cat([fit(_unit(_hwc(decode_rgb(self.paths[index])[None]))) for index in indices])

    def select(self, indices: Sequence[int]) -> "FilePixels":
        return FilePixels(tuple(self.paths[i] for i in indices), tuple(self.shapes[i] for i in indices))


@dataclass(frozen=True, eq=False)
class Split:
    """Some images and, where they are known, their labels: int64, one per image."""

    pixels: Pixels
    labels: Tensor | None

    def select(self, indices: Sequence[int]) -> "Split":
        labels = None if self.labels is None else self.labels[torch.as_tensor(indices, dtype=torch.long)]
        return Split(self.pixels.select(indices), labels)


@dataclass(frozen=True, eq=False)
class Splits:
    """What a data set's reader found.

    Raises:
        ConvpareError: on construction, if a split is empty, or its labels do not match its images or its classes.
    """

    train: Split
    test: Split | None
    num_classes: int | None
    note: str
    skipped: tuple[str, ...] = ()
    everything: Split | None = (
        None  # all images, where the test images were held out of a set that has no split of its own
    )
    class_names: tuple[str, ...] | None = None  # by index; empty where an index has no name

    def __post_init__(self) -> None:
        for name, split in (("training", self.train), ("test", self.test)):
            if split is not None:
                _check_split(name, split, self.num_classes)


def _check_split(name: str, split: Split, num_classes: int | None) -> None:
    if len(split.pixels) == 0:
        raise ConvpareError(f"there are no {name} images; at least one is needed.")
    if split.labels is None:
        return
    if split.labels.shape != (len(split.pixels),):
        raise ConvpareError(
            f"there are {len(split.pixels)} {name} images but labels of shape {tuple(split.labels.shape)}; "
            "give one label per image."
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0:
        raise ConvpareError(f"the {name} labels start at {low}; a label is the index of its class, 0 or more.")
    if num_classes is None or high >= num_classes:
        raise ConvpareError(f"the {name} labels go up to {high}, but there are {num_classes} classes, counted from 0.")


def hold_out(everything: Split, num_classes: int, note: str = "", skipped: tuple[str, ...] = ()) -> Splits:
    """Make every fifth image of each class, in order, a test image. `note` is a first half of the sentence about it."""
    if everything.labels is None:
        raise ConvpareError("test images can only be held out of labelled images.")
    seen: dict[int, int] = {}
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(everything.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        parts[seen[label] % HOLD_OUT_EVERY == 0].append(index)
    train, test = parts
    if not test:
        note += f"no test images: no class has the {HOLD_OUT_EVERY} images of which one would be held out"
        return Splits(everything, None, num_classes, note, skipped)
    note += f"held out every fifth image of each class for testing ({len(test)} of {len(train) + len(test)} images)"
    return Splits(everything.select(train), everything.select(test), num_classes, note, skipped, everything)


def decode_rgb(path: Path) -> np.ndarray:
    """Decode one image file to (h, w, 3) uint8.

    Raises:
        ConvpareError: the file cannot be decoded, or pillow is missing.
    """
    pillow = import_extra("PIL.Image", "cli")
    try:
        with pillow.open(path) as opened:
            return np.array(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ConvpareError(f"{path} cannot be decoded ({error}). Replace it or take it away.") from error


def _hwc(pixels: np.ndarray) -> Tensor:
    """(n, h, w, c) array -> (n, c, h, w) tensor that shares its memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _unit(images: Tensor) -> Tensor:
    """uint8 in 0..255 or float32 in [0, 1] -> contiguous float32 in [0, 1]."""
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    return scaled.contiguous()


def from_hwc(name: str, pixels: np.ndarray) -> ArrayPixels:
    """Wrap (n, h, w, c) uint8 images."""
    return ArrayPixels(name, _hwc(pixels))
