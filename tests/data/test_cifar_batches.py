import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from convpare.data.cifar_batches import read_binary_batch, read_python_batch
from convpare.errors import ConvpareError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
IMAGES = PIXELS.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)


def python2_batch(pixels: np.ndarray, labels: list[int], order: str = "C") -> bytes:
    """What Python 2 with the NumPy of the time wrote: protocol 2, byte strings, numpy.core."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86" + dtype
    array += (b"\x88" if order == "F" else b"\x89") + text(pixels.tobytes(order)) + b"tb"  # type: ignore[arg-type]
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    name = text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + name + text(b"labels") + listed + text(b"data") + array + b"u."


@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_python_2(tmp_path, order):
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_batch(PIXELS, [3, 1, 4, 1], order))
    # The hand-made file is one that NumPy itself reads.
    assert np.array_equal(pickle.loads(path.read_bytes(), encoding="latin1")["data"], PIXELS)
    images, labels = read_python_batch(path, "labels")
    assert np.array_equal(images, IMAGES)
    assert labels.tolist() == [3, 1, 4, 1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_python_3(tmp_path, protocol):
    path = tmp_path / "train"
    content = {"data": PIXELS, "fine_labels": [99, 0, 7, 8], "coarse_labels": [1, 1, 1, 1], "filenames": ["a"] * 4}
    path.write_bytes(pickle.dumps(content, protocol))
    if protocol == 5:  # numpy then asks for another name, which is not needed and not allowed
        with pytest.raises(ConvpareError, match="_frombuffer"):
            read_python_batch(path, "fine_labels")
        return
    images, labels = read_python_batch(path, "fine_labels")
    assert np.array_equal(images, IMAGES)
    assert labels.tolist() == [99, 0, 7, 8]


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _hostile(marker: Path) -> list[object]:
    return [
        Calls(os.system, f"touch {marker}"),
        Calls(eval, f"open({str(marker)!r}, 'w')"),
        Calls(getattr, os, "system"),
        {"data": Calls(open, str(marker), "w"), "labels": [0]},
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, number, protocol):
    marker, path = tmp_path / "marker", tmp_path / "data_batch_1"
    try:
        path.write_bytes(pickle.dumps(_hostile(marker)[number], protocol))
    except TypeError:  # a module cannot be pickled; name it by hand
        path.write_bytes(b"cbuiltins\ngetattr\n(cos\nsystem\nVx\ntR.")
    with pytest.raises(ConvpareError, match="nothing in the file was executed"):
        read_python_batch(path, "labels")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps({"data": b"xx", "labels": [1]}),
        pickle.dumps({"data": PIXELS, "labels": [1, 2, 3]}, 2),
        pickle.dumps({"data": PIXELS[:, :100], "labels": [1] * 4}, 2),
        pickle.dumps({"data": PIXELS.astype(np.int64), "labels": [1] * 4}, 2),
        pickle.dumps({"data": np.array([None]), "labels": [1]}, 2),
        python2_batch(PIXELS, [3, 1, 4, 1])[:-500],
    ],
)
def test_files_that_are_no_batches(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ConvpareError, match="test_batch"):
        read_python_batch(tmp_path / "test_batch", "labels")


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_binary_files(tmp_path, label_bytes):
    path = tmp_path / "batch.bin"
    labels = np.array([[9, 5], [8, 6], [7, 7], [6, 8]], np.uint8)[:, -label_bytes:]
    path.write_bytes(np.hstack([labels, PIXELS]).tobytes())
    images, read = read_binary_batch(path, label_bytes)
    assert np.array_equal(images, IMAGES)
    assert read.tolist() == [5, 6, 7, 8]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConvpareError, match="not a multiple of"):
        read_binary_batch(path, label_bytes)
