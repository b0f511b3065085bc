"""CIFAR-10 and CIFAR-100 in any of three shapes: official python files, official binary files, or mosaics.

A mosaic is a lossless 3200x3200 image of 100 rows of 100 images of 32x32 pixels; `labels.npz` holds `y_train` and
`y_test`.
"""

from pathlib import Path

import numpy as np
import torch

from convpare.data.arrays import read_npz
from convpare.data.cifar_batches import read_binary_batch, read_python_batch
from convpare.data.splits import Split, Splits, decode_rgb, from_hwc
from convpare.errors import ConvpareError

_IMAGES_PER_MOSAIC = 10_000
_Labelled = tuple[np.ndarray, np.ndarray]
_TRAIN_NAMES = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}
_TEST_NAME = {10: "test_batch", 100: "test"}
_LABEL_KEY = {10: "labels", 100: "fine_labels"}
_PYTHON_FOLDER = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
_BINARY_FOLDER = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}


def load_cifar(root: Path, num_classes: int) -> Splits:
    """Read CIFAR-10 or CIFAR-100 (`num_classes` 10 or 100, fine labels) with its own training and test images.

    Raises:
        ConvpareError: `root` holds none of the three shapes, or a file of it is missing or damaged.
    """
    if not root.is_dir():
        raise ConvpareError(f"{root} is not a folder; expected the folder that holds CIFAR-{num_classes}.")
    train, test, shape = _read(root, num_classes)
    note = f"the data set's own splits, from {shape} ({len(train[1])} training and {len(test[1])} test images)"
    return Splits(_split("train", train), _split("test", test), num_classes, note)


def _split(name: str, labelled: _Labelled) -> Split:
    images, labels = labelled
    return Split(from_hwc(name, images), torch.from_numpy(labels))


def _read(root: Path, num_classes: int) -> tuple[_Labelled, _Labelled, str]:
    if (root / "labels.npz").is_file():
        return *_read_mosaics(root), "mosaics"
    first, test = _TRAIN_NAMES[num_classes][0], _TEST_NAME[num_classes]
    for folder in (root, root / _PYTHON_FOLDER[num_classes]):
        if (folder / first).is_file():
            batches = [folder / name for name in _TRAIN_NAMES[num_classes] if (folder / name).is_file()]
            train = [read_python_batch(path, _LABEL_KEY[num_classes]) for path in batches]
            return _join(train), read_python_batch(_existing(folder / test), _LABEL_KEY[num_classes]), "python files"
    label_bytes = 1 if num_classes == 10 else 2
    for folder in (root, root / _BINARY_FOLDER[num_classes]):
        if (folder / f"{first}.bin").is_file():
            batches = [folder / f"{name}.bin" for name in _TRAIN_NAMES[num_classes]]
            train = [read_binary_batch(path, label_bytes) for path in batches if path.is_file()]
            return _join(train), read_binary_batch(_existing(folder / f"{test}.bin"), label_bytes), "binary files"
    raise ConvpareError(
        f"{root} holds no CIFAR-{num_classes}; expected {first} and {test} (python version), {first}.bin and "
        f"{test}.bin (binary version), or labels.npz with train0.webp, ... and test.webp (mosaics)."
    )


def _read_mosaics(root: Path) -> tuple[_Labelled, _Labelled]:
    labels = read_npz(root / "labels.npz", ("y_train", "y_test"))
    for key in ("y_train", "y_test"):
        if key not in labels or labels[key].ndim != 1 or not np.issubdtype(labels[key].dtype, np.integer):
            raise ConvpareError(f"{root / 'labels.npz'} needs {key!r}: one whole number per image.")
    count = len(labels["y_train"]) // _IMAGES_PER_MOSAIC
    numbers = [number for number in range(count) if (root / f"train{number}.webp").is_file()]
    if not numbers:
        raise ConvpareError(
            f"{root} has labels.npz but no train0.webp; expected at least one mosaic of training images."
        )
    train = [_read_mosaic(root / f"train{number}.webp", labels["y_train"], number) for number in numbers]
    return _join(train), _read_mosaic(_existing(root / "test.webp"), labels["y_test"], 0)


def _read_mosaic(path: Path, labels: np.ndarray, number: int) -> _Labelled:
    rows = decode_rgb(path)
    if rows.shape != (3200, 3200, 3):
        raise ConvpareError(f"{path} has {rows.shape[0]}x{rows.shape[1]} pixels; a mosaic has 3200x3200.")
    images = rows.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    start = number * _IMAGES_PER_MOSAIC
    return images, labels[start : start + _IMAGES_PER_MOSAIC].astype(np.int64)


def _join(batches: list[_Labelled]) -> _Labelled:
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConvpareError(f"{path} is missing: the test images are needed too.")
    return path
