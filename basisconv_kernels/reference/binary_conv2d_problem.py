"""What one call of ``binary_conv2d`` is, in shapes and flags: the language of choice, logs, cases and benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import dtype_name


@dataclass(frozen=True)
class BinaryConv2dProblem:
    """Shapes and flags of a call; symbols as in docs/notation.md.

    Attributes:
        planes: of a packed input; 0 for a real one, whose sign is taken inside.
        unsigned: whether the planes of a packed input are codes instead of signs.
        dtype: of a real input, and of a float result.
        output: ``"float"``, ``"int32"`` or ``"packed"``.
    """

    C: int
    K: int
    R: int = 3
    S: int = 3
    N: int = 0
    H: int = 0
    W: int = 0
    stride: Pair = (1, 1)
    padding: Quad = (0, 0, 0, 0)
    padding_value: int = 0
    dilation: Pair = (1, 1)
    groups: int = 1
    planes: int = 0
    unsigned: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    activation: str | None = None
    output: str = "float"

    @property
    def output_size(self) -> Pair:
        """(OH, OW)."""
        return checks.output_size(
            "BinaryConv2dProblem", (self.H, self.W), (self.R, self.S), self.stride, self.padding, self.dilation
        )

    @property
    def taps(self) -> int:
        """D = (C/G)·R·S, the length of one filter."""
        return self.C // self.groups * self.R * self.S

    def macs(self) -> int:
        """Multiply-accumulates of the convolution, taps outside the image included: ``N·OH·OW·K·D``, once a plane."""
        oh, ow = self.output_size
        return max(1, self.planes) * self.N * oh * ow * self.K * self.taps

    def to_json(self) -> dict[str, Any]:
        """All fields but the device, which a file states once, as JSON values."""
        values = {**asdict(self), "dtype": dtype_name(self.dtype)}
        values.pop("device")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        kind = f"{self.planes}-bit codes" if self.unsigned else "packed signs" if self.planes else "signs"
        text = f"{self.C}→{self.K} {self.R}×{self.S}"
        if self.H:
            text = f"N{self.N} {text} @{self.H}×{self.W}"
        text += f" {kind} {dtype_name(self.dtype)} → {self.output} {self.device}"
        if self.channels_last:
            text += " channels_last"
        if self.stride != (1, 1):
            text += f" stride {self.stride[0]},{self.stride[1]}"
        if any(self.padding):
            text += f" padding {','.join(map(str, self.padding))} with {self.padding_value}"
        if self.dilation != (1, 1):
            text += f" dilation {self.dilation[0]},{self.dilation[1]}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        return f"{text} {self.activation}" if self.activation else text
