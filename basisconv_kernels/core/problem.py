"""What one convolution call is, in shapes and flags: the language of choice, logs, test cases and benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad

# What the choice of a backend does not see: batch and map change from call to call, the others cost next to nothing.
OPEN = ("N", "H", "W", "bias", "residual", "activation")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Conv2dProblem:
    """Shapes and flags of a call of ``basis_conv2d``; sizes in elements, symbols as in docs/notation.md.

    ``compact`` says that the coefficients are [K, Q/G], block-diagonal over the groups, instead of [K, Q].
    ``N = H = W = 0`` leaves batch and map open: what a choice that must hold for every size sees.
    """

    C: int
    Q: int
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
    compact: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    precise: bool = False

    @property
    def output_size(self) -> Pair:
        """(OH, OW)."""
        return checks.output_size(
            "Conv2dProblem", (self.H, self.W), (self.R, self.S), self.stride, self.padding, self.dilation
        )

    @property
    def taps(self) -> int:
        """D = (C/G)·R·S, the length of one basis filter."""
        return self.C // self.groups * self.R * self.S

    @property
    def mixed(self) -> int:
        """How many basis maps one output reads: Q, or Q/G with compact coefficients."""
        return self.Q // self.groups if self.compact else self.Q

    def macs(self) -> int:
        """Multiply-accumulates of the two stages, ``N·OH·OW·(Q·D + K·mixed)``."""
        oh, ow = self.output_size
        return self.N * oh * ow * (self.Q * self.taps + self.K * self.mixed)

    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense convolution that this call replaces, ``N·OH·OW·K·D``."""
        oh, ow = self.output_size
        return self.N * oh * ow * self.K * self.taps

    def weights(self) -> int:
        """Numbers in the weights of the stages, Q·D + K·mixed."""
        return self.Q * self.taps + self.K * self.mixed

    def dense_weights(self) -> int:
        """Numbers in the weights of the dense convolution, K·D."""
        return self.K * self.taps

    def to_json(self) -> dict[str, Any]:
        """All fields but the device, which a file states once, as JSON values."""
        values = {**asdict(self), "dtype": dtype_name(self.dtype)}
        values.pop("device")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        text = f"{self.C}→{self.Q}→{self.K} {self.R}×{self.S}"
        if self.H:
            text = f"N{self.N} {text} @{self.H}×{self.W}"
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
            text += f" groups {self.groups}{' compact' if self.compact else ''}"
        flags = [name for name in ("bias", "residual", "precise") if getattr(self, name)]
        if self.activation:
            flags.append(self.activation)
        return " ".join([text, *flags])


@dataclass(frozen=True)
class TuckerConv2dProblem(Conv2dProblem):
    """Shapes and flags of a call of ``tucker_conv2d``: Q is ``rank_out``, and ``rank_in`` channels reach the core.

    One channel group, no compact coefficients.
    """

    rank_in: int = 1

    @property
    def taps(self) -> int:
        """rank_in·R·S, the length of one filter of the core."""
        return self.rank_in * self.R * self.S

    def macs(self) -> int:
        """``N·(H·W·C·rank_in + OH·OW·(Q·rank_in·R·S + K·Q))``: the first 1×1 runs on all pixels of the input."""
        return self.N * self.H * self.W * self.C * self.rank_in + super().macs()

    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense convolution that this call replaces, ``N·OH·OW·K·C·R·S``."""
        oh, ow = self.output_size
        return self.N * oh * ow * self.dense_weights()

    def weights(self) -> int:
        """Numbers in the weights of the three stages."""
        return self.C * self.rank_in + super().weights()

    def dense_weights(self) -> int:
        """Numbers in the weights of the dense convolution, K·C·R·S."""
        return self.K * self.C * self.R * self.S

    def __str__(self) -> str:
        return super().__str__().replace(f"{self.C}→{self.Q}→", f"{self.C}→{self.rank_in}→{self.Q}→", 1)
