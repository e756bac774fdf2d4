"""The larger networks of the literature, for images of 32×32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Output channels of 1×1; before and of 3×3; before and of 5×5; of 1×1 behind the pool. Szegedy et al. 2015, table 1.
INCEPTIONS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
STEM = 192  # channels that the first inception is given


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Inception(nn.Module):
    """Four branches over one input, their channels one behind the other."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        plain, before3, of3, before5, of5, pooled = widths
        self.plain = _convolution(inputs, plain, 1)
        self.three = nn.Sequential(_convolution(inputs, before3, 1), _convolution(before3, of3, 3))
        self.five = nn.Sequential(_convolution(inputs, before5, 1), _convolution(before5, of5, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(inputs, pooled, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H, W]."""
        return torch.cat([self.plain(input), self.three(input), self.five(input), self.pool(input)], dim=1)


class Classifier(nn.Module):
    """``logits = linear(mean_over_pixels(features(input)))``."""

    def __init__(self, features: nn.Sequential, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(channels, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [N, 3, 32, 32] to [N, classes]."""
        logits: Tensor = self.classifier(self.features(input).mean(dim=(2, 3)))
        return logits


def vgg16() -> Classifier:
    """Thirteen 3×3 convolutions with BatchNorm and one linear layer: 313 M multiply-accumulates, 14.7 M parameters."""
    stages: list[nn.Module] = []
    previous = 3
    for number, widths in enumerate(VGG16):
        if number > 0:
            stages.append(nn.MaxPool2d(2))
        for width in widths:
            stages.append(_convolution(previous, width, 3))
            previous = width
    return Classifier(nn.Sequential(*stages), previous)


def googlenet() -> Classifier:
    """Like GoogLeNet: its nine inceptions behind one 3×3 convolution, as small images want it."""
    stages: list[nn.Module] = [_convolution(3, STEM, 3)]
    previous = STEM
    for number, group in enumerate(INCEPTIONS):
        if number > 0:
            stages.append(nn.MaxPool2d(3, stride=2, padding=1))
        for widths in group:
            stages.append(Inception(previous, widths))
            previous = widths[0] + widths[2] + widths[4] + widths[5]
    return Classifier(nn.Sequential(*stages), previous)
