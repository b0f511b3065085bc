"""What is learnt, against the sums written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.recovery.objectives import CrossEntropy, Imitation

IMAGES = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 5


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5))


def test_imitation_is_the_error_as_a_share_of_the_variance():
    teacher, student = net(0), net(1).eval()
    loss, right = Imitation.of(teacher, IMAGES)(student, IMAGES, None)
    assert teacher.training
    wanted, got = teacher.eval()(IMAGES), student(IMAGES)
    error, spread = (got - wanted).square().sum(), (wanted - wanted.mean(0)).square().sum()
    assert float(loss) / 40 == pytest.approx(float(error / spread), rel=1e-5)
    assert int(right) == int((got.argmax(1) == wanted.argmax(1)).sum())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_labels_add_a_cross_entropy():
    teacher, student = net(0), net(1).eval()
    alone, _ = Imitation.of(teacher, IMAGES)(student, IMAGES, None)
    both, right = Imitation.of(teacher, IMAGES, CrossEntropy(5))(student, IMAGES, LABELS)
    got = student(IMAGES)
    assert float(both - alone) == pytest.approx(0.1 * float(F.cross_entropy(got, LABELS, reduction="sum")), rel=1e-4)
    assert int(right) == int((got.argmax(1) == LABELS).sum())


def test_outputs_that_are_no_classes_are_imitated():
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
    loss, right = Imitation.of(teacher, IMAGES)(student, IMAGES, None)
    wanted = teacher(IMAGES)
    expected = (student(IMAGES) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert float(loss) / 40 == pytest.approx(float(expected), rel=1e-5)
    assert int(right) == 0


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 2)


def test_what_cannot_be_imitated_says_so():
    with pytest.raises(ConvpareError, match=r"variance of the original's outputs over 40 images is 0\.0"):
        Imitation.of(Constant(), IMAGES)
    with pytest.raises(ConvpareError, match=r"the model failed on images of shape \(40, 2, 4, 4\)"):
        Imitation.of(nn.Conv2d(3, 2, 3), IMAGES[:, :2])
    with pytest.raises(ConvpareError, match="needs some"):
        CrossEntropy(5)(net(0), IMAGES, None)
