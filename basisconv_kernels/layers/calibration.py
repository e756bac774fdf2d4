"""A BatchNorm between the stages that starts as the exact identity of eval mode.

A fresh BatchNorm is no identity: in training mode it normalises, in eval mode it scales by 1/√(1 + ε). With
``running = (mean(Z), var(Z))``, ``γ = √(var + ε)`` and ``β = mean`` it is one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from basisconv_kernels.layers.folding import wide


class ChannelMoments:
    """Mean and variance of feature maps per channel over any number of batches, in float64 (pairwise update)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Take in maps [N, channels, H, W]."""
        values = maps.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)
        added = values.shape[1]
        if added == 0:
            return
        mean = values.mean(1)
        total = self.count + added
        step = mean - self.mean
        self._squares += (values - mean[:, None]).square().sum(1) + step.square() * (self.count * added / total)
        self.mean = self.mean + step * (added / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean; ones where nothing was taken in."""
        return self._squares / self.count if self.count else torch.ones_like(self.mean)


def calibrated_norm(moments: ChannelMoments, like: Tensor) -> nn.BatchNorm2d:
    """A BatchNorm2d that is the identity in eval mode and has these statistics, of the dtype and device of ``like``."""
    norm = nn.BatchNorm2d(moments.mean.shape[0], device=like.device, dtype=like.dtype)
    mean, variance = moments.mean.to(like), moments.variance.to(like)
    norm.running_mean, norm.running_var = mean, variance
    with torch.no_grad():
        norm.bias.copy_(mean)
        norm.weight.copy_((variance.to(wide(like.dtype)) + norm.eps).sqrt())
    return norm
