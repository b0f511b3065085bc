import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convpare.data import Data, load_data
from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError

RGB = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def write_image(path: Path, value: int, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(path)


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:03}.png", 10 * number + i)
    return root


def reds(data: Data, split: str) -> list[int]:
    """The red value of every image, which tells it."""
    images = getattr(data, split).tensor()
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


# ---------------------------------------------------------------- digits


def test_digits_are_split_by_class():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes, data.train.shape) == (1442, 355, 10, (1, 8, 8))
    assert data.note == "held out every fifth image of each class for testing (355 of 1797 images)"
    assert data.preprocessing == Preprocessing((0.0,), (1.0,))
    images, target = load_digits(return_X_y=True)
    for label in range(10):
        of_class = images[target == label].reshape(-1, 8, 8) / 16
        test = data.test.tensor()[data.test.labels == label, 0].double()
        train = data.train.tensor()[data.train.labels == label, 0].double()
        assert np.array_equal(test, of_class[4::5])
        assert np.array_equal(train, np.delete(of_class, np.s_[4::5], axis=0))


def test_batches_are_in_order_or_shuffled_by_their_own_generator():
    train = load_data("digits").train
    everything = train.tensor()
    assert everything.dtype == torch.float32
    assert [len(x) for x, _ in train.batches(600)] == [600, 600, 242]
    assert torch.equal(train.tensor(limit=7), everything[:7])
    state = torch.get_rng_state()
    first, again, other = train.tensor(9, seed=1), train.tensor(9, seed=1), train.tensor(9, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, everything[order[:9]])
    ((_, labels),) = train.batches(limit=9, seed=1)
    assert train.labels is not None
    assert torch.equal(labels, train.labels[order[:9]])


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"limit": 0}, {"limit": -1}])
def test_batches_of_nothing(arguments):
    with pytest.raises(ConvpareError, match="must be 1 or more"):
        list(load_data("digits").train.batches(**arguments))


def test_preprocessing_is_chosen_by_argument_then_model_then_data():
    model = Preprocessing((0.1,), (0.2,), resize=6, crop=4)
    assert load_data("digits", default=model).preprocessing == model
    assert load_data("digits", default=model, std=[0.5], crop=5).preprocessing == Preprocessing((0.1,), (0.5,), 6, 5)
    assert load_data("digits", mean=[0.3]).preprocessing == Preprocessing((0.3,), (1.0,))
    assert load_data("digits", default=model).train.shape == (1, 4, 4)
    image = load_data("digits").train.tensor(1)
    assert torch.allclose(load_data("digits", mean=[0.5], std=[0.25]).train.tensor(1), (image - 0.5) / 0.25)


def test_preprocessing_can_be_replaced():
    data = load_data("digits").with_preprocessing(Preprocessing((0.5,), (0.5,), crop=6))
    assert data.test is not None
    assert data.train.shape == data.test.shape == (1, 6, 6)
    assert float(data.train.tensor().min()) == -1.0
    with pytest.raises(ConvpareError, match="have 1 channel"):
        data.with_preprocessing(Preprocessing(*RGB))


def test_mean_must_have_one_value_a_channel():
    with pytest.raises(ConvpareError, match=r"train images have 1 channel\(s\), but mean and std have 3 value"):
        load_data("digits", default=Preprocessing(*RGB))


# ---------------------------------------------------------------- folders


def test_class_folders_are_held_out_by_class(tmp_path):
    data = load_data(str(class_folders(tmp_path, {"ant": 10, "bee": 5, "cat": 4})), mean=RGB[0], std=RGB[1])
    assert data.test is not None
    assert data.num_classes == 3
    assert data.test.labels.tolist() == [0, 0, 1]
    assert reds(data, "test") == [4, 9, 14]
    assert reds(data, "train") == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 20, 21, 22, 23]
    assert data.train.labels.tolist() == [0] * 8 + [1] * 4 + [2] * 4
    assert data.note == "held out every fifth image of each class for testing (3 of 19 images)"
    images = data.train.tensor(1)
    assert images.shape == (1, 3, 6, 8)
    assert torch.equal(images[0, 2], torch.ones(6, 8))


def test_images_are_normalised_like_imagenets_by_default(tmp_path):
    data = load_data(str(class_folders(tmp_path, {"a": 5})))
    assert float(data.train.tensor(1)[0, 2, 0, 0]) == pytest.approx((1 - 0.406) / 0.225, abs=1e-6)


def test_few_images_leave_none_for_testing(tmp_path):
    data = load_data(str(class_folders(tmp_path, {"a": 4, "b": 1})))
    assert data.test is None
    assert len(data.train) == 5
    assert data.note.startswith("no test images: no class has the 5 images")


@pytest.mark.parametrize("name", ["val", "test"])
def test_given_splits_are_used(tmp_path, name):
    class_folders(tmp_path / "train", {"a": 6, "b": 5, "c": 1})
    class_folders(tmp_path / name, {"c": 2, "a": 1})
    data = load_data(str(tmp_path))
    assert data.test is not None
    assert (len(data.train), data.test.labels.tolist(), data.num_classes) == (12, [0, 2, 2], 3)
    assert data.note == f"the splits are the folder's own: train/ and {name}/"


def test_of_val_and_test_the_one_with_classes_is_used(tmp_path):
    class_folders(tmp_path / "train", {"a": 6})
    class_folders(tmp_path / "val", {"a": 2})
    write_image(tmp_path / "test" / "x.png", 0)
    assert load_data(str(tmp_path)).note.endswith("train/ and val/")
    (tmp_path / "test" / "x.png").unlink()
    class_folders(tmp_path / "test", {"a": 2})
    assert load_data(str(tmp_path)).note.endswith("train/ and test/")


def test_train_alone_and_train_without_labels(tmp_path):
    class_folders(tmp_path / "one" / "train", {"a": 6})
    assert load_data(str(tmp_path / "one")).note.startswith("only train/ has class folders; held out every fifth")
    write_image(tmp_path / "two" / "train" / "x.png", 0)
    class_folders(tmp_path / "two" / "test", {"a": 1, "b": 1})
    data = load_data(str(tmp_path / "two"))
    assert data.test is not None
    assert (data.train.labelled, data.test.labelled, data.num_classes) == (False, True, 2)


def test_test_without_train(tmp_path):
    class_folders(tmp_path / "val", {"a": 6})
    with pytest.raises(ConvpareError, match=r"holds val/ but no train/"):
        load_data(str(tmp_path))


def test_class_named_like_a_split_is_a_class(tmp_path):
    assert load_data(str(class_folders(tmp_path, {"bus": 5, "train": 5}))).num_classes == 2


def test_nested_images_and_hidden_folders(tmp_path):
    class_folders(tmp_path, {"a": 2, ".cache": 3})
    write_image(tmp_path / "b" / "images" / "deep.JPEG", 0)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path))
    assert (len(data.train), data.num_classes, data.skipped) == (3, 2, ())


def test_images_without_labels(tmp_path):
    for value in (3, 1, 2):
        write_image(tmp_path / f"{value}.png", value)
    data = load_data(str(tmp_path), mean=RGB[0], std=RGB[1])
    assert (data.test, data.num_classes, data.train.labels, data.train.labelled) == (None, None, None, False)
    assert reds(data, "train") == [1, 2, 3]
    assert [labels for _, labels in data.train.batches(2)] == [None, None]


def test_unreadable_images_are_named_and_labels_stay_aligned(tmp_path):
    class_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "001.png").write_bytes(b"not an image")
    (tmp_path / "b" / "000.png").write_bytes(b"")
    data = load_data(str(tmp_path), mean=RGB[0], std=RGB[1])
    assert [Path(text.partition(": ")[0]).relative_to(tmp_path).as_posix() for text in data.skipped] == [
        "a/001.png",
        "b/000.png",
    ]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert reds(data, "train") == [0, 2, 11, 12]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_image_that_breaks_off_is_named_and_left_out(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("a", "b"):
        noise.save(tmp_path / f"{name}.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"b.{suffix}").write_bytes(whole + bytes(100))  # what follows the end does no harm
    data = load_data(str(tmp_path))
    assert [Path(text.partition(": ")[0]).name for text in data.skipped] == [f"a.{suffix}"]
    assert len(data.train.tensor()) == 1


def test_image_that_breaks_off_unnoticed_is_named_when_it_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.webp")
    whole = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(whole[: len(whole) // 2])
    try:
        data = load_data(str(tmp_path))
    except ConvpareError as error:
        assert "holds no readable images" in str(error)
        return
    with pytest.raises(ConvpareError, match=r"a\.webp cannot be decoded"):
        data.train.tensor()


def test_sizes_must_agree_after_fitting(tmp_path):
    write_image(tmp_path / "a.png", 0, (8, 6))
    write_image(tmp_path / "b.png", 0, (6, 8))
    with pytest.raises(ConvpareError, match=r"a\.png has 6x8 and .*b\.png has 8x6 pixels: give --resize and --crop"):
        load_data(str(tmp_path))
    with pytest.raises(ConvpareError, match="one size"):
        load_data(str(tmp_path), resize=5)
    assert load_data(str(tmp_path), resize=5, crop=5).train.tensor().shape == (2, 3, 5, 5)
    with pytest.raises(ConvpareError, match=r"a\.png: a crop of 7 pixels"):
        load_data(str(tmp_path), crop=7)


def test_splits_of_different_sizes(tmp_path):
    write_image(tmp_path / "train" / "a" / "x.png", 0, (8, 8))
    write_image(tmp_path / "val" / "a" / "x.png", 0, (6, 6))
    with pytest.raises(ConvpareError, match=r"training images are \(3, 8, 8\), test images \(3, 6, 6\)"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_image_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    images = load_data(str(tmp_path), mean=RGB[0], std=RGB[1]).train.tensor()
    assert torch.equal(images, torch.ones(1, 3, 4, 4))


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConvpareError, match="holds no readable images"):
        load_data(str(tmp_path))
    class_folders(tmp_path, {"a": 1})
    (tmp_path / "b").mkdir()
    with pytest.raises(ConvpareError, match="b holds no images"):
        load_data(str(tmp_path))
    (tmp_path / "b").rmdir()
    write_image(tmp_path / "loose.png", 0)
    with pytest.raises(ConvpareError, match=r"mixes class folders \(a\) and images"):
        load_data(str(tmp_path))


def test_test_class_that_training_does_not_know(tmp_path):
    class_folders(tmp_path / "train", {"a": 1})
    class_folders(tmp_path / "val", {"z": 1})
    with pytest.raises(ConvpareError, match=r"z is not among the 1 known classes \(a\)"):
        load_data(str(tmp_path))


# ---------------------------------------------------------------- class indices


def test_synsets_are_imagenets(tmp_path):
    pytest.importorskip("timm")
    class_folders(tmp_path, {"n01440764": 1, "n02102040": 1, "n03888257": 1})
    data = load_data(str(tmp_path))
    assert (data.train.labels.tolist(), data.num_classes) == ([0, 217, 701], 1000)


def test_synsets_without_timm(tmp_path, monkeypatch):
    class_folders(tmp_path, {"n01440764": 1, "n02102040": 1})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConvpareError, match="one synset a line"):
        load_data(str(tmp_path))
    (tmp_path / "names.txt").write_text("n02102040\nn01440764\n")
    data = load_data(str(tmp_path), classes=tmp_path / "names.txt")
    assert (data.train.labels.tolist(), data.num_classes) == ([1, 0], 2)


def test_classes_from_json(tmp_path):
    class_folders(tmp_path / "images", {"a": 1, "b": 1})
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"b": 0, "c": 1, "a": 7}))
    data = load_data(str(tmp_path / "images"), classes=path)
    assert (data.train.labels.tolist(), data.num_classes) == ([7, 0], 8)
    path.write_text(json.dumps({"b": 0}))
    with pytest.raises(ConvpareError, match="a is not among the 1 known classes"):
        load_data(str(tmp_path / "images"), classes=path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", "[1, 2]"),
        ("c.json", "{}"),
        ("c.json", '{"a": -1}'),
        ("c.json", '{"a": true}'),
        ("c.json", "{"),
        ("c.txt", "a\n\nb\n"),
        ("c.txt", "a\na\n"),
        ("c.txt", ""),
        ("missing.txt", None),
    ],
)
def test_classes_files_that_cannot_be_used(tmp_path, name, text):
    class_folders(tmp_path / "images", {"a": 1})
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConvpareError, match="the classes file"):
        load_data(str(tmp_path / "images"), classes=tmp_path / name)


def test_classes_without_class_folders(tmp_path):
    write_image(tmp_path / "x.png", 0)
    (tmp_path / "c.txt").write_text("a\n")
    with pytest.raises(ConvpareError, match="has no class folders"):
        load_data(str(tmp_path), classes=tmp_path / "c.txt")
    with pytest.raises(ConvpareError, match="'digits' is not a folder"):
        load_data("digits", classes=tmp_path / "c.txt")


# ---------------------------------------------------------------- npz

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (10, 6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "images",
    [BYTES, BYTES.transpose(0, 3, 1, 2), (BYTES / 255).astype(np.float32), BYTES / np.float64(255)],
)
def test_npz_layouts_and_types(tmp_path, images):
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 1] * 5, np.uint8))
    data = load_data(str(tmp_path / "d.npz"), mean=RGB[0], std=RGB[1])
    assert data.test is not None
    expected = torch.from_numpy(BYTES.transpose(0, 3, 1, 2) / 255).float()
    assert torch.allclose(data.train.tensor(), expected[:8], atol=1e-7)
    assert torch.allclose(data.test.tensor(), expected[8:], atol=1e-7)
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.tensor().is_contiguous()


@pytest.mark.parametrize(
    ("shape", "channels"), [((2, 5, 5), 1), ((2, 5, 5, 4), 4), ((2, 4, 5, 5), 4), ((2, 1, 5, 5), 1)]
)
def test_npz_channels(tmp_path, shape, channels):
    np.savez(tmp_path / "d.npz", images=np.zeros(shape, np.uint8))
    data = load_data(str(tmp_path / "d.npz"))
    assert data.train.shape == (channels, 5, 5)
    assert data.preprocessing == Preprocessing((0.0,) * channels, (1.0,) * channels)
    assert data.test is None


def test_npz_with_splits(tmp_path):
    labels = np.arange(10).reshape(10, 1)
    np.savez(tmp_path / "d.npz", x_train=BYTES, y_train=labels, x_test=BYTES[:3], y_test=np.array([0, 11, 1]))
    data = load_data(str(tmp_path / "d.npz"))
    assert data.test is not None
    assert (len(data.train), data.test.labels.tolist(), data.num_classes) == (10, [0, 11, 1], 12)
    np.savez(tmp_path / "d.npz", x_train=BYTES, x_test=BYTES, y_test=np.arange(10))
    data = load_data(str(tmp_path / "d.npz"))
    assert (data.train.labelled, data.num_classes) == (False, 10)
    np.savez(tmp_path / "d.npz", x_train=BYTES, y_train=np.zeros(10, int))
    assert load_data(str(tmp_path / "d.npz")).note.startswith("held out every fifth")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": BYTES}, "holds no images; expected arrays named"),
        ({"images": BYTES, "labels": np.arange(9)}, "one label for each of the 10 images"),
        ({"images": BYTES, "labels": np.arange(10) - 1}, "labels start at -1"),
        ({"images": BYTES, "labels": np.arange(10) / 2}, "whole numbers"),
        ({"images": BYTES.astype(np.int32)}, "dtype int32"),
        ({"images": BYTES.astype(np.float32)}, r"from 0 to 255; floating-point pixels must lie in \[0, 1\]"),
        ({"images": np.full((2, 4, 4, 3), np.nan, np.float32)}, "NaN or infinite"),
        ({"images": np.zeros((2, 3, 4, 3), np.uint8)}, "channels cannot be told"),
        ({"images": np.zeros((2, 4), np.uint8)}, "channels cannot be told"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "no images"),
        ({"images": np.array([None, {}])}, "plain arrays"),
        ({"x_train": BYTES, "x_test": BYTES}, "x_test without y_test"),
    ],
)
def test_npz_that_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ConvpareError, match=message):
        load_data(str(tmp_path / "d.npz"))


def test_damaged_npz(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, images=BYTES)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255
    single = tmp_path / "single.npy"
    np.save(single, BYTES)
    for content in (whole[:500], b"", b"text", bytes(flipped), pickle.dumps({"images": 1}), single.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ConvpareError, match=r"d\.npz"):
            load_data(str(path))


# ---------------------------------------------------------------- CIFAR


def small_batch(first_label: int, count: int = 2) -> dict[str, object]:
    pixels = np.full((count, 3072), first_label, np.uint8)
    pixels[:, :1024] = 255  # red comes first
    return {"data": pixels, "labels": [first_label] * count, "fine_labels": [first_label] * count}


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_cifar10_python_version(tmp_path, folder):
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    for number in (1, 2, 5):
        (root / f"data_batch_{number}").write_bytes(pickle.dumps(small_batch(number), 2))
    (root / "test_batch").write_bytes(pickle.dumps(small_batch(9, 3), 2))
    data = load_data(f"cifar10:{tmp_path}", mean=RGB[0], std=RGB[1])
    assert data.test is not None
    assert data.train.labels.tolist() == [1, 1, 2, 2, 5, 5]
    assert data.test.labels.tolist() == [9, 9, 9]
    image = data.test.tensor(1)[0]
    assert torch.equal(image[0], torch.ones(32, 32))
    assert torch.equal(image[1], torch.full((32, 32), 9 / 255))
    (root / "test_batch").unlink()
    with pytest.raises(ConvpareError, match="test_batch is missing"):
        load_data(f"cifar10:{tmp_path}")


def test_cifar100_python_version(tmp_path):
    (tmp_path / "train").write_bytes(pickle.dumps(small_batch(99), 2))
    (tmp_path / "test").write_bytes(pickle.dumps(small_batch(100), 2))
    with pytest.raises(ConvpareError, match="test labels go up to 100, but there are 100 classes"):
        load_data(f"cifar100:{tmp_path}")
    (tmp_path / "test").write_bytes(pickle.dumps(small_batch(50), 2))
    assert load_data(f"cifar100:{tmp_path}").num_classes == 100


@pytest.mark.parametrize(("number", "names"), [(10, ("data_batch_1", "test_batch")), (100, ("train", "test"))])
def test_cifar_binary_version(tmp_path, number, names):
    labels = [3] if number == 10 else [77, 3]
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(bytes(labels) + bytes(range(256)) * 12)
    data = load_data(f"cifar{number}:{tmp_path}", mean=RGB[0], std=RGB[1])
    assert data.train.labels.tolist() == [3]
    assert torch.allclose(data.train.tensor()[0, 0, 1, :3] * 255, torch.tensor([32.0, 33.0, 34.0]))


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(ConvpareError, match="holds no CIFAR-10; expected data_batch_1 and test_batch"):
        load_data(f"cifar10:{tmp_path}")
    with pytest.raises(ConvpareError, match="is not a folder"):
        load_data(f"cifar100:{tmp_path / 'nothing'}")
    np.savez(tmp_path / "labels.npz", y_train=np.zeros(10_000, np.uint8))
    with pytest.raises(ConvpareError, match="needs 'y_test'"):
        load_data(f"cifar10:{tmp_path}")
    np.savez(tmp_path / "labels.npz", y_train=np.zeros(10_000, np.uint8), y_test=np.zeros(10_000, np.uint8))
    with pytest.raises(ConvpareError, match="at least one mosaic"):
        load_data(f"cifar10:{tmp_path}")
    write_image(tmp_path / "train0.webp", 0)
    with pytest.raises(ConvpareError, match="has 6x8 pixels; a mosaic has 3200x3200"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.real
def test_cifar100_mosaics(shared: Path):
    """Mosaics that are not there take their labels with them."""
    data = load_data(f"cifar100:{shared / 'data/cifar100'}", mean=RGB[0], std=RGB[1])
    present = sum(1 for _ in (shared / "data/cifar100").glob("train*.webp"))
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes) == (10_000 * present, 10_000, 100)
    with Image.open(shared / "data/cifar100/train1.webp") as mosaic:
        tile = np.asarray(mosaic.convert("RGB"))[32:64, 64:96]  # image 102 of the second mosaic
    labels = np.load(shared / "data/cifar100/labels.npz")["y_train"]
    read = data.train.split.pixels.read([10_102], lambda images: images)
    assert np.array_equal((read[0] * 255).round().byte().permute(1, 2, 0), tile)
    assert int(data.train.labels[10_102]) == labels[10_102]


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar-10:here", "does not exist. Did you mean cifar10"),
        ("digit", "Did you mean digits"),
        ("no/such/place", "Valid forms: digits"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(ConvpareError, match=message):
        load_data(spec)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"x")
    with pytest.raises(ConvpareError, match=r"is neither a folder nor an \.npz file"):
        load_data(str(tmp_path / "images.zip"))
