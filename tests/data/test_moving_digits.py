import pytest
import torch

from convpare.data.arrays import load_digits
from convpare.data.moving_digits import DIRECTIONS, Clips, _bounced, moving_digits
from convpare.errors import ConvpareError


def walked(position: int, speed: int) -> list[int]:
    """One axis, pixel by pixel: turn round at 0 and at 8."""
    heading, seen = (1 if speed > 0 else -1), [position]
    for _ in range(7):
        for _ in range(abs(speed)):
            if not 0 <= position + heading <= 8:
                heading = -heading
            position += heading
        seen.append(position)
    return seen


def all_paths() -> tuple[torch.Tensor, torch.Tensor]:
    """The corners of every possible clip, (n, 8, 2), and its class."""
    labels, rows, columns, speeds = torch.cartesian_prod(
        torch.arange(8), torch.arange(9), torch.arange(9), torch.arange(1, 3)
    ).unbind(1)
    velocity = torch.tensor(DIRECTIONS)[labels] * speeds[:, None]
    return _bounced(torch.stack([rows, columns], 1), velocity), labels


def best_guess(seen: torch.Tensor, labels: torch.Tensor) -> float:
    """How often the most frequent class of what was seen, (n, ...) whole numbers, is right."""
    _, which = seen.unique(dim=0, return_inverse=True)
    votes = torch.zeros(int(which.max()) + 1, 8).index_put_((which, labels), torch.ones(len(labels)), accumulate=True)
    return float(votes.max(1).values.sum()) / len(labels)


@pytest.fixture(scope="module")
def clips() -> tuple[Clips, Clips]:
    return moving_digits(400, 120, noise=0.0)


def test_shapes_types_and_frequencies(clips):
    for part, count in zip(clips, (400, 120), strict=True):
        assert part.videos.shape == (count, 1, 8, 16, 16)
        assert part.videos.dtype == torch.float32
        assert part.labels.bincount().tolist() == [count // 8] * 8
        assert (part.videos.min(), part.videos.max()) == (0, 1)


def test_training_and_test_clips_show_other_digits(clips):
    splits = load_digits()
    for part, split in zip(clips, (splits.train, splits.test), strict=True):
        images = split.pixels.images[part.sources, 0]
        assert torch.equal(part.digits, split.labels[part.sources])
        assert torch.equal(part.videos.sum((1, 2, 3, 4)), 8 * images.sum((1, 2)))  # every frame has all of its digit
    assert not {tuple(i.flatten().tolist()) for i in splits.train.pixels.images[clips[0].sources]} & {
        tuple(i.flatten().tolist()) for i in splits.test.pixels.images[clips[1].sources]
    }


def test_every_frame_shows_the_digit_at_a_corner_of_its_path(clips):
    part, images = clips[1], load_digits().test.pixels.images
    paths, labels = all_paths()
    for number in range(20):
        mine = paths[labels == part.labels[number]].unique(dim=0)
        canvas = torch.zeros(len(mine), 8, 16, 16)
        for path, frames in zip(mine, canvas, strict=True):
            for (row, column), frame in zip(path.tolist(), frames, strict=True):
                frame[row : row + 8, column : column + 8] = images[part.sources[number], 0]
        assert (canvas == part.videos[number, 0]).flatten(1).all(1).any()


@pytest.mark.parametrize("speed", [-2, -1, 1, 2])
@pytest.mark.parametrize("start", range(9))
def test_bouncing_is_a_walk_that_turns_round(start, speed):
    got = _bounced(torch.tensor([[start, 3]]), torch.tensor([[speed, 0]]))[0]
    blocked = start == (8 if speed > 0 else 0)  # then it starts at the other border
    assert got[:, 0].tolist() == walked(8 - start if blocked else start, speed)
    assert got[:, 1].tolist() == [3] * 8


def test_all_digits_set_out_the_way_they_should():
    paths, labels = all_paths()
    first = (paths[:, 1] - paths[:, 0]).sign()
    wanted = torch.tensor(DIRECTIONS)[labels]
    assert ((first == wanted) | (first == 0)).all()  # two pixels a frame, and the border after one: back where it was


def test_the_class_is_in_the_order_of_the_frames():
    paths, labels = all_paths()
    places = paths[..., 0] * 9 + paths[..., 1]
    assert max(best_guess(places[:, t : t + 1], labels) for t in range(8)) < 0.36
    assert best_guess(places.sort(1).values, labels) < 0.65
    assert best_guess(places, labels) == 1


def test_noise_has_its_standard_deviation():
    quiet, noisy = moving_digits(200, 8, noise=0.0)[0], moving_digits(200, 8, noise=0.5)[0]
    assert torch.equal(quiet.labels, noisy.labels)
    difference = noisy.videos - quiet.videos
    assert difference.std() == pytest.approx(0.5, abs=0.01)
    assert difference.mean() == pytest.approx(0, abs=0.01)


def test_the_same_seed_gives_the_same_clips_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (moving_digits(50, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for part in (0, 1):
        assert torch.equal(first[part].videos, again[part].videos)
        assert torch.equal(first[part].labels, again[part].labels)
        assert not torch.equal(first[part].videos, other[part].videos)


@pytest.mark.parametrize("arguments", [{"train": 0}, {"test": 0}, {"noise": -1.0}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ConvpareError, match="give 1 or more"):
        moving_digits(**arguments)
