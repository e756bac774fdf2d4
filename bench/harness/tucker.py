"""Cases of ``tucker_conv2d``: their forms, what is right, and their work; ``two_step`` is three convolutions here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from basisconv_kernels import TuckerConv2d
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.testing import tucker_conv2d_bounds
from basisconv_kernels.testing.tolerances import Bound
from bench.harness.case import Form
from bench.harness.work import Stage, Work


def layer_forms(p: TuckerConv2dProblem, generator: torch.Generator) -> tuple[Tensor, dict[Form, nn.Module]]:
    """Random input and weights of unit scale, as the three forms with equal results up to rounding."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(p.dtype)

    x = normal(p.N, p.C, p.H, p.W)
    u_in, u_out = normal(p.C, p.rank_in, scale=p.C**-0.5), normal(p.K, p.Q, scale=p.Q**-0.5)
    core, bias = normal(p.Q, p.rank_in, p.R, p.S, scale=p.taps**-0.5), normal(p.K)
    padding = (p.padding[0], p.padding[2])
    fused = TuckerConv2d(
        p.C, p.K, (p.R, p.S), rank_in=p.rank_in, rank_out=p.Q, stride=p.stride, padding=padding, dilation=p.dilation,
        activation=p.activation, dtype=p.dtype,
    )  # fmt: skip
    weights = {"u_in": u_in, "core": core, "u_out": u_out, "bias": bias}
    fused.load_state_dict(weights)

    def conv(weight: Tensor, with_bias: bool = False) -> nn.Conv2d:
        outputs, inputs, R, S = weight.shape
        geometry = (p.stride, padding, p.dilation) if (R, S) == (p.R, p.S) and weight is core else (1, 0, 1)
        made = nn.Conv2d(inputs, outputs, (R, S), *geometry, bias=with_bias, dtype=p.dtype)
        made.weight.data.copy_(weight)
        if with_bias:
            made.bias.data.copy_(bias)  # type: ignore[union-attr]
        return made

    wide = torch.einsum("ko,oirs,ci->kcrs", u_out.double(), core.double(), u_in.double())
    dense = nn.Conv2d(p.C, p.K, (p.R, p.S), p.stride, padding, p.dilation, dtype=p.dtype)
    dense.weight.data.copy_(wide)
    dense.bias.data.copy_(bias)  # type: ignore[union-attr]
    steps = [conv(u_in.t()[:, :, None, None]), conv(core), conv(u_out[:, :, None, None], True)]
    return x, {"fused": fused, "two_step": nn.Sequential(*steps), "dense": dense}


def bound(module: nn.Sequential, p: TuckerConv2dProblem, x: Tensor) -> Bound:
    """Rule 1 for the three convolutions."""
    first, core, last = (part.weight.detach() for part in module)  # type: ignore[union-attr]
    weights = (first[:, :, 0, 0].t(), core, last[:, :, 0, 0])  # type: ignore[index]
    return tucker_conv2d_bounds.forward_bound(p, x, *weights, module[2].bias.detach(), None)  # type: ignore[arg-type,union-attr]


def work(p: TuckerConv2dProblem, form: Form) -> Work:
    """Work of one forward call.

    ::

        dense     N·OH·OW·K·C·R·S multiply-accumulates;   input, W, output
        two_step  the three stages, one after the other;  M and Z written and read
        fused     the same operations in two kernels;     M is written and read, Z is never moved
    """
    item = p.dtype.itemsize
    OH, OW = p.output_size
    inside, outside = p.N * p.H * p.W, p.N * OH * OW
    input, output, reduced, maps = inside * p.C, outside * p.K, inside * p.rank_in, outside * p.Q
    biases = p.K if p.bias else 0
    factors = (p.C * p.rank_in, p.Q * p.taps, p.K * p.Q)
    first = Stage(2 * inside * factors[0], item * (input + factors[0] + reduced))
    if form == "dense":
        return Work((Stage(2 * outside * p.dense_weights(), item * (input + p.dense_weights() + biases + output)),))
    if form == "two_step":
        second = Stage(2 * outside * factors[1], item * (reduced + factors[1] + maps))
        third = Stage(2 * outside * factors[2], item * (maps + factors[2] + biases + output))
        return Work((first, second, third))
    rest = item * (reduced + factors[1] + factors[2] + biases + output)
    return Work((first, Stage(2 * outside * (factors[1] + factors[2]), rest)))
