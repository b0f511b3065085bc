"""A small network for scikit-learn's 8x8 digits: seconds to train, and with something to prune of every kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.blocks.cifar import BasicBlock
from convpare.data import load_data
from convpare.modes import one_thread


class DigitsNet(nn.Module):
    """(n, 1, 8, 8) -> (n, num_classes): a stem, a residual, a depthwise-separable and another residual block."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block1 = BasicBlock(32, 32, 1)
        self.separable = nn.Sequential(
            nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.block2 = BasicBlock(64, 64, 1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.separable(self.block1(self.stem(x))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def digits_net(num_classes: int = 10) -> DigitsNet:
    """The network for the 8x8 digits, untrained: 96,074 parameters with ten classes."""
    return DigitsNet(num_classes)


@dataclass(frozen=True)
class TrainingEpoch:
    """One pass over the training images: its number from 1, the mean loss, and the per cent it got right meanwhile."""

    number: int
    loss: float
    train_top1: float


def train_digits(
    seed: int = 0, epochs: int = 20, on_progress: Callable[[int, int], None] | None = None
) -> tuple[DigitsNet, tuple[TrainingEpoch, ...]]:
    """Train `digits_net` on the digits' 1,442 training images, without a look at the test images.

    It takes about five seconds, on one CPU core.

    Args:
        seed: of the initial weights, the order of the images and their shifts; the global generator is left alone.
        epochs: passes over the training images.
        on_progress: called with (epochs done, epochs).

    Returns:
        The network after the last epoch, in evaluation mode, and what happened in each epoch.

    Raises:
        ConvpareError: scikit-learn is missing.
    """
    train = load_data("digits").train
    images, labels = train.tensor(), train.labels
    assert labels is not None
    history = []
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = digits_net().train()
        steps = epochs * math.ceil(len(images) / 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        for number in range(1, epochs + 1):
            history.append(_train_epoch(model, images, labels, optimizer, schedule, number))
            if on_progress is not None:
                on_progress(number, epochs)
    return model.eval(), tuple(history)


def _train_epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    number: int,
) -> TrainingEpoch:
    loss_sum, right = 0.0, 0
    for indices in torch.split(torch.randperm(len(images)), 64):
        x, y = _shifted(images[indices]), labels[indices]
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item() * len(y)
        right += int((logits.argmax(1) == y).sum())
    return TrainingEpoch(number, loss_sum / len(images), 100 * right / len(images))


def _shifted(images: Tensor) -> Tensor:
    """Move the whole batch by up to one pixel each way."""
    down, across = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, across : across + 8]
