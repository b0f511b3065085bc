"""Pictures of the feature maps that resemble each other."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph
from convpare.optional import import_extra
from convpare.redundancy.taps import Tap, taps_of, visit

IMAGES = 3  # that are shown beside each other
TILE = 128  # pixels
MARGIN = 40
_GAP, _APART, _HEADING, _CAPTION, _SPACE = 10, 34, 30, 24, 34  # in a trio, between trios, above, below, between pairs
_BACKGROUND, _INK, _FAINT = (252, 252, 250), (40, 40, 46), (120, 120, 128)
_LABELS = {"ssim": "SSIM {:.3f}", "psnr": "PSNR {:.1f} dB", "correlation": "|r| {:.3f}"}
_SCALE = np.array([(38, 22, 78), (52, 76, 146), (34, 140, 150), (112, 196, 112), (250, 228, 70)], float)


@dataclass(frozen=True, eq=False)
class PairMaps:
    """Two channels of a group on some images, as colours.

    Attributes:
        layer: where the maps are read.
        low, high: the values of the darkest and the lightest colour, the same for both.
        trios: for each image the input, the one map, the other: (height, width, 3) uint8.
        flat: for each image whether the one map, and the other, is of one value.
    """

    layer: str
    low: float
    high: float
    trios: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    flat: tuple[tuple[bool, bool], ...]


def pair_maps(
    model: nn.Module, graph: Graph, group_name: str, images: Tensor, pairs: Sequence[tuple[int, int, float]]
) -> list[PairMaps]:
    """The feature maps of pairs of channels on the first three images, one for each pair.

    A pair has one colour scale, from the smallest to the largest value of its maps over the images shown, so that maps
    can be compared. Maps are what the first layer that reads the group sees. Of a volume the middle slice is shown.

    Raises:
        ConvpareError: as `pairs_picture`, but nothing is written.
    """
    tap = taps_of(graph, graph.group(group_name), "activation")[0]
    maps = _maps(model, graph, tap, images)
    _check_pairs(pairs, group_name, maps.shape[1])
    inputs = [_input(image) for image in images[: len(maps)].detach().cpu().double().numpy()]
    found = []
    for i, j, _ in pairs:
        low, high = float(maps[:, [i, j]].min()), float(maps[:, [i, j]].max())
        planes = [(_plane(of[i]), _plane(of[j])) for of in maps]
        trios = [(x, colours(a, low, high), colours(b, low, high)) for x, (a, b) in zip(inputs, planes, strict=True)]
        flat = [(bool(a.min() == a.max()), bool(b.min() == b.max())) for a, b in planes]
        found.append(PairMaps(tap.layer, low, high, tuple(trios), tuple(flat)))
    return found


def pairs_picture(
    model: nn.Module,
    graph: Graph,
    group_name: str,
    images: Tensor,
    pairs: Sequence[tuple[int, int, float]],
    path: str | Path,
    *,
    measure: str = "ssim",
) -> None:
    """Write a PNG of the feature maps of pairs of channels: for each image the input, the one map, the other.

    The maps are those of `pair_maps`; a map of one value is marked as flat. Pixels are enlarged as they are. A signal
    is shown as a strip.

    Args:
        images: (n, channels, *spatial), preprocessed; the first three are shown.
        pairs: (i, j, similarity), such as `GroupActivations.pairs["ssim"]`.
        measure: what the similarity is: "ssim", "psnr" or "correlation".

    Raises:
        ConvpareError: there is no such group, channel or measure; no pairs or images are given; the images do not suit
            the model; the file cannot be written; Pillow is missing.
    """
    if measure not in _LABELS:
        raise ConvpareError(f"no measure {measure!r}; choose one of {', '.join(_LABELS)}")
    found = pair_maps(model, graph, group_name, images, pairs)
    titles = [f"{group_name} · {i} ~ {j} · {_LABELS[measure].format(value)}" for i, j, value in pairs]
    notes = [f"maps at {pair.layer}, colours from {pair.low:.3g} to {pair.high:.3g}" for pair in found]
    picture = _Canvas(len(found[0].trios), list(zip(titles, notes, strict=True)))
    for row, (pair, (i, j, _)) in enumerate(zip(found, pairs, strict=True)):
        for number, (trio, flat) in enumerate(zip(pair.trios, pair.flat, strict=True)):
            captions = (
                "input",
                *(f"{c}{' (flat)' if is_flat else ''}" for c, is_flat in zip((i, j), flat, strict=True)),
            )
            for part, (pixels, caption) in enumerate(zip(trio, captions, strict=True)):
                picture.tile(row, 3 * number + part, pixels, caption)
    picture.write(path)


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (*shape) between `low` and `high` as colours from dark to light, (*shape, 3) uint8."""
    place = (values - low) / (high - low) if high > low else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_SCALE))
    return np.stack([np.interp(place, stops, channel) for channel in _SCALE.T], -1).round().astype(np.uint8)


def corner(row: int, column: int) -> tuple[int, int]:
    """The left and upper pixel of a tile: pairs are rows, and each image has three columns."""
    left = MARGIN + column * (TILE + _GAP) + column // 3 * (_APART - _GAP)
    return left, MARGIN + _HEADING + row * (_HEADING + TILE + _CAPTION + _SPACE)


class _Canvas:
    """Rows of tiles, each under a title with a note beside it."""

    def __init__(self, images: int, headings: Sequence[tuple[str, str]]) -> None:
        self._pillow = import_extra("PIL.Image", "cli")
        fonts = import_extra("PIL.ImageFont", "cli")
        self._large, self._small = fonts.load_default(16), fonts.load_default(12)
        right, bottom = (start + TILE for start in corner(len(headings) - 1, 3 * images - 1))
        longest = max(self._note_at(title) + self._small.getlength(note) for title, note in headings)
        size = (max(right, round(longest)) + MARGIN, bottom + _CAPTION + MARGIN)
        self._image = self._pillow.new("RGB", size, _BACKGROUND)
        self._draw = import_extra("PIL.ImageDraw", "cli").Draw(self._image)
        for row, (title, note) in enumerate(headings):
            base = corner(row, 0)[1] - 12
            self._draw.text((MARGIN, base), title, _INK, self._large, anchor="ls")
            self._draw.text((self._note_at(title), base), note, _FAINT, self._small, anchor="ls")

    def tile(self, row: int, column: int, pixels: np.ndarray, caption: str) -> None:
        """Pixels (height, width, 3) uint8, in the middle of a tile: enlarged by a whole number, or reduced to fit."""
        left, top = corner(row, column)
        width, height = _enlarged(pixels.shape[1], pixels.shape[0])
        how = self._pillow.Resampling.NEAREST if width >= pixels.shape[1] else self._pillow.Resampling.BOX
        picture: Any = self._pillow.fromarray(pixels).resize((width, height), how)
        self._image.paste(picture, (left + (TILE - width) // 2, top + (TILE - height) // 2))
        self._draw.text((left + TILE // 2, top + TILE + 6), caption, _FAINT, self._small, anchor="mt")

    def _note_at(self, title: str) -> int:
        width: float = self._large.getlength(title)
        return MARGIN + round(width) + 16

    def write(self, path: str | Path) -> None:
        """Write to a temporary name and move it, so that the file is whole or not there."""
        place = Path(os.path.realpath(path))
        temporary = place.with_name(f".convpare-{secrets.token_hex(4)}.png")
        try:
            try:
                self._image.save(temporary, format="PNG")
                os.replace(temporary, place)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ConvpareError(f"{path} cannot be written: {error}; give a file in a folder that exists") from error


def _maps(model: nn.Module, graph: Graph, tap: Tap, images: Tensor) -> np.ndarray:
    """The maps (n, channels, *spatial) at a tap for the first images, float64."""
    if images.ndim < 2 or not images.numel():
        raise ConvpareError(f"images have shape {tuple(images.shape)}; expected (n, channels, *spatial), not empty")
    found: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        visit(model, graph, [tap], images[:IMAGES], lambda _, maps: found.append(maps.cpu().double()))
    maps, shown = found[0], len(images[:IMAGES])
    if len(maps) != shown:
        raise ConvpareError(f"layer {tap.layer!r} sees {len(maps)} maps of {shown} images; expected one of each")
    if not bool(maps.isfinite().all()):
        raise ConvpareError(f"the feature maps of group {tap.group!r} hold NaN or infinity; give finite images")
    return maps.numpy()


def _check_pairs(pairs: Sequence[tuple[int, int, float]], group_name: str, channels: int) -> None:
    if not pairs:
        raise ConvpareError(f"there are no pairs of group {group_name!r} to show; give one or more")
    for i, j, _ in pairs:
        if not (0 <= i < channels and 0 <= j < channels):
            raise ConvpareError(f"group {group_name!r} has channels 0 to {channels - 1}, not {i} and {j}")


def _enlarged(width: int, height: int) -> tuple[int, int]:
    """The size in which a map is shown; a strip of one row is made higher."""
    longest = max(width, height)
    scale = TILE // longest or TILE / longest
    return max(1, round(width * scale)), TILE // 4 if height == 1 < width else max(1, round(height * scale))


def _plane(values: np.ndarray) -> np.ndarray:
    """A map of any spatial order in two dimensions."""
    while values.ndim > 2:
        values = values[len(values) // 2]
    return np.atleast_2d(values)


def _input(image: np.ndarray) -> np.ndarray:
    """An image (channels, *spatial) from its darkest to its lightest value, (height, width, 3) uint8; not RGB: gray."""
    planes = np.stack([_plane(channel) for channel in (image if len(image) == 3 else image.mean(0, keepdims=True))], -1)
    low, high = planes.min(), planes.max()
    gray = (planes - low) / (high - low) if high > low else np.zeros_like(planes)
    return np.broadcast_to((255 * gray).round().astype(np.uint8), (*planes.shape[:2], 3)).copy()
