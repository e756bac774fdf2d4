"""The small convolutional networks that the demo, the benchmarks and the tests compress."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG_WIDTHS = (64, 64, 128, 128, 256, 256)


class SmallVGG(nn.Module):
    """Six 3×3 convolutions with BatchNorm and ReLU, a max-pool after every second one, and one linear classifier.

    ``logits = linear(mean_over_pixels(features(input)))``

    Args:
        in_channels (int): channels of the images (1 for Fashion-MNIST, 3 for CIFAR-10).
        widths (sequence of int): output channels of the convolutions; the default has 1.15 M parameters.
        num_classes (int): number of logits.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = VGG_WIDTHS, num_classes: int = 10) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        previous = in_channels
        for position, width in enumerate(widths):
            stages += [
                nn.Conv2d(previous, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if position % 2 == 1 and position + 1 < len(widths):
                stages.append(nn.MaxPool2d(2))
            previous = width
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(previous, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.classifier(self.features(input).mean(dim=(2, 3)))


class _ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a parameter-free shortcut (He et al. 2015, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - in_channels

    def forward(self, input: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(input)))))
        shortcut = input
        if self.stride != 1 or self.extra_channels:
            half = self.extra_channels // 2
            shortcut = nn.functional.pad(
                input[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra_channels - half)
            )
        return torch.relu(out + shortcut)


class CifarResNet(nn.Module):
    """The ResNet of He et al. 2015 for 32×32 images: ``6·blocks + 2`` layers, option-A shortcuts.

    The parameter names are those of the common public checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1`` ...,
    ``linear``), so that ``load_state_dict`` takes them once a ``module.`` prefix is removed.

    Args:
        depth (int): 20, 32, 44, 56 or 110.
        num_classes (int): number of logits.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6·blocks + 2 with blocks >= 1, got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _ResidualBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(_ResidualBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        out = torch.relu(self.bn1(self.conv1(input)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))
