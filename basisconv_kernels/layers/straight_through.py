"""Discrete values of real latents, with straight-through gradients: signs, and one-hot choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.estimators import estimated, signs
from basisconv_kernels.core.layout import cast


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(latent: Tensor, estimator: str) -> Tensor:
        return cast(signs(latent), latent.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.estimator = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (latent,) = ctx.saved_tensors
        return estimated(gradient, latent, ctx.estimator), None


class _OneHot(torch.autograd.Function):
    @staticmethod
    def forward(latent: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(latent.argmax(-1), latent.shape[-1]).to(latent.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def sign(latent: Tensor, estimator: str) -> Tensor:
    """±1 (+1 for 0, −1 for NaN), whose gradient reaches the latent times the slope of the estimator."""
    return _Sign.apply(latent, estimator)


def one_hot(latent: Tensor) -> Tensor:
    """1 at the largest value of the last dimension (ties: the lowest), else 0; the gradient passes as it is."""
    return _OneHot.apply(latent)
