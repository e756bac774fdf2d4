"""The right answers of a case, and how far an engine may be from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.tolerances import Bound
from bench.harness import tucker


@dataclass
class Answers:
    """Right answers of one form: float64 on the same rounded numbers.

    One tensor, or for a training step the output and then the gradients of the input and of each trained weight.

    Attributes:
        exact: the answers.
        plain_error: largest error of plain PyTorch in the dtype, for each. Its memory formats run different algorithms
            with errors up to three times apart; all are plain PyTorch, so the largest counts.
        scale: of the values that pass through each, for the floor of rule 2.
        allowed: bounds every element of the first answer (rule 1 of ``testing/tolerances.py``); None for networks and
            training steps, where no such bound is known.
    """

    exact: list[Tensor]
    plain_error: list[float]
    scale: list[float]
    allowed: Tensor | None = None


def training_step(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of one step through a plain module."""
    x = x.detach().requires_grad_()
    out = module(x)
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _results(module: nn.Module, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    if grad is not None:
        return training_step(module, x, grad)
    with torch.no_grad():
        return [module(x)]


def _bound(module: nn.Module, problem: Conv2dProblem | None, x: Tensor, exact: Tensor) -> Bound | None:
    """Rule 1 for a layer: two convolutions, one, or a linear layer."""
    if isinstance(module, nn.Linear):
        sums = x.double().abs() @ module.weight.detach().double().abs().T + module.bias.detach().double().abs()
        lost = tolerances.lost_in_sums(x.dtype, module.in_features + tolerances.EXTRA_ADDITIONS)
        rounding = tolerances.UNIT_ROUNDOFF[x.dtype] * exact.abs()
        return Bound(exact, (lost * sums + rounding) * tolerances.SECOND_ORDER, exact.abs())
    if problem is None:
        return None
    if isinstance(module, nn.Sequential) and isinstance(problem, TuckerConv2dProblem):
        return tucker.bound(module, problem, x)
    if isinstance(module, nn.Sequential):
        basis, mixing = module[0], module[1]
        assert isinstance(basis, nn.Conv2d)
        assert isinstance(mixing, nn.Conv2d)
        weights, bias = (basis.weight.detach(), mixing.weight.detach().flatten(1)), mixing.bias
    else:
        assert isinstance(module, nn.Conv2d)
        # A dense convolution is a basis convolution whose basis are its own filters, recombined by the identity.
        weights, bias = (module.weight.detach(), torch.eye(problem.K, dtype=x.dtype)), module.bias
        fields = {name: getattr(problem, name) for name in Conv2dProblem.__dataclass_fields__}
        problem = Conv2dProblem(**{**fields, "Q": problem.K})
    return tolerances.forward_bound(problem, x, *weights, None if bias is None else bias.detach(), None)


def of(module: nn.Module, problem: Conv2dProblem | None, x: Tensor, grad: Tensor | None) -> Answers:
    """Answers of a plain module.

    Args:
        module: dense or two-step form, or a network.
        problem: shapes of a single convolution; None for anything else.
        x: input.
        grad: of the output, for a training step; None for inference.
    """
    exact = _results(copy.deepcopy(module).double(), x.double(), None if grad is None else grad.double())
    plain_error = [0.0] * len(exact)
    for layout in (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,):
        placed = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]
        got = _results(placed, x.contiguous(memory_format=layout), grad)
        errors = [(g.double() - e).abs().max().item() for g, e in zip(got, exact, strict=True)]
        plain_error = [max(pair) for pair in zip(plain_error, errors, strict=True)]
    bound = None if grad is not None else _bound(module, problem, x, exact[0])
    scale = [e.abs().max().item() for e in exact] if bound is None else [bound.partial_sums.max().item()]
    return Answers(exact, plain_error, scale, None if bound is None else bound.allowed)
