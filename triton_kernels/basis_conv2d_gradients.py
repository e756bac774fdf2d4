"""The gradients of ``basis_conv2d`` on a GPU without cuDNN: the launches of our own kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.reference.basis_conv2d import memory_format, sloped
from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels._common import WIDEST, channels_fastest, vector, wide
from basisconv_kernels.triton_kernels.basis_conv2d import device_of
from basisconv_kernels.triton_kernels.basis_conv2d_backward import (
    basis_conv2d_backward_basis,
    basis_conv2d_backward_coefficients,
    basis_conv2d_backward_input,
    basis_conv2d_backward_maps,
)

WARPS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    activation: str | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, basis weight, coefficients and bias for one group.

    Args:
        output: the op's result; needed with an activation only.
        wanted: which of the four need a gradient.
    """
    call = _Call(grad_output, output, input, basis_weight, coefficients, stride, padding, dilation, activation)
    d_coefficients, d_bias = call.coefficients_and_bias(wanted[2], wanted[3])
    if not (wanted[0] or wanted[1]):
        return None, None, d_coefficients, d_bias
    maps = call.maps()
    d_input = call.input_gradient(maps) if wanted[0] else None
    d_basis = call.basis_gradient(maps) if wanted[1] else None
    return d_input, d_basis, d_coefficients, d_bias


class _Call:
    """The tensors of one backward, laid out for the kernels, and the sizes that all of them take."""

    def __init__(
        self, gradient: Tensor, output: Tensor | None, input: Tensor, basis: Tensor, coefficients: Tensor,
        stride: Pair, padding: Quad, dilation: Pair, activation: str | None,
    ) -> None:  # fmt: skip
        self.gradient, self.output, self.given = gradient, output, input
        self.input, self.basis, self.coefficients = channels_fastest(input), channels_fastest(basis), coefficients
        self.stride, self.padding, self.dilation, self.activation = stride, padding, dilation, activation
        self.N, self.C, self.H, self.W = input.shape
        self.Q, _, self.R, self.S = basis.shape
        self.K = coefficients.shape[0]
        self.OH, self.OW = gradient.shape[2:]
        self.pixels = self.N * self.OH * self.OW
        self.arithmetic = configs.arithmetic_of(input.dtype, False)
        self.precision = configs.input_precision(self.arithmetic)
        self.device = device_of(input.device.index)
        self.blocks = configs.GRADIENTS[self.arithmetic]
        self.geometry = (self.R, self.S, *stride, padding[0], padding[2], *dilation)
        input_n, _, input_y, input_x = self.input.stride()
        basis_q, _, basis_r, basis_s = self.basis.stride()
        self.input_strides, self.basis_strides = (input_n, input_y, input_x), (basis_q, basis_r, basis_s)
        # dZ and d input are dense, whatever the strides of what they belong to.
        self.wide = wide(max(self.pixels * self.Q, input.numel()), gradient, output, self.input)
        # Where no activation is, ``output`` is not read: any strides do.
        self.upstream = (*gradient.stride(), *(gradient if output is None else output).stride())

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.given.device)

    @staticmethod
    def multiples(*sizes: int) -> bool:
        """Whether a thread may load several elements of rows of these sizes at once."""
        return all(size % configs.SMALLEST == 0 for size in sizes)

    def coefficients_and_bias(self, coefficients: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """Both in one pass over the gradient; where the coefficients need none, PyTorch adds up the bias."""
        if not coefficients or not self.pixels:
            d_mix = torch.zeros_like(self.coefficients, memory_format=torch.contiguous_format) if coefficients else None
            return d_mix, (sloped(self.gradient, self.output, self.activation).sum((0, 2, 3)) if bias else None)
        BM, most_Q, most = self.blocks
        VECTOR = min(vector(self.input, *self.input_strides), vector(self.basis, *self.basis_strides))
        aligned = VECTOR * self.given.element_size() == WIDEST and self.multiples(self.C, self.K)
        BQ = min(most_Q, configs.power_of_two(self.Q))
        BK, BL = (configs.gradient_block(most, size, aligned) for size in (self.C, self.K))
        blocks = -(-self.K // BL) * -(-self.Q // BQ)
        parts, tiles = configs.splits(blocks, -(-self.pixels // BM), self.device)
        mix_parts = self.new(parts, self.K, self.Q)
        bias_parts = self.new(parts, self.K) if bias else None
        basis_conv2d_backward_coefficients[(parts * blocks,)](
            self.gradient, self.output, self.input, self.basis, mix_parts, bias_parts,
            self.pixels, self.C, self.Q, self.K, self.H, self.W, self.OH, self.OW, *self.geometry, *self.upstream,
            *self.input_strides, *self.basis_strides, tiles,
            BM=BM, BQ=BQ, BK=BK, BL=BL, VECTOR=VECTOR,
            ACTIVATION=self.activation, PRECISION=self.precision, WIDE=self.wide, **WARPS,
        )  # fmt: skip
        dtype = self.given.dtype
        return mix_parts.sum(0).to(dtype), None if bias_parts is None else bias_parts.sum(0).to(dtype)

    def maps(self) -> Tensor:
        """The gradient dZ [N, Q, OH, OW] in channels_last memory."""
        dense = self.new(self.N, self.OH, self.OW, self.Q, dtype=self.given.dtype)
        if self.pixels:
            BM, most_Q, most = self.blocks
            BQ = min(most_Q, configs.power_of_two(self.Q))
            basis_conv2d_backward_maps[(-(-self.pixels // BM) * -(-self.Q // BQ),)](
                self.gradient, self.output, self.coefficients, dense, self.pixels, self.Q, self.K, self.OH, self.OW,
                *self.upstream, *self.coefficients.stride(),
                BM=BM, BQ=BQ, BL=min(most, configs.power_of_two(self.K)),
                ACTIVATION=self.activation, PRECISION=self.precision, WIDE=self.wide, **WARPS,
            )  # fmt: skip
        return dense.permute(0, 3, 1, 2)

    def input_gradient(self, maps: Tensor) -> Tensor:
        """Convᵀ(dZ, basis), in the memory format of the input."""
        d_input = torch.empty(
            self.given.shape, dtype=maps.dtype, device=maps.device, memory_format=memory_format(self.given)
        )
        pixels = self.N * self.H * self.W
        if not pixels:
            return d_input
        BM, most_Q, most_C = self.blocks
        BC = min(most_C, configs.power_of_two(self.C))
        BQ = configs.gradient_block(most_Q, self.Q, self.multiples(self.Q, self.C))
        basis_conv2d_backward_input[(-(-pixels // BM) * -(-self.C // BC),)](
            maps, self.basis, d_input, pixels, self.C, self.Q, self.H, self.W, self.OH, self.OW, *self.geometry,
            *self.basis_strides, *d_input.stride(),
            BM=BM, BQ=BQ, BC=BC, PRECISION=self.precision, WIDE=self.wide, **WARPS,
        )  # fmt: skip
        return d_input

    def basis_gradient(self, maps: Tensor) -> Tensor:
        """Wgrad(input, dZ) [Q, C, R, S]."""
        shape = (self.Q, self.R, self.S, self.C)
        if not self.pixels:
            return torch.zeros(shape, dtype=maps.dtype, device=maps.device).permute(0, 3, 1, 2)
        BM, most_Q, most_C = self.blocks
        BQ, BC = min(most_Q, configs.power_of_two(self.Q)), min(most_C, configs.power_of_two(self.C))
        blocks = self.R * self.S * -(-self.Q // BQ) * -(-self.C // BC)
        parts, tiles = configs.splits(blocks, -(-self.pixels // BM), self.device)
        sums = self.new(parts, *shape)
        basis_conv2d_backward_basis[(parts * blocks,)](
            maps, self.input, sums, self.pixels, self.C, self.Q, self.H, self.W, self.OH, self.OW, *self.geometry,
            *self.input_strides, tiles,
            BM=BM, BQ=BQ, BC=BC, VECTOR=vector(self.input, *self.input_strides),
            PRECISION=self.precision, WIDE=self.wide, **WARPS,
        )  # fmt: skip
        return sums.sum(0).to(maps.dtype).permute(0, 3, 1, 2)
