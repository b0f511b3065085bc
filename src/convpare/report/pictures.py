"""Feature maps that resemble each other, as small PNG files inside a page."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.graph.structure import Group
from convpare.inspection import Inspection
from convpare.optional import import_extra
from convpare.planning.plan import Plan
from convpare.redundancy.gallery import pair_maps

GROUPS = 6  # that are shown, spread over the depth
PAIRS = 2  # of each
IMAGES = 2
LARGEST = 96  # pixels along a side; larger maps are reduced


@dataclass(frozen=True)
class Pair:
    """Two channels of a group and how similar their maps are (SSIM).

    Attributes:
        layer: where the maps are read.
        removed: those of the two that the plan removes.
        dead: whether that puts out one value everywhere.
        trios: for each image the input, the one map and the other, as data URIs of PNG files.
    """

    group: str
    layer: str
    channels: tuple[int, int]
    ssim: float
    removed: tuple[int, ...]
    dead: bool
    trios: tuple[tuple[str, str, str], ...]


def gallery(
    model: nn.Module,
    found: Inspection,
    images: Tensor,
    plan: Plan | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Pair, ...]:
    """The most similar feature maps of some groups; with a plan, of removed channels each beside one that stays.

    Args:
        found: an inspection of `model` with images; the plan's groups are those of its graph.
        images: (n, channels, *spatial), preprocessed; the first two are shown.

    Raises:
        ConvpareError: the images do not suit the model, or Pillow is missing.
    """
    gone = {} if plan is None else {edit.group: _gone(edit.channels, edit.keep) for edit in plan.edits}
    groups = [g for g in found.graph.groups if not gone or len(gone.get(g.name, ()))]
    chosen = [(group, pairs) for group in groups if (pairs := _pairs(found, group, gone.get(group.name)))]
    made: list[Pair] = []
    for number, (group, pairs) in enumerate(shown := _spread(chosen)):
        if on_progress is not None:
            on_progress(number, len(shown))
        maps = pair_maps(model, found.graph, group.name, images[:IMAGES], pairs)
        lost = set(gone.get(group.name, ()))
        for (i, j, ssim), pair in zip(pairs, maps, strict=True):
            trios = tuple((_png(x), _png(a), _png(b)) for x, a, b in pair.trios)
            removed = tuple(channel for channel in (i, j) if channel in lost)
            made.append(Pair(group.name, pair.layer, (i, j), ssim, removed, _all_dead(found, group, removed), trios))
    return tuple(made)


def _all_dead(found: Inspection, group: Group, channels: Sequence[int]) -> bool:
    assert found.activations is not None
    return bool(channels) and set(channels) <= set(found.activations[group.name].dead)


def _gone(channels: int, keep: Sequence[int]) -> list[int]:
    stays = set(keep)
    return [c for c in range(channels) if c not in stays]


def _pairs(found: Inspection, group: Group, gone: Sequence[int] | None) -> list[tuple[int, int, float]]:
    """The most similar pairs of a group without dead channels; with some gone, of one that stays and one that goes.

    Dead channels are shown where no others went.
    """
    assert found.activations is not None
    seen = found.activations[group.name]
    if not gone:
        return [(pair.i, pair.j, pair.value) for pair in seen.pairs["ssim"][:PAIRS]]
    alive = torch.ones(group.channels, dtype=torch.bool)
    alive[list(seen.dead)] = False
    goes = torch.zeros(group.channels, dtype=torch.bool)
    goes[list(gone)] = True
    leaving, staying = goes & alive if (goes & alive).any() else goes, ~goes & alive
    leaving, staying = leaving.nonzero().squeeze(1), staying.nonzero().squeeze(1)
    if not len(staying):
        return []
    best = seen.ssim[leaving][:, staying].max(1)
    shown = PAIRS if (goes & alive).any() else 1  # dead ones are all alike
    order = best.values.argsort(descending=True, stable=True)[:shown].tolist()
    return [(int(staying[best.indices[n]]), int(leaving[n]), float(best.values[n])) for n in order]


def _spread(
    chosen: Sequence[tuple[Group, list[tuple[int, int, float]]]],
) -> list[tuple[Group, list[tuple[int, int, float]]]]:
    """So many of them, evenly over the depth."""
    at = np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), GROUPS)).round().astype(int))
    return [chosen[n] for n in at]


def _png(pixels: np.ndarray) -> str:
    """Pixels (height, width, 3) uint8 as a data URI."""
    pillow = import_extra("PIL.Image", "cli")
    picture = pillow.fromarray(pixels)
    if max(picture.size) > LARGEST:
        scale = LARGEST / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], pillow.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
