"""The small networks of the papers, and one to try things on."""

from convpare.blocks.cifar import ZeroPadShortcut, resnet20, resnet32, resnet44, resnet56, resnet110
from convpare.blocks.digits import TrainingEpoch, digits_net, train_digits
from convpare.blocks.mobilenet import mobilenet_v1, mobilenet_v1_025

__all__ = [
    "TrainingEpoch",
    "ZeroPadShortcut",
    "digits_net",
    "mobilenet_v1",
    "mobilenet_v1_025",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "train_digits",
]
