"""Data sets that are arrays: scikit-learn's digits and .npz files."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convpare.data.splits import ArrayPixels, Split, Splits, hold_out
from convpare.errors import ConvpareError
from convpare.optional import import_extra

_NPZ_FORMS = "images and, optionally, labels; or x_train, y_train, x_test, y_test"


def load_digits() -> Splits:
    """Scikit-learn's 1,797 grey digits of 8x8 pixels, 0..16 scaled to [0, 1]."""
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    splits = hold_out(Split(ArrayPixels("digits", images), torch.from_numpy(digits.target).long()), 10)
    return replace(splits, everything=None)  # this split is the set's own


def load_npz(path: Path) -> Splits:
    """Read arrays of images, and labels if there are any.

    `images` (or `x_train`, `x_test`) is (n, h, w, c), (n, c, h, w) or (n, h, w), uint8 or floating point in [0, 1];
    `labels` (or `y_train`, `y_test`) are whole numbers, one per image.

    Raises:
        ConvpareError: the file is not such an archive, or an array is not as described.
    """
    arrays = read_npz(path, ("images", "labels", "x_train", "y_train", "x_test", "y_test"))
    if "images" in arrays:
        everything = _npz_split(path, arrays, "images", "labels")
        if everything.labels is None:
            return Splits(everything, None, None, "no labels: all images are for calibration")
        return hold_out(everything, int(everything.labels.max()) + 1)
    if "x_train" not in arrays:
        raise ConvpareError(f"{path} holds no images; expected arrays named {_NPZ_FORMS}.")
    train = _npz_split(path, arrays, "x_train", "y_train")
    if "x_test" not in arrays:
        if train.labels is None:
            return Splits(train, None, None, "no labels: all images are for calibration")
        return hold_out(train, int(train.labels.max()) + 1)
    test = _npz_split(path, arrays, "x_test", "y_test")
    if test.labels is None:
        raise ConvpareError(f"{path} has x_test without y_test; test images need labels. Add them, or drop x_test.")
    return _given_splits(train, test)


def _given_splits(train: Split, test: Split) -> Splits:
    known = [split.labels for split in (train, test) if split.labels is not None]
    num_classes = max(int(labels.max()) for labels in known) + 1
    return Splits(train, test, num_classes, "the splits are the file's own: x_train and x_test")


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that an .npz file has; arrays of Python objects are refused.

    Raises:
        ConvpareError: the file is damaged, not an .npz file, or one of the arrays holds objects.
    """
    if not zipfile.is_zipfile(path):
        raise ConvpareError(f"{path} is damaged or no .npz file; save images with np.savez(path, images=...).")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConvpareError(f"{path} cannot be read as an .npz file of plain arrays ({error}).") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ConvpareError(f"{path}: {name} is no array; save images with np.savez(path, images=...).")
    return arrays


def _npz_split(path: Path, arrays: dict[str, np.ndarray], images: str, labels: str) -> Split:
    name = f"{path}[{images!r}]"
    pixels = ArrayPixels(name, _checked_pixels(name, _channels_first(name, arrays[images])))
    if labels not in arrays:
        return Split(pixels, None)
    return Split(pixels, _checked_labels(f"{path}[{labels!r}]", arrays[labels], len(pixels)))


def _channels_first(name: str, images: np.ndarray) -> np.ndarray:
    """Find the channel axis: the one of 1 or 3 among the second and last axes, else the odd one out of two equal."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        _, first, middle, last = images.shape
        for looks_like in ((first in (1, 3), last in (1, 3)), (middle == last, first == middle)):
            if looks_like[0] != looks_like[1]:
                return images if looks_like[0] else images.transpose(0, 3, 1, 2)
    raise ConvpareError(
        f"{name} has shape {images.shape}, in which the channels cannot be told; "
        "expected (n, height, width, channels) or (n, channels, height, width)."
    )


def _checked_pixels(name: str, images: np.ndarray) -> Tensor:
    if images.size == 0:
        raise ConvpareError(f"{name} has shape {images.shape}: it holds no images.")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if not np.issubdtype(images.dtype, np.floating):
        raise ConvpareError(f"{name} has dtype {images.dtype}; expected uint8, or floating point in [0, 1].")
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if not torch.isfinite(pixels).all():
        raise ConvpareError(f"{name} holds NaN or infinite pixels; clean the images first.")
    if pixels.min() < 0 or pixels.max() > 1:
        raise ConvpareError(
            f"{name} goes from {float(pixels.min()):g} to {float(pixels.max()):g}; floating-point pixels must lie in "
            "[0, 1], before mean and std. Divide them by their maximum, or save them as uint8."
        )
    return pixels


def _checked_labels(name: str, labels: np.ndarray, count: int) -> Tensor:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConvpareError(f"{name} has dtype {labels.dtype}; labels must be whole numbers, the index of the class.")
    if labels.shape not in ((count,), (count, 1)):
        raise ConvpareError(f"{name} has shape {labels.shape}; expected one label for each of the {count} images.")
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))
