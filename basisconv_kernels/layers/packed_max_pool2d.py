"""``PackedMaxPool2d``: max-pooling between two binary layers, on packed signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core.checks import Pair
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.ops.bitpack_pool import falling_words, packed_max_pool2d, window

NAME = "PackedMaxPool2d"


class PackedMaxPool2d(nn.Module):
    """``packed_max_pool2d`` as a module, in the place of a ``torch.nn.MaxPool2d``; ``pack_activations`` makes it.

    Args:
        channels (int): C.
        kernel_size, stride, padding, dilation: as in ``MaxPool2d``.
        falling (Tensor[C] of bool, optional): channels whose following sign falls as the number grows.

    State (keys of the state_dict):
        ``falling`` (int32 [⌈C/32⌉]): a buffer, one bit a channel.

    Example:
        >>> import torch
        >>> from basisconv_kernels import PackedMaxPool2d, bitpack
        >>> PackedMaxPool2d(40, 2)(bitpack(torch.randn(1, 40, 8, 8))).shape
        (1, 40, 4, 4)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        falling: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.kernel_size, self.stride, self.padding, self.dilation = window(kernel_size, stride, padding, dilation)
        words = falling_words(torch.zeros(channels, dtype=torch.bool) if falling is None else falling, channels)
        self.falling: Tensor
        self.register_buffer("falling", words)

    @classmethod
    def from_pool(cls, pool: nn.MaxPool2d, falling: Tensor) -> PackedMaxPool2d:
        """The same window; ``falling`` as in the constructor."""
        sizes: Any = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        return cls(
            len(falling), sizes[0], stride=sizes[1], padding=sizes[2], dilation=sizes[3], falling=falling
        ).train(pool.training)  # fmt: skip

    def forward(self, input: PackedTensor) -> PackedTensor:
        """Pool signs [N, C, H, W]."""
        return packed_max_pool2d(
            input, self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation,
            falling=self.falling,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}"
        )


def pool_refusal(module: nn.Module) -> str | None:
    """Why a module cannot pool packed signs, in words; None when it can."""
    if type(module) is not nn.MaxPool2d:
        return f"is a {type(module).__name__}, not a MaxPool2d"
    if module.ceil_mode:
        return "pools with ceil_mode=True"
    return "returns indices" if module.return_indices else None
