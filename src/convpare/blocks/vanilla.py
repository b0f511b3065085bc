"""A plain network of four convolutions, the small one of the compressibility study in arXiv 2403.14379."""

from torch import Tensor, nn


class Vanilla(nn.Module):
    """One 3x3 convolution with ReLU and 2x2 max pooling for each width, a global average and a linear classifier.

    (n, in_channels, h, w) -> (n, num_classes), for images of at least 2^len(widths) pixels a side. Nothing is
    normalised and nothing is skipped, so that every kernel acts on the output by itself.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...], in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for c_in, c_out in zip((in_channels, *widths[:-1]), widths, strict=True):
            self.features.extend([nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)])
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def vanilla4(num_classes: int = 10, widths: tuple[int, ...] = (32, 64, 128, 256), in_channels: int = 3) -> Vanilla:
    """The four-layer network, untrained: 390,986 parameters with ten classes.

    The paper says "vanilla four-layer CNN" in its abstract; its widths, pooling and classifier are not known here, so
    these are this package's choice.
    """
    return Vanilla(num_classes, widths, in_channels)
