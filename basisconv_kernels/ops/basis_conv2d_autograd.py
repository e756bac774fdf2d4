"""The autograd Functions of ``basis_conv2d``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.ops.basis_conv2d_backends import Settings, targets_of

OP = "basis_conv2d"


def _without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it changes something: under ``create_graph`` only; 4 us a backward elsewhere."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class BasisConv2dFunction(torch.autograd.Function):
    """``basis_conv2d`` with its explicit gradients; call ``basis_conv2d`` itself, which checks and casts first."""

    @staticmethod
    def forward(
        input: Tensor,
        basis_weight: Tensor,
        coefficients: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
        keep_maps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the backend that ``settings`` names; the second result is Z, kept for d coefficients if ``keep_maps``."""
        run, _ = targets_of(settings.backend)
        return run(input, basis_weight, coefficients, bias, residual, packed, settings, keep_maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """Keep the inputs and Z."""
        input, basis_weight, coefficients = inputs[:3]
        result, maps = output
        if maps is not None:
            ctx.mark_non_differentiable(maps)
        _keep(ctx, input, basis_weight, coefficients, result, maps, inputs[6])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Any, ...]:
        """The formulas of ``reference.basis_conv2d.backward``, by the backend's own kernels where it has some."""
        if grad_output is None:
            return (None,) * 8
        input, basis_weight, coefficients, output, maps = ctx.saved_tensors
        stride, padding, dilation, groups, activation, _, backend = ctx.settings
        with _without_graph():
            gradients = targets_of(backend)[1](
                grad_output,
                output,
                input,
                basis_weight,
                coefficients,
                stride,
                padding,
                dilation,
                groups,
                activation,
                tuple(ctx.needs_input_grad[:5]),
                maps,
            )
        depends_on = (grad_output, input, basis_weight, coefficients)
        return (*refuse_double_backward(OP, depends_on, gradients), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


def _keep(
    ctx: Any,
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    result: Tensor,
    maps: Tensor | None,
    settings: Settings,
) -> None:
    """What the backward needs; the result only where the activation's slope is read off it."""
    ctx.settings = settings
    ctx.set_materialize_grads(False)  # else autograd fills undefined gradients, that of Z every time, with zeros
    ctx.save_for_backward(input, basis_weight, coefficients, result if settings.activation else None, maps)


class BasisConv2dEagerFunction(torch.autograd.Function):
    """``BasisConv2dFunction`` for eager calls: one Python function and one result a call, 7 us less."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """As there, the result alone."""
        input, basis_weight, coefficients, _, _, _, settings, _ = arguments
        result, maps = targets_of(settings.backend)[0](*arguments)
        _keep(ctx, input, basis_weight, coefficients, result, maps, settings)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        """As there."""
        return BasisConv2dFunction.backward(ctx, grad_output, None)


def apply(*arguments: Any) -> Tensor:
    """The result, by an autograd Function; in eager mode without torch's binding of arguments by signature."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return BasisConv2dFunction.apply(*arguments)[0]
    return super(torch.autograd.Function, BasisConv2dEagerFunction).apply(*arguments)
