"""Cases of binary, stacked and ternary convolutions: their numbers, their forms, what is right, and their work.

The dense form holds the same filters as float32, so that all engines compute the same convolution, up to the signs of
the input that the binary ops take. The int8 form is a convolution of the same shape on 8-bit codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.reference.stacked_binary_conv2d import stacked_filters
from bench.harness import answers
from bench.harness.answers import Answers
from bench.harness.case import Case, Form

OPS = ("binary_packed", "binary_float", "stacked", "ternary")
EXACT = 0.5
"""Allowed of whole numbers: any wrong one is off by more."""
STEP, CENTRE = 0.03125, 128
"""Of 8-bit codes of the input."""
WEIGHT_STEP = 1 / 127
SPREADS = 8
"""How many standard deviations of the result 256 codes of the output span."""


class BitLayer(nn.Module):
    """The operands of one call; an engine calls its own op on them, so this module has no forward."""

    weight: Tensor
    bank: Tensor
    index: Tensor
    filters: Tensor

    def __init__(self, op: str, problem: Any, **tensors: Tensor) -> None:
        super().__init__()
        self.op, self.problem = op, problem
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Int8Layer(nn.Module):
    """8-bit codes of weights, and the steps of all three operands; an engine runs them its own way."""

    def __init__(self, codes: Tensor, output_step: float, padding: int) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.output_step, self.padding = output_step, padding


def quantized(x: Tensor) -> Tensor:
    """The uint8 codes of an input."""
    return torch.clamp(torch.round(x / STEP) + CENTRE, 0, 255).to(torch.uint8)


def forms_of(case: Case, generator: torch.Generator) -> tuple[Tensor, dict[Form, nn.Module]]:
    """The input and every form of a case."""
    p: Any = case.problem
    x = torch.randn(p.N, p.C, p.H, p.W, generator=generator)
    layer, filters = _operands(case, generator)
    forms: dict[Form, nn.Module] = {"fused": layer}
    dense = nn.Conv2d(p.C, p.K, (p.R, p.S), p.stride, p.padding[::2], p.dilation, p.groups, bias=False)
    dense.weight.data.copy_(filters)
    forms["dense"] = forms["binary"] = dense
    if "int8" in case.forms:
        codes = torch.where(filters >= 0, 127, -127).to(torch.int8)
        step = SPREADS * float(p.taps) ** 0.5 / 256
        forms["int8"] = Int8Layer(codes, step, p.padding[0])
    return x, forms


def _operands(case: Case, generator: torch.Generator) -> tuple[BitLayer, Tensor]:
    """What our op takes, and the float filters that it stands for."""
    p: Any = case.problem
    if case.op in ("binary_packed", "binary_float"):
        weight = torch.randn(p.K, p.C // p.groups, p.R, p.S, generator=generator)
        return BitLayer(case.op, p, weight=weight), torch.where(weight >= 0, 1.0, -1.0)
    if case.op == "stacked":
        bank = torch.where(torch.rand(p.n, p.low, p.R, p.S, generator=generator) < 0.5, -1.0, 1.0)
        index = torch.randint(p.n, (p.K, p.splits), generator=generator)
        if p.n == p.K and p.splits == 1:
            index = torch.arange(p.K)[:, None]
        return BitLayer(case.op, p, bank=bank, index=index), stacked_filters(bank, index)
    if case.op != "ternary":
        raise ValueError(f"bench: op must be one of {', '.join(OPS)}, got {case.op!r}")
    size = (p.K, p.C // p.groups, p.R, p.S)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    filters = signs * (torch.rand(size, generator=generator) < case.density)
    return BitLayer(case.op, p, filters=filters), filters


def answers_of(case: Case, form: Form, module: nn.Module, dense: nn.Module, x: Tensor) -> Answers:
    """What is right, and what is allowed.

    Binary results are whole numbers and signs, which must be right to the last bit. Others are float32 sums, allowed
    what the dense form is allowed; 8-bit results may be off by a step, for engines round ties and scales differently.
    """
    p: Any = case.problem
    if form == "int8" and isinstance(module, Int8Layer):
        values = (quantized(x).double() - CENTRE) * STEP
        found = F.conv2d(values, module.codes.double() * WEIGHT_STEP, None, p.stride, module.padding)
        step = module.output_step
        found = (torch.round(found / step) + CENTRE).clamp(0, 255).sub(CENTRE) * step
        return Answers([found], [0.0], [1.0], torch.full_like(found, 1.01 * step))
    if form == "binary" or (form == "fused" and case.op.startswith("binary")):
        signs = torch.where(x >= 0, 1.0, -1.0).double()
        filters: Any = dense.weight
        sums = F.conv2d(signs, filters.double(), None, p.stride, p.padding[::2], p.dilation, p.groups)
        if case.op == "binary_packed":
            sums = torch.where(sums >= 0, 1.0, -1.0).double()
        return Answers([sums.detach()], [0.0], [1.0], torch.full_like(sums, EXACT).detach())
    described = Conv2dProblem(
        N=p.N, C=p.C, Q=p.K, K=p.K, R=p.R, S=p.S, H=p.H, W=p.W, stride=p.stride, padding=p.padding,
        dilation=p.dilation, groups=p.groups,
    )  # fmt: skip
    return answers.of(dense, described, x, None)


def work_of(case: Case, form: str) -> dict[str, Any]:
    """Operations of the dense convolution, for every form alike: 2 a pair of operands, those in the padding included.

    Bytes of operands and result as the form holds them; no roofline, which the ceilings of float32 do not give.
    """
    p: Any = case.problem
    OH, OW = p.output_size
    pixels, inputs = p.N * OH * OW, p.N * p.H * p.W * p.C
    weights, outputs = p.K * p.taps, pixels * p.K
    bits: dict[str, tuple[float, float, float]] = {
        "dense": (32, 32, 32), "int8": (8, 8, 8), "binary": (32, 1, 32),
        "binary_packed": (1, 1, 1), "binary_float": (32, 1, 32), "stacked": (32, 1, 32), "ternary": (32, 2, 32),
    }  # fmt: skip
    a, w, y = bits[case.op if form == "fused" else form]
    if case.op == "stacked" and form == "fused":
        weights = p.n * p.low * p.R * p.S + 16 * p.K * p.splits
    return {"flops": 2 * outputs * p.taps, "bytes": int((a * inputs + w * weights + y * outputs) / 8)}
