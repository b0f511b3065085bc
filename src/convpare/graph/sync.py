"""The attributes of PyTorch's own layers, kept true to the shapes of their parameters."""

import numpy as np
from torch import nn

from convpare.graph.structure import Mender
from convpare.modes import eval_mode

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def sync_attributes(module: nn.Module) -> None:
    """Make `out_channels`, `groups`, `num_features` and their like say what the shapes of the parameters say."""
    with eval_mode(module):  # reading a parametrised weight computes it; in training mode that may change its buffers
        _sync(module)


def _sync(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        _sync_convolution(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BATCH_NORMS):
        sized = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def mend_features(module: nn.Module, keep: np.ndarray) -> None:
    """A norm without parameters or statistics has no shape to read `num_features` from."""
    module.num_features = int(keep.sum())  # type: ignore[assignment]


def mend_group_norm(module: nn.Module, keep: np.ndarray) -> None:
    """Whole groups go."""
    module.num_groups = int(keep.reshape(module.num_groups, -1).any(1).sum())  # type: ignore[assignment, arg-type]
    module.num_channels = int(keep.sum())  # type: ignore[assignment]


def feature_mender(module: nn.Module | None) -> Mender | None:
    """How a norm's numbers follow the channels that it normalises, where its parameters do not tell."""
    if isinstance(module, BATCH_NORMS):
        return mend_features
    return mend_group_norm if isinstance(module, nn.GroupNorm) else None


def _sync_convolution(module: nn.modules.conv._ConvNd) -> None:
    first, second = module.weight.shape[:2]
    total, own = module.out_channels, module.in_channels
    if module.transposed:
        total, own = own, total
    if own == module.groups > 1:  # a group is one channel, or one with its multiples, and goes as a whole
        module.groups = first // (total // module.groups)
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups
