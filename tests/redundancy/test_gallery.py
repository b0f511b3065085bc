"""Pictures are read back, and their pixels compared with the maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.redundancy.gallery import IMAGES, MARGIN, TILE, colours, corner, pairs_picture

Image = pytest.importorskip("PIL.Image")

DARK, LIGHT = colours(np.array([0.0, 1.0]), 0, 1)
CONVS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def copying(*weights: float, order: int = 2, inputs: int = 1) -> nn.Sequential:
    """A network whose channels are its first input channel times these weights."""
    kernel = (1,) if order else ()
    model = nn.Sequential(CONVS[order](inputs, len(weights), *kernel), CONVS[order](len(weights), 2, *kernel)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0] = torch.tensor(weights).reshape(-1, *[1] * order)
        model[0].bias.zero_()
    return model


def draw(
    model: nn.Module, images: Tensor, pairs: list[tuple[int, int, float]], folder: Path, **options: Any
) -> np.ndarray:
    path = folder / "pairs.png"
    pairs_picture(model, trace(model, images[:1]), "0", images, pairs, path, **options)
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    left, top = corner(row, column)
    return picture[top : top + TILE, left : left + TILE]


def enlarged(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(TILE // len(pixels), 0).repeat(TILE // pixels.shape[1], 1)


def ramp(n: int = 2, side: int = 8) -> Tensor:
    return (torch.arange(n * side**2).reshape(n, 1, side, side) % side**2) / (side**2 - 1)


def test_maps_are_enlarged_pixel_by_pixel_beside_their_input(tmp_path: Path):
    x = ramp()
    picture = draw(copying(1, 0.5, 1), x, [(0, 1, 0.9), (0, 2, 1.0)], tmp_path)
    plain = x[0, 0].numpy()
    gray = (255 * plain[..., None]).round().astype(np.uint8).repeat(3, 2)
    for number in range(2):
        for row in range(2):
            assert np.array_equal(tile(picture, row, 3 * number), enlarged(gray))
            assert np.array_equal(tile(picture, row, 3 * number + 1), enlarged(colours(plain, 0, 1)))
        assert np.array_equal(tile(picture, 0, 3 * number + 2), enlarged(colours(plain / 2, 0, 1)))  # the pair's scale
    assert np.array_equal(tile(picture, 1, 1), tile(picture, 1, 2))  # equal maps


def test_a_scale_belongs_to_a_pair_and_is_the_same_for_all_images(tmp_path: Path):
    x = ramp(3) * torch.tensor([1.0, 0.25, 2.0]).reshape(3, 1, 1, 1)
    picture = draw(copying(1, 0.5, 10), x, [(0, 1, 0.9), (1, 2, 0.1)], tmp_path)
    plain = x[1, 0].numpy()
    assert np.array_equal(tile(picture, 0, 4), enlarged(colours(plain, 0, 2)))
    assert np.array_equal(tile(picture, 1, 4), enlarged(colours(plain / 2, 0, 20)))


def test_dead_channels_are_flat(tmp_path: Path):
    picture = draw(copying(0, 0, 1), ramp(), [(0, 1, 1.0), (0, 2, 0.3)], tmp_path)
    for row, column in ((0, 1), (0, 2), (1, 1)):
        assert (tile(picture, row, column) == DARK).all()
    assert (tile(picture, 1, 2)[-1, -1] == LIGHT).all()


def test_layout(tmp_path: Path):
    pairs = [(0, 1, 0.9), (0, 2, 0.8), (1, 2, 0.7)]
    picture = draw(copying(1, 2, 3), ramp(7), pairs, tmp_path)
    left, top = corner(2, 3 * IMAGES - 1)  # no more than the first images
    height, width, _ = picture.shape
    assert width == left + TILE + MARGIN
    assert top + TILE + MARGIN <= height <= top + TILE + 2 * MARGIN
    background = picture[0, 0]
    assert background.min() > 245
    for edge in (picture[:MARGIN], picture[-MARGIN:], picture[:, :MARGIN], picture[:, -MARGIN:]):
        assert (edge == background).all()
    heading = picture[corner(0, 0)[1] - 25 : corner(0, 0)[1] - 5]
    assert heading.min() < 60  # there is text
    one = draw(copying(1, 2, 3), ramp(1), pairs, tmp_path)
    ink = (one != background).any(2).nonzero()[1]
    assert ink.max() < one.shape[1] - MARGIN / 2  # long headings widen it


def test_headings_tell_the_measure_and_the_pair(tmp_path: Path):
    x, model, seen = ramp(), copying(1, 2, 3), []
    for pairs, measure in (
        ([(0, 1, 0.5)], "ssim"),
        ([(0, 1, 0.5)], "correlation"),
        ([(0, 1, 0.5)], "psnr"),
        ([(0, 1, 0.75)], "ssim"),
    ):
        picture = draw(model, x, pairs, tmp_path, measure=measure)
        seen.append(picture[: corner(0, 0)[1]].tobytes())
    assert len(set(seen)) == 4
    assert draw(model, x, [(0, 1, 0.5)], tmp_path)[: corner(0, 0)[1]].tobytes() == seen[0]


def test_colour_inputs_and_any_number_of_channels(tmp_path: Path):
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0], x[0, 2, 3, 3] = 0, 1
    got = tile(draw(copying(1, 1, inputs=3), x, [(0, 1, 1.0)], tmp_path), 0, 0)
    assert np.array_equal(got, enlarged((255 * x[0].double().numpy()).round().astype(np.uint8).transpose(1, 2, 0)))
    x = torch.stack([ramp(1)[0, 0], -ramp(1)[0, 0]])[None]  # their mean is 0 everywhere
    assert (tile(draw(copying(1, 1, inputs=2), x, [(0, 1, 1.0)], tmp_path), 0, 0) == 0).all()


@pytest.mark.parametrize(("order", "size"), [(0, (128, 128)), (1, (32, 128)), (3, (128, 128))])
def test_any_spatial_order(tmp_path: Path, order: int, size: tuple[int, int]):
    x = torch.linspace(0, 1, 2 * 8**order).reshape(2, 1, *[8] * order)
    picture = draw(copying(1, 0, order=order), x, [(0, 1, 0.5)], tmp_path)
    values = x[0, 0].double().numpy()
    values = np.atleast_2d(values[4] if order == 3 else values)  # the middle slice
    got = tile(picture, 0, 1)
    if order == 1:
        assert (got[: (TILE - 32) // 2] == picture[0, 0]).all()
        got = got[(TILE - 32) // 2 : (TILE + 32) // 2]
    shape = (size[0] // values.shape[0], size[1] // values.shape[1])
    assert np.array_equal(got, colours(values, 0, float(x.max())).repeat(shape[0], 0).repeat(shape[1], 1))


@pytest.mark.parametrize(("side", "shown"), [(7, 126), (28, 112), (128, 128), (256, 128)])
def test_sizes_that_do_not_divide_a_tile_stand_in_its_middle(tmp_path: Path, side: int, shown: int):
    picture = draw(copying(1, 1), torch.ones(1, 1, side, side), [(0, 1, 1.0)], tmp_path)
    inside = (tile(picture, 0, 1) == DARK).all(2)
    frame = (TILE - shown) // 2
    assert inside[frame : frame + shown, frame : frame + shown].all()
    assert inside.sum() == shown**2


def test_large_maps_are_averaged(tmp_path: Path):
    x = torch.zeros(1, 1, 256, 256)
    x[..., ::2] = 1
    assert (tile(draw(copying(1, 1), x, [(0, 1, 1.0)], tmp_path), 0, 0) == 128).all()


def test_colours():
    scale = colours(np.linspace(0, 1, 101), 0, 1).astype(int)
    light = scale @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all()
    assert scale.shape == (101, 3)
    assert (colours(np.full((2, 3), 5.0), 5, 5) == DARK).all()
    assert (colours(np.array([-4.0, 6.0]), -4, 6) == [DARK, LIGHT]).all()


class TestErrors:
    MODEL, X, PAIRS = copying(1, 2), ramp(), [(0, 1, 0.9)]

    def refuse(self, message: str, path: Path, **given: Any) -> None:
        graph = trace(self.MODEL, self.X[:1])
        arguments = {"group_name": "0", "images": self.X, "pairs": self.PAIRS, "path": path, **given}
        with pytest.raises(ConvpareError, match=message):
            pairs_picture(self.MODEL, graph, **arguments)
        assert not [p for p in path.parent.rglob("*") if p.name.startswith(".convpare")]

    def test_what_is_given(self, tmp_path: Path):
        path = tmp_path / "a.png"
        self.refuse("no group 'stem' in Sequential; its groups are 0", path, group_name="stem")
        self.refuse(r"the model failed on images of shape \(2, 3, 8, 8\)", path, images=torch.zeros(2, 3, 8, 8))
        self.refuse(r"images have shape \(0, 1, 8, 8\); expected", path, images=self.X[:0])
        self.refuse("feature maps of group '0' hold NaN or infinity", path, images=self.X / 0)
        self.refuse("group '0' has channels 0 to 1, not 0 and 2", path, pairs=[(0, 2, 0.5)])
        self.refuse("there are no pairs of group '0'", path, pairs=[])
        self.refuse("no measure 'mse'; choose one of ssim, psnr, correlation", path, measure="mse")
        assert not path.exists()

    def test_where_it_is_written(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        for name in ("missing/a.png", "file/a.png", "folder"):
            self.refuse(f"{name} cannot be written: ", tmp_path / name)
        assert (tmp_path / "file").read_text() == ""

    def test_a_failed_write_leaves_the_old_picture(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "a.png"
        path.write_bytes(b"old")

        def full(*_: object, **__: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(Image.Image, "save", full)
        self.refuse("a.png cannot be written: no space left", path)
        assert path.read_bytes() == b"old"


def test_the_picture_replaces_another_and_the_model_stays(tmp_path: Path):
    model, path = copying(1, 2).train(), tmp_path / "pairs.png"
    path.write_bytes(b"old")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw(model, ramp(), [(0, 1, 0.9)], tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.png"]
