"""Videos to try 3-D networks on, made from scikit-learn's 8x8 digits: which way did the digit set out?"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convpare.data.arrays import load_digits
from convpare.data.splits import ArrayPixels, Split
from convpare.errors import ConvpareError

FRAMES = 8
SIZE = 16  # pixels of a side
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # (down, right) of each class
_DIGIT = 8  # pixels of a digit's side
_ROOM = SIZE - _DIGIT  # the largest row and column of a digit's upper left corner


@dataclass(frozen=True, eq=False)
class Clips:
    """Videos of moving digits.

    Attributes:
        videos: (n, 1, 8, 16, 16) float32: time, row and column behind one channel; digits in [0, 1] plus noise.
        labels: (n,) int64, the direction in which the digit sets out, an index of `DIRECTIONS`.
        digits: (n,) int64, the digit that moves, 0 to 9.
        sources: (n,) int64, which image of the split of scikit-learn's digits it is.
    """

    videos: Tensor
    labels: Tensor
    digits: Tensor
    sources: Tensor


def moving_digits(train: int = 4096, test: int = 2048, *, noise: float = 0.75, seed: int = 0) -> tuple[Clips, Clips]:
    """Make videos of digits that bounce about: training clips, and test clips of other digits.

    Each clip shows one digit, which starts anywhere, sets out in one of eight directions at one or two pixels a frame,
    and is reflected by the borders, each axis by itself. Directions are equally frequent. The class is in the order of
    the frames: who knew the exact place of the digit would guess it in 35 % of the clips from the best single frame, in
    64 % from all frames without their order, and in all clips from the frames in order.

    Args:
        train: how many clips of the digits' 1,442 training images.
        test: how many clips of their 355 test images.
        noise: standard deviation of Gaussian noise that is added to every pixel of every frame.
        seed: the same seed gives the same clips; the global generator is left alone.

    Raises:
        ConvpareError: a number is out of range, or scikit-learn is missing.
    """
    if train < 1 or test < 1 or noise < 0:
        raise ConvpareError(f"{train} training and {test} test clips, noise {noise}; give 1 or more, and 0 or more.")
    splits = load_digits()
    assert splits.test is not None
    generator = torch.Generator().manual_seed(seed)
    return _clips(splits.train, train, noise, generator), _clips(splits.test, test, noise, generator)


def _clips(split: Split, count: int, noise: float, generator: torch.Generator) -> Clips:
    assert isinstance(split.pixels, ArrayPixels) and split.labels is not None
    sources = torch.randint(0, len(split.pixels), (count,), generator=generator)
    labels = (torch.arange(count) % len(DIRECTIONS))[torch.randperm(count, generator=generator)]
    start = torch.randint(0, _ROOM + 1, (count, 2), generator=generator)
    speed = torch.randint(1, 3, (count, 1), generator=generator)
    corners = _bounced(start, torch.tensor(DIRECTIONS)[labels] * speed)
    videos = _drawn(split.pixels.images[sources, 0], corners)
    videos += noise * torch.randn(videos.shape, generator=generator)
    return Clips(videos[:, None], labels, split.labels[sources], sources)


def _bounced(start: Tensor, velocity: Tensor) -> Tensor:
    """Upper left corners (n, frames, 2) of digits that start at (n, 2) and are reflected at 0 and at `_ROOM`.

    A start at a border that the velocity points to is moved to the other one, so that all set out as they should.
    """
    blocked = (start + velocity.sign()).clamp(0, _ROOM) == start
    start = torch.where(blocked & (velocity != 0), _ROOM - start, start)
    unfolded = start[:, None] + velocity[:, None] * torch.arange(FRAMES)[:, None]
    return _ROOM - (unfolded % (2 * _ROOM) - _ROOM).abs()


def _drawn(images: Tensor, corners: Tensor) -> Tensor:
    """Frames (n, frames, size, size) with the images (n, 8, 8) at the corners (n, frames, 2) on black."""
    framed = F.pad(images, (1, 1, 1, 1))
    rows, columns = (torch.arange(SIZE) - corners[..., None]).clamp(-1, _DIGIT).add(1).unbind(2)
    each = torch.arange(len(images))[:, None, None, None]
    return framed[each, rows[..., :, None], columns[..., None, :]]
