"""Small networks, each with something that is hard to write down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.blocks.digits import digits_net


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics and scales of batch norms that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.running_mean, -0.5)):
                if tensor is not None:
                    with torch.no_grad():
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return net


def digits() -> nn.Module:
    torch.manual_seed(0)
    return randomised(digits_net()).eval()


class Signals(nn.Module):
    """1-D: grouped, PReLU, a depthwise transposed convolution, dropout, flattened into a linear layer."""

    example = torch.zeros(1, 2, 20)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(2, 16, 5), nn.BatchNorm1d(16), nn.PReLU(16), nn.Conv1d(16, 24, 3, groups=4, bias=False),
            nn.PReLU(), nn.ConvTranspose1d(24, 24, 3, groups=24), nn.BatchNorm1d(24, eps=1e-3), nn.MaxPool1d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(24 * 8, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Awkward(nn.Module):
    """Names that the code has for itself, one layer run twice, computed weights, numbers written out, sums in place."""

    example = torch.zeros(1, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        self.add_module("x", nn.Conv2d(8, 8, (1, 3), padding=(0, 1), bias=False))
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.a_b = nn.GroupNorm(2, 8)
        self.a = nn.ModuleDict({"b": nn.LayerNorm(8, eps=1e-6)})
        self.standard = nn.Conv2d(8, 6, 3)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 6).reshape(1, 6, 1, 1))
        self.drop, self.out = nn.Dropout2d(0.4), nn.Linear(6, 4, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        x = self.net(given)
        y = F.relu(self.a_b(self.x(x)), inplace=True)
        y += x
        y = self.twice(F.hardswish(self.twice(y)))
        y = self.a["b"](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = torch.cat([y[:, 3:].sigmoid(), y[:, :3]], 1)
        weight = self.standard.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        y = F.conv2d(y, weight, self.standard.bias) * self.scale + self.shift
        y = self.drop(F.max_pool2d(y, 2))
        return self.out(y.view(len(y), 6, -1).mean(2))


class Branch(nn.Module):
    """Cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if float(y.sum()) > 0 else -y


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(kind()).eval()
