"""Folders of image files: one sub-folder a class, or no classes at all."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from convpare.data.splits import FilePixels, Split, Splits, hold_out
from convpare.errors import ConvpareError
from convpare.optional import import_extra

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
_SYNSET = re.compile(r"n\d{8}")
_SPLIT_NAMES = frozenset({"train", "val", "test"})


def load_folder(root: Path, classes: str | Path | None = None) -> Splits:
    """Find the images under a folder; their pixels are decoded later, a batch at a time.

    - `train/` beside `val/` or `test/` (or both: then `test/` if it has class folders) are the splits;
    - otherwise, class folders: every fifth image of each class is held out for testing;
    - otherwise, images: no labels, all for calibration.

    Args:
        root: the folder.
        classes: where a class's index stands: a .json file {folder name: index}, or a text file with one folder name
            a line. Without it, folders are numbered in the order of their names, and folders that are named by
            ImageNet synsets (n01440764, ...) get their index among ImageNet's 1000 classes, which needs timm.

    Raises:
        ConvpareError: there are no images, a class folder is empty or unknown, or `classes` cannot be used.
    """
    skipped: list[str] = []
    names = {folder.name for folder in _subfolders(root)}
    if names and names <= _SPLIT_NAMES:
        return _load_given_splits(root, names, classes, skipped)
    index, num_classes = _class_index(root, classes)
    everything = _read_split(root, index, skipped)
    if everything.labels is None or num_classes is None:
        return Splits(everything, None, None, "no labels: all images are for calibration", tuple(skipped))
    return _named(hold_out(everything, num_classes, skipped=tuple(skipped)), index)


def _load_given_splits(root: Path, names: set[str], classes: str | Path | None, skipped: list[str]) -> Splits:
    if "train" not in names:
        only = sorted(names)[0]
        raise ConvpareError(
            f"{root} holds {only}/ but no train/; calibration never uses test images. Add train/, or name "
            f"{root / only} itself, of which every fifth image is then held out."
        )
    index, num_classes = _class_index(root / "train", classes)
    test_name = next((name for name in ("test", "val") if name in names and _subfolders(root / name)), None)
    if test_name is None:
        train = _read_split(root / "train", index, skipped)
        if train.labels is None or num_classes is None:
            return Splits(train, None, None, "no labels: the images of train/ are for calibration", tuple(skipped))
        return _named(hold_out(train, num_classes, "only train/ has class folders; ", tuple(skipped)), index)
    if index is None:
        index, num_classes = _class_index(root / test_name, classes)
        train = _read_split(root / "train", None, skipped)
    else:
        train = _read_split(root / "train", index, skipped)
    test = _read_split(root / test_name, index, skipped)
    note = f"the splits are the folder's own: train/ and {test_name}/"
    return _named(Splits(train, test, num_classes, note, tuple(skipped)), index)


def _named(splits: Splits, index: dict[str, int] | None) -> Splits:
    """The same images with the names of their classes."""
    names = {number: name for name, number in (index or {}).items()}
    return replace(splits, class_names=tuple(names.get(n, "") for n in range(splits.num_classes or 0)) or None)


def _read_split(folder: Path, index: dict[str, int] | None, skipped: list[str]) -> Split:
    """All readable images of a folder, labelled by their class folder if there is an `index` of names."""
    if index is None:
        return Split(_readable(_images_in(folder), folder, skipped)[0], None)
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in index:
            raise ConvpareError(
                f"{class_folder} is not among the {len(index)} known classes ({_some(list(index))}); "
                "rename the folder, or give its index with --classes."
            )
        found = sorted(path for path in class_folder.rglob("*") if _is_image(path))
        if not found:
            raise ConvpareError(f"class folder {class_folder} holds no images; add some, or take the folder away.")
        paths += found
        labels += [index[class_folder.name]] * len(found)
    pixels, kept = _readable(paths, folder, skipped)
    return Split(pixels, torch.tensor([labels[i] for i in kept], dtype=torch.long))


def _readable(paths: Sequence[Path], folder: Path, skipped: list[str]) -> tuple[FilePixels, list[int]]:
    """Read every file's header; those that are no images are named in `skipped`, the indices of the others returned."""
    pillow = import_extra("PIL.Image", "cli")
    kept: list[int] = []
    shapes: list[tuple[int, int]] = []
    for number, path in enumerate(paths):
        try:
            with pillow.open(path) as opened:
                width, height = opened.size
                opened.verify()
            _check_end(path, pillow)
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            skipped.append(f"{path}: {error}")
            continue
        kept.append(number)
        shapes.append((height, width))
    if not kept:
        raise ConvpareError(
            f"{folder} holds no readable images ({len(paths)} files tried). Expected class folders of images, or "
            f"images, ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return FilePixels(tuple(paths[i] for i in kept), tuple(shapes)), kept


def _check_end(path: Path, pillow: ModuleType) -> None:
    """Decode a JPEG without an end marker: Pillow's `verify` does not see that its pixels break off."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(max(0, path.stat().st_size - 64))
        if start != b"\xff\xd8" or b"\xff\xd9" in file.read():
            return
    with pillow.open(path) as opened:
        opened.load()


def _class_index(folder: Path, classes: str | Path | None) -> tuple[dict[str, int] | None, int | None]:
    """The label of every class-folder name, and how many classes there are; (None, None) without class folders."""
    names = [child.name for child in _subfolders(folder)]
    if not names:
        if classes is not None:
            raise ConvpareError(f"--classes was given, but {folder} has no class folders.")
        return None, None
    if _images_in(folder):
        raise ConvpareError(f"{folder} mixes class folders ({_some(names)}) and images; keep one or the other.")
    if classes is not None:
        index = read_classes(Path(classes))
    elif all(_SYNSET.fullmatch(name) for name in names):
        index = _imagenet_index(folder)
    else:
        index = {name: number for number, name in enumerate(names)}
    return index, max(index.values()) + 1


def _imagenet_index(folder: Path) -> dict[str, int]:
    """Synset → index, from the list that timm brings along (read as a file: nothing of timm is imported)."""
    found = importlib.util.find_spec("timm")
    places = list(found.submodule_search_locations or []) if found is not None else []
    for place in places:
        listed = Path(place) / "data" / "_info" / "imagenet_synsets.txt"
        if listed.is_file():
            return read_classes(listed)
    raise ConvpareError(
        f"the folders in {folder} are named by ImageNet synsets; their place among the 1000 classes comes from timm: "
        "pip install convpare[vision]. Or give it with --classes: a text file with one synset a line."
    )


def read_classes(path: Path) -> dict[str, int]:
    """Read {class-folder name: index} from a .json file, or from a text file with one name a line, counted from 0.

    Raises:
        ConvpareError: the file is missing or is not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text) if path.suffix == ".json" else _numbered(text.splitlines())
    except (OSError, ValueError) as error:
        raise ConvpareError(f"the classes file {path} cannot be read ({error}).") from error
    if not isinstance(index, dict) or not index or not all(type(i) is int and i >= 0 for i in index.values()):
        raise ConvpareError(
            f"the classes file {path} must be a .json object {{folder name: index}}, indices 0 or more, "
            "or a text file with one folder name a line."
        )
    return index


def _numbered(lines: list[str]) -> dict[str, int]:
    names = [line.strip() for line in lines]
    if "" in names or len(set(names)) < len(names):
        raise ValueError("every line must hold a name, and no name twice")
    return {name: number for number, name in enumerate(names)}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if _is_image(child))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
