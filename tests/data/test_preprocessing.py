import json
import math

import pytest
import torch

from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError

HALF = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33), (37, 24)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 24), (24, 24), (50, 33), (None, 23), (33, None), (None, None)])
def test_agrees_with_torchvision(size, resize, crop):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = images if resize is None else functional.resize(images, [resize], antialias=True)
    expected = expected if crop is None else functional.center_crop(expected, [crop, crop])
    preprocessing = Preprocessing(*HALF, resize, crop)
    fitted = preprocessing.fit(images)
    assert torch.allclose(fitted, expected, atol=1e-6)
    assert preprocessing.fitted(*size) == tuple(fitted.shape[2:])


def test_normalises_each_channel():
    images = torch.ones(1, 2, 2, 2)
    out = Preprocessing((0.5, 1.0), (0.25, 2.0)).normalise(images)
    assert torch.equal(out[0, 0], torch.full((2, 2), 2.0))
    assert torch.equal(out[0, 1], torch.zeros(2, 2))


def test_crop_larger_than_the_image():
    with pytest.raises(ConvpareError, match="crop of 41 pixels does not fit into an image of 40x60"):
        Preprocessing(*HALF, crop=41).fit(torch.zeros(1, 3, 40, 60))


def test_json_round_trip():
    for original in (Preprocessing(*HALF, 256, 224), Preprocessing((0.1,), (1.0,))):
        assert Preprocessing.from_json(json.loads(json.dumps(original.to_json()))) == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "fields"),
        ({"mean": "0.5"}, "'mean' must be a list of numbers"),
        ({"std": [True]}, "'std' must be a list of numbers"),
        ({"resize": 1.5}, "'resize' must be a whole number or null"),
        ({"crop": True}, "'crop' must be a whole number or null"),
        ({"crop": 0}, "crop is 0"),
        ({"mean": []}, "same length"),
    ],
)
def test_json_that_is_refused(change, message):
    with pytest.raises(ConvpareError, match=message):
        Preprocessing.from_json(Preprocessing(*HALF).to_json() | change)
    with pytest.raises(ConvpareError, match="fields"):
        Preprocessing.from_json({"mean": [0.0]})


@pytest.mark.parametrize(
    ("mean", "std", "resize", "crop", "message"),
    [
        ((0.5,), (0.5, 0.5), None, None, "same length"),
        ((), (), None, None, "same length"),
        ((math.nan,), (1.0,), None, None, "finite"),
        ((0.0,), (0.0,), None, None, "above zero"),
        ((0.0,), (math.inf,), None, None, "finite"),
        ((0.0,), (1.0,), -1, None, "resize is -1"),
        ((0.0,), (1.0,), None, 0, "crop is 0"),
    ],
)
def test_numbers_that_make_no_sense(mean, std, resize, crop, message):
    with pytest.raises(ConvpareError, match=message):
        Preprocessing(mean, std, resize, crop)
