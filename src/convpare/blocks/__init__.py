"""The small networks of the papers, block designs to compare, and one network to try things on."""

from convpare.blocks.cifar import ZeroPadShortcut, resnet20, resnet32, resnet44, resnet56, resnet110
from convpare.blocks.cifar_bottleneck import resnet50_cifar
from convpare.blocks.designs import Design, bottleneck_width_factor, width_for_params
from convpare.blocks.digits import TrainingEpoch, digits_net, train_digits
from convpare.blocks.mobilenet import mobilenet_v1, mobilenet_v1_025
from convpare.blocks.vanilla import vanilla4

__all__ = [
    "Design",
    "TrainingEpoch",
    "ZeroPadShortcut",
    "bottleneck_width_factor",
    "digits_net",
    "mobilenet_v1",
    "mobilenet_v1_025",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet50_cifar",
    "resnet56",
    "resnet110",
    "train_digits",
    "vanilla4",
    "width_for_params",
]
