"""The CIFAR files from the dataset's own site, read without running what a pickle asks for.

The "python version" is made of pickles. They are read by an unpickler that knows four names, all of them stand-ins
defined here: nothing in the file can import or call anything else.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convpare.errors import ConvpareError

_PIXELS = 3 * 32 * 32


class _UInt8:
    """Stands in for `numpy.dtype`, of which only one is expected."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which bytes do not have


class _Array:
    """Stands in for `numpy.ndarray`: keeps the bytes and the shape."""

    pixels: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, column_major, raw = state
        if not isinstance(dtype, _UInt8) or not isinstance(raw, bytes | str):
            raise pickle.UnpicklingError("an array that is not of plain bytes")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if column_major else "C")


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _UInt8,
    ("_codecs", "encode"): _encode,
}


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None


def read_python_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of the "python version" without executing it.

    Args:
        path: `data_batch_1`, `test_batch`, `train`, ...
        label_key: `labels` or `fine_labels`.

    Returns:
        Images (n, 32, 32, 3) uint8 and labels (n,) int64.

    Raises:
        ConvpareError: the file holds anything but arrays of bytes, lists, numbers and text.
    """
    try:
        batch = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels: np.ndarray = batch["data"].pixels
        labels = np.array(batch[label_key], dtype=np.int64)
    except Exception as error:  # a hostile pickle can raise anything; nothing of it has been run
        raise ConvpareError(
            f"{path} is not a CIFAR batch: it holds {type(error).__name__}: {error}. Only arrays of bytes, lists, "
            "numbers and text are read; nothing in the file was executed. Download the dataset again."
        ) from error
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or labels.shape != (len(pixels),):
        raise ConvpareError(
            f"{path} has data of shape {pixels.shape} and {labels.shape} labels; expected (n, 3072), (n,)."
        )
    return _planes_to_hwc(pixels), labels


def read_binary_batch(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of the "binary version": records of `label_bytes` labels, the last of them used, and 3072 pixels.

    Returns:
        Images (n, 32, 32, 3) uint8 and labels (n,) int64.

    Raises:
        ConvpareError: the file is not a whole number of records.
    """
    raw = np.fromfile(path, np.uint8)
    record = label_bytes + _PIXELS
    if len(raw) == 0 or len(raw) % record:
        raise ConvpareError(
            f"{path} has {len(raw)} bytes, not a multiple of {record}: it is damaged. Download the dataset again."
        )
    records = raw.reshape(-1, record)
    return _planes_to_hwc(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)


def _planes_to_hwc(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
