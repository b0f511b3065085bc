"""MobileNetV1 (arXiv 1704.04861) as TensorFlow trained it: asymmetric padding, ReLU6, batch norm with eps 1e-3."""

import torch.nn.functional as F
from torch import Tensor, nn

# (output channels at width 1, stride) of each depthwise-separable block.
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def _pad(stride: int) -> nn.ZeroPad2d:
    """TensorFlow's SAME padding of an even-sized image for a 3x3 kernel: at stride 2, right and bottom only."""
    return nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


class Stem(nn.Module):
    """(n, 3, h, w) -> (n, channels, h / 2, w / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = _pad(2)
        self.conv = nn.Conv2d(3, channels, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(self.pad(x))))


class SeparableBlock(nn.Module):
    """A 3x3 depthwise and a 1x1 convolution: (n, c_in, h, w) -> (n, c_out, h / stride, w / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.pad = _pad(stride)
        self.dw = nn.Conv2d(c_in, c_in, 3, stride=stride, groups=c_in, bias=False)
        self.dw_bn = nn.BatchNorm2d(c_in, eps=1e-3)
        self.pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.dw_bn(self.dw(self.pad(x))))
        return F.relu6(self.pw_bn(self.pw(x)))


class MobileNetV1(nn.Module):
    """(n, 3, 224, 224) -> (n, num_classes)."""

    def __init__(self, width: float, num_classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = Stem(channels)
        self.blocks = nn.Sequential()
        for planes, stride in _BLOCKS:
            self.blocks.append(SeparableBlock(channels, int(planes * width), stride))
            channels = int(planes * width)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def mobilenet_v1(width: float = 1.0, num_classes: int = 1000) -> MobileNetV1:
    """MobileNetV1 with every layer's channels multiplied by `width`, untrained."""
    return MobileNetV1(width, num_classes)


def mobilenet_v1_025(num_classes: int = 1000) -> MobileNetV1:
    """MobileNetV1 at width 0.25, untrained."""
    return MobileNetV1(0.25, num_classes)
