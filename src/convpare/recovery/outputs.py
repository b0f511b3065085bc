"""How near a network's outputs are to another's."""

import math

import torch
from torch import Tensor, nn

from convpare.modes import eval_mode
from convpare.redundancy.moments import first_tensor


def outputs(model: nn.Module, images: Tensor, batch_size: int = 128) -> Tensor:
    """The first tensor that `model` returns for images (n, …), in evaluation mode, without gradients."""
    with eval_mode(model), torch.no_grad():
        return torch.cat([first_tensor(model(batch)) for batch in torch.split(images, batch_size)])


def relative_error(got: Tensor, reference: Tensor) -> float:
    """‖outputs − reference‖² / ‖reference − its mean over images‖²; infinite where it is no number."""
    error = (got - reference).double().square().sum()
    spread = (reference - reference.mean(0)).double().square().sum().clamp_min(1e-300)
    ratio = float(error / spread)
    return math.inf if math.isnan(ratio) else ratio
