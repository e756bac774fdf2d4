"""What one call of ``ternary_conv2d`` is, in shapes and flags: the language of choice, logs, cases and benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import dtype_name

SCALES = ("none", "one", "two")


@dataclass(frozen=True)
class TernaryConv2dProblem:
    """Shapes and flags; sizes in elements, symbols as in docs/notation.md.

    ``scales`` says how many numbers scale an output: ``none``; ``one`` (σ); ``two``, of the +1 and of the −1 weights,
    which need an accumulator each. ``N = H = W = 0`` leaves batch and map open.
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
    dilation: Pair = (1, 1)
    groups: int = 1
    scales: str = "one"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    bias: bool = False
    activation: str | None = None

    @property
    def output_size(self) -> Pair:
        """(OH, OW)."""
        return checks.output_size(
            "TernaryConv2dProblem", (self.H, self.W), (self.R, self.S), self.stride, self.padding, self.dilation
        )

    @property
    def taps(self) -> int:
        """D = (C/G)·R·S, the length of one filter."""
        return self.C // self.groups * self.R * self.S

    @property
    def words(self) -> int:
        """32-bit words of one tap of one plane."""
        return -(-(self.C // self.groups) // 32)

    def macs(self) -> int:
        """Multiply-accumulates of the dense convolution of this shape, ``N·OH·OW·K·D``."""
        oh, ow = self.output_size
        return self.N * oh * ow * self.K * self.taps

    def to_json(self) -> dict[str, Any]:
        """All fields but the device, which a file states once, as JSON values."""
        values = {**asdict(self), "dtype": dtype_name(self.dtype)}
        values.pop("device")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        text = f"{self.C}→{self.K} {self.R}×{self.S}"
        if self.H:
            text = f"N{self.N} {text} @{self.H}×{self.W}"
        text += f" {dtype_name(self.dtype)} {self.device} {self.scales} scale{'s' if self.scales == 'two' else ''}"
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
        flags = ["bias"] if self.bias else []
        return " ".join([text, *flags, *([self.activation] if self.activation else [])])
