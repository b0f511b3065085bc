"""Which blocks are compared, and how."""

import copy

import pytest
import torch
from torch import Tensor, nn

import convpare
from convpare.blocks.cifar import BasicBlock
from convpare.recovery.features import Features, heard
from convpare.recovery.objectives import CrossEntropy, Imitation

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Blocks in a row: two alike, one that runs twice, one that ends the network."""

    def __init__(self, width: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.stage = nn.Sequential(*(_block(width, hidden) for _ in range(3)))
        self.twice = _block(width, hidden)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.twice(self.twice(self.stage(self.stem(x)))))
        return found


def _block(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, width, 3, padding=1))


def net(seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def test_blocks_of_one_shape_that_run_once():
    """`stage` puts out what its last block does; `twice` runs twice; `head` is the whole network's output."""
    wide, narrow = net(), net(1, hidden=3)
    assert Features.shared(wide, narrow, IMAGES, most=9).names == ("stem", "stage.0", "stage.1", "stage.2")
    assert Features.shared(wide, narrow, IMAGES, most=2).names == ("stage.0", "stage.2")
    assert Features.shared(wide, narrow, IMAGES, most=1).names == ("stage.2",)
    assert Features.shared(wide, net(1, width=4), IMAGES).names == ()
    assert Features.shared(wide, torch.fx.symbolic_trace(nn.ReLU()), IMAGES).names == ()


def test_the_network_is_as_it_was():
    teacher, student = net().train(), net(1).train()
    teacher.stage[0].eval()
    Features.shared(teacher, student, IMAGES)
    assert [m.training for m in (teacher, teacher.stage, teacher.stage[0], student)] == [True, True, False, True]
    with pytest.raises(RuntimeError), heard(teacher, ("stem",)):
        teacher(torch.zeros(1, 7, 8, 8))
    assert not any(m._forward_hooks for m in [*teacher.modules(), *student.modules()])


def test_the_error_is_that_of_each_block_as_a_share_of_its_variance():
    teacher = net()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.03)
    shared = Features.shared(teacher, student, IMAGES, most=2)
    shares = []
    x, y = teacher.stem(IMAGES), student.stem(IMAGES)
    for number in range(3):
        x, y = teacher.stage[number](x), student.stage[number](y)
        if number != 1:
            shares.append(float((y - x).square().sum() / (x - x.mean(0)).square().sum()))
    alone, right = Imitation.of(teacher, IMAGES)(student, IMAGES, None)
    objective = Imitation(teacher, Imitation.of(teacher, IMAGES).variance, features=shared, strength=1e5)
    loss, same = objective(student, IMAGES, None)
    assert float(loss - alone) / 12 == pytest.approx(1e5 * sum(shares) / 2, rel=1e-4)
    assert int(right) == int(same)
    loss.backward()
    assert student.stem[0].weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_an_objective_says_what_it_is():
    teacher, student = net(), net(1)
    assert Imitation.of(teacher, IMAGES).to_json() == {"labels": None, "features": [], "strength": 3.0}
    both = Imitation.of(teacher, IMAGES, CrossEntropy(5), student, 0.25)
    names = ["stem", "stage.0", "stage.1", "stage.2"]
    assert both.to_json() == {"labels": {"classes": 5, "weight": 0.1}, "features": names, "strength": 0.25}
    assert Imitation.of(teacher, IMAGES, None, student, 0.0).features.names == ()


def test_residual_nets_share_their_stream():
    """Removals inside blocks leave the blocks' outputs as wide as they were."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), nn.Flatten(),
                            nn.Linear(256, 5)).eval()  # fmt: skip
    options = convpare.PlanOptions(scope="inner")
    plan = convpare.plan(teacher, IMAGES[:1], macs=0.6, criterion="l2", options=options)
    assert Features.shared(teacher, convpare.apply(teacher, plan), IMAGES).names == ("1", "2")
