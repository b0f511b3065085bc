"""Pairs of feature maps in a report."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from convpare.blocks.digits import digits_net
from convpare.inspection import inspect
from convpare.planning.planner import plan
from convpare.redundancy.gallery import pair_maps
from convpare.report import gallery

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    net = digits_net().eval()
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return net, images, inspect(net, EXAMPLE, images, images=16)


def pixels(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_removed_maps_stand_beside_the_most_similar_that_stay(seen):
    net, images, found = seen
    made = plan(net, EXAMPLE, images, macs=0.5)
    pairs = gallery(net, found, images, made)
    assert {pair.group for pair in pairs} == {edit.group for edit in made.edits}
    for pair in pairs:
        keep = set(next(edit.keep for edit in made.edits if edit.group == pair.group))
        stays, goes = pair.channels
        assert stays in keep and pair.removed == (goes,) and goes not in keep
        activations = found.activations[pair.group]
        alive = [c for c in keep if c not in activations.dead]
        assert pair.ssim == pytest.approx(float(activations.ssim[goes, alive].max()))
        assert not pair.dead
    first = [pair.ssim for pair in pairs if pair.group == pairs[0].group]
    assert first == sorted(first, reverse=True)


def test_pictures_are_the_maps(seen):
    net, images, found = seen
    pair = gallery(net, found, images)[0]
    (maps,) = pair_maps(net, found.graph, pair.group, images, [(*pair.channels, pair.ssim)])
    assert (len(pair.trios), pair.removed, pair.layer) == (2, (), maps.layer)
    for shown, expected in zip(pair.trios, maps.trios, strict=False):
        for uri, values in zip(shown, expected, strict=True):
            assert np.array_equal(pixels(uri), values)


def test_dead_channels_are_shown_once_where_no_others_went():
    torch.manual_seed(0)
    net = digits_net().eval()
    net.block1.bn1.weight.data[:3] = 0
    net.block1.bn1.bias.data[:3] = -1
    images = torch.rand(8, 1, 8, 8)
    found = inspect(net, EXAMPLE, images, images=8)
    made = plan(net, EXAMPLE, macs=0.99, criterion="l2")
    edit = next(e for e in made.edits if e.group == "block1.conv1")
    only = replace(made, edits=(replace(edit, keep=tuple(range(3, 32))),))
    (pair,) = gallery(net, found, images, only)
    assert pair.dead and pair.removed[0] < 3


def test_large_maps_are_reduced():
    torch.manual_seed(0)
    net = digits_net().eval()
    images = torch.rand(2, 1, 200, 200)
    found = inspect(net, torch.zeros(1, 1, 200, 200), images, images=2)
    pair = gallery(net, found, images)[0]
    assert max(pixels(uri).shape[0] for trio in pair.trios for uri in trio) == 96
