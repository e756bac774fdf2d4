"""What one call of ``stacked_binary_conv2d`` is, in shapes and flags: the language of choice, logs, cases and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import dtype_name


@dataclass(frozen=True)
class StackedBinaryConv2dProblem:
    """Shapes and flags of a call; symbols as in docs/notation.md.

    Attributes:
        n: filters of the bank.
        splits: channel parts of a group, each filled with a filter of the bank.
        mode: what enters the sums: ``"real"`` numbers, their ``"signs"``, or ``"codes"``, packed unsigned integers.
        planes: of a packed input; 0 for a real one.
        dtype: of a real input and of the result.
    """

    C: int
    K: int
    n: int
    splits: int
    R: int = 3
    S: int = 3
    N: int = 0
    H: int = 0
    W: int = 0
    stride: Pair = (1, 1)
    padding: Quad = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    mode: str = "real"
    planes: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    scale: bool = False
    bias: bool = False
    activation: str | None = None

    @property
    def output_size(self) -> Pair:
        """(OH, OW)."""
        name = "StackedBinaryConv2dProblem"
        kernel = (self.R, self.S)
        return checks.output_size(name, (self.H, self.W), kernel, self.stride, self.padding, self.dilation)

    @property
    def low(self) -> int:
        """Channels of one bank filter, C/(G·splits)."""
        return self.C // self.groups // self.splits

    @property
    def taps(self) -> int:
        """D = (C/G)·R·S, the length of one stacked filter."""
        return self.C // self.groups * self.R * self.S

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """Shapes of bank and index."""
        return (self.n, self.low, self.R, self.S), (self.K, self.splits)

    def adds(self) -> int:
        """Additions of the bank over every split and of the stacking, ``N·OH·OW·(n·C·R·S + K·splits)``."""
        oh, ow = self.output_size
        return self.N * oh * ow * (self.n * self.C * self.R * self.S + self.K * self.splits)

    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense convolution that this call replaces, ``N·OH·OW·K·D``."""
        oh, ow = self.output_size
        return self.N * oh * ow * self.K * self.taps

    def to_json(self) -> dict[str, Any]:
        """All fields but the device, which a file states once, as JSON values."""
        values = {**asdict(self), "dtype": dtype_name(self.dtype)}
        values.pop("device")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        text = f"{self.C}→{self.K} {self.R}×{self.S} bank {self.n} splits {self.splits}"
        if self.H:
            text = f"N{self.N} {text} @{self.H}×{self.W}"
        text += f" {self.mode}{f' of {self.planes} bits' if self.mode == 'codes' else ''}"
        text += f" {dtype_name(self.dtype)} {self.device}"
        if self.channels_last:
            text += " channels_last"
        if self.stride != (1, 1):
            text += f" stride {self.stride[0]},{self.stride[1]}"
        if any(self.padding):
            text += f" padding {','.join(map(str, self.padding))}"
        if self.dilation != (1, 1):
            text += f" dilation {self.dilation[0]},{self.dilation[1]}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        flags = [name for name in ("scale", "bias") if getattr(self, name)]
        return " ".join([text, *flags, *([self.activation] if self.activation else [])])
