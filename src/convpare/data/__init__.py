"""DATA specs → batches of preprocessed images, with or without labels."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convpare.data.arrays import load_digits, load_npz
from convpare.data.cifar import load_cifar
from convpare.data.folders import load_folder
from convpare.data.preprocessing import Preprocessing
from convpare.data.splits import Split, Splits
from convpare.errors import ConvpareError

__all__ = ["DATA_FORMS", "Data", "ImageSet", "Preprocessing", "load_data"]

DATA_FORMS = (
    "digits (scikit-learn's 8x8 digits)",
    "cifar10:FOLDER or cifar100:FOLDER",
    "FOLDER of class folders, of train/ and val/ or test/, or of images without labels",
    "FILE.npz with images and labels",
)
_IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, preprocessed when they are read.

    Attributes:
        name: `train` or `test`.
        split: the stored images and their labels.
        preprocessing: what happens to the pixels.
        num_classes: how many classes the labels come from; None if that is not known.

    Raises:
        ConvpareError: on construction, if the preprocessing does not suit the images, or leaves them in several sizes.
    """

    name: str
    split: Split
    preprocessing: Preprocessing
    num_classes: int | None

    def __post_init__(self) -> None:
        if self.preprocessing.channels != self.split.pixels.channels:
            raise ConvpareError(
                f"the {self.name} images have {self.split.pixels.channels} channel(s), but mean and std have "
                f"{self.preprocessing.channels} value(s) each ({self.preprocessing.mean}, {self.preprocessing.std}); "
                "give one value a channel with --mean and --std, or choose a model made for such images."
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        first: tuple[str, tuple[int, int]] | None = None
        for name, height, width in self.split.pixels.sizes():
            try:
                size = self.preprocessing.fitted(height, width)
            except ConvpareError as error:
                raise ConvpareError(f"{name}: {error}") from error
            if first is None:
                first = name, size
            elif size != first[1]:
                raise ConvpareError(
                    f"all images must have one size, but {first[0]} has {first[1][0]}x{first[1][1]} and {name} has "
                    f"{size[0]}x{size[1]} pixels: give --resize and --crop, such as --resize 256 --crop 224."
                )

    def __len__(self) -> int:
        return len(self.split.pixels)

    @property
    def labels(self) -> Tensor | None:
        """(n,) int64, or None."""
        return self.split.labels

    @property
    def labelled(self) -> bool:
        """Whether the classes of the images are known."""
        return self.split.labels is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one preprocessed image."""
        _, height, width = next(iter(self.split.pixels.sizes()))
        return (self.split.pixels.channels, *self.preprocessing.fitted(height, width))

    def batches(
        self, batch_size: int = 256, *, limit: int | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (images, labels): float32 (b, c, h, w) and int64 (b,), or None without labels.

        Args:
            batch_size: images in a batch; the last one may have fewer.
            limit: stop after this many images; None for all of them.
            seed: shuffle by a generator of its own, the same way for the same seed, before `limit` cuts. None keeps the
                stored order, in which the images of a folder are sorted by class.

        Raises:
            ConvpareError: `batch_size` or `limit` is below 1, or a file cannot be decoded.
        """
        if batch_size < 1:
            raise ConvpareError(f"batch_size is {batch_size}; it must be 1 or more.")
        order = self._order(limit, seed)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            images = self.preprocessing.normalise(self.split.pixels.read(indices.tolist(), self.preprocessing.fit))
            yield images, None if self.split.labels is None else self.split.labels[indices]

    def tensor(self, limit: int | None = None, seed: int | None = None) -> Tensor:
        """The images that `batches` yields for the same arguments, as one (n, c, h, w) float32 tensor."""
        return torch.cat([images for images, _ in self.batches(limit=limit, seed=seed)])

    def _order(self, limit: int | None, seed: int | None) -> Tensor:
        if limit is not None and limit < 1:
            raise ConvpareError(f"limit is {limit}; it must be 1 or more, or None for all images.")
        if seed is None:
            return torch.arange(len(self))[:limit]
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:limit]


@dataclass(frozen=True, eq=False)
class Data:
    """Images to calibrate with and, if their labels are known, images to test on.

    Attributes:
        spec: what `load_data` was given.
        preprocessing: what happens to the pixels of both splits.
        train: calibration images, never test images.
        test: labelled test images; None if there are no labels.
        num_classes: how many classes the labels come from; None if there are no labels.
        skipped: files that are no images, each with the reason.
        note: how the splits were made, one sentence.
        whole: all images, where test images were held out of a labelled set without a split of its own.
        class_names: by index, where the images have such; empty where an index has no name.

    Raises:
        ConvpareError: on construction, if the images of the two splits differ in size.
    """

    spec: str
    preprocessing: Preprocessing
    train: ImageSet
    test: ImageSet | None
    num_classes: int | None
    skipped: tuple[str, ...]
    note: str
    whole: ImageSet | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def evaluation(self) -> ImageSet:
        """The images on which a finished network is evaluated: the set's own test split, or all of it if it has none.

        Raises:
            ConvpareError: the images have no labels.
        """
        images = self.whole or self.test
        if images is None:
            raise ConvpareError(f"the images of {self.spec} have no labels; accuracy needs class folders, or labels")
        return images

    def tested_on(self, other: "Data") -> "Data":
        """All of these images to calibrate with, and the evaluation images of `other` to test on.

        Raises:
            ConvpareError: the other images have no labels, or another size.
        """
        train = self.train if self.whole is None else replace(self.whole, name="train")
        note = f"calibration: all of {self.spec}; test: {other.spec}"
        return replace(self, train=train, test=other.evaluation, whole=None, note=note, num_classes=other.num_classes,
                       class_names=other.class_names, skipped=(*self.skipped, *other.skipped))  # fmt: skip

    def __post_init__(self) -> None:
        if self.test is not None and self.test.shape != self.train.shape:
            raise ConvpareError(
                f"training images are {self.train.shape}, test images {self.test.shape} (channels, height, width): "
                "give --resize and --crop."
            )

    def with_preprocessing(self, preprocessing: Preprocessing) -> "Data":
        """The same images, preprocessed otherwise, such as an artifact says.

        Raises:
            ConvpareError: the preprocessing does not suit the images.
        """
        train, test, whole = (
            None if images is None else replace(images, preprocessing=preprocessing)
            for images in (self.train, self.test, self.whole)
        )
        assert train is not None
        return replace(self, preprocessing=preprocessing, train=train, test=test, whole=whole)


def load_data(
    spec: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | None = None,
    crop: int | None = None,
    default: Preprocessing | None = None,
    classes: str | Path | None = None,
) -> Data:
    """Open a data set.

    Args:
        spec: `digits`, `cifar10:FOLDER`, `cifar100:FOLDER`, a folder of images or an .npz file; see `DATA_FORMS`.
        mean: one number a channel, for pixels in [0, 1].
        std: one number a channel.
        resize: pixels of the shorter side, before cropping.
        crop: pixels of the central square.
        default: what the model wants; it fills in for what is not given above. Without it the data set's own default
            does: ImageNet's mean and std for three channels, else 0 and 1.
        classes: the index of every class folder, see `convpare.data.folders.load_folder`.

    Raises:
        ConvpareError: the spec is of no known form, there are no images, or they do not suit the preprocessing.
    """
    splits = _read(spec, classes)
    base = default or _default(splits.train.pixels.channels)
    preprocessing = Preprocessing(
        tuple(base.mean if mean is None else mean),
        tuple(base.std if std is None else std),
        base.resize if resize is None else resize,
        base.crop if crop is None else crop,
    )
    train = ImageSet("train", splits.train, preprocessing, splits.num_classes)
    test = None if splits.test is None else ImageSet("test", splits.test, preprocessing, splits.num_classes)
    whole = None if splits.everything is None else ImageSet("all", splits.everything, preprocessing, splits.num_classes)
    return Data(
        spec, preprocessing, train, test, splits.num_classes, splits.skipped, splits.note, whole, splits.class_names
    )  # fmt: skip


def _read(spec: str, classes: str | Path | None) -> Splits:
    name, colon, folder = spec.partition(":")
    path = Path(spec)
    if path.is_dir() and spec != "digits":
        return load_folder(path, classes)
    if classes is not None:
        raise ConvpareError(f"--classes only says the order of class folders; {spec!r} is not a folder of images.")
    if spec == "digits":
        return load_digits()
    if colon and name in ("cifar10", "cifar100"):
        return load_cifar(Path(folder), int(name.removeprefix("cifar")))
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path)
    near = difflib.get_close_matches(name, ("digits", "cifar10", "cifar100"), 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    problem = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
    raise ConvpareError(f"data {spec!r} {problem}.{hint} Valid forms: {'; '.join(DATA_FORMS)}.")


def _default(channels: int) -> Preprocessing:
    if channels == 3:
        return _IMAGENET
    return Preprocessing((0.0,) * channels, (1.0,) * channels)
