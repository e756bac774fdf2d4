"""Signs, and straight-through estimators: what stands in for the derivative of sign. Shared by all binary ops."""

from __future__ import annotations

import torch
from torch import Tensor

from basisconv_kernels.core.layout import cast

ESTIMATORS = ("identity", "clip", "approx_sign", "swish_sign")
SWISH_BETA = 5.0


def signs(values: Tensor) -> Tensor:
    """+1 where ``values >= 0``, which −0 is, else −1, NaN included; float32, or float64 for float64."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return cast(torch.where(values >= 0, 1.0, -1.0), dtype)


def slope(values: Tensor, estimator: str) -> Tensor | None:
    """What a straight-through estimator puts in the place of the derivative of sign; None for 1.

    ::

        identity      1
        clip          1 where |x| <= 1, else 0
        approx_sign   2 − 2|x| where |x| <= 1, else 0                    the derivative of a parabola on either side
        swish_sign    β(2 − βx·tanh(βx/2)) / (1 + cosh(βx)), β = 5       the derivative of 2σ(βx)(1 + βx(1 − σ(βx))) − 1
    """
    if estimator == "identity":
        return None
    if estimator == "clip":
        return (values.abs() <= 1).to(values.dtype)
    if estimator == "approx_sign":
        return (2 - 2 * values.abs()).clamp(min=0)
    wide = values.double() if values.dtype == torch.float64 else values.float()
    x = (SWISH_BETA * wide).clamp(-60, 60)  # cosh of more overflows float32; the slope is zero there in any case
    return (SWISH_BETA * (2 - x * torch.tanh(x / 2)) / (1 + torch.cosh(x))).to(values.dtype)


def estimated(gradient: Tensor, values: Tensor, estimator: str) -> Tensor:
    """The gradient with respect to the sign, passed on to the values."""
    factor = slope(values.to(gradient.dtype), estimator)
    return (gradient if factor is None else gradient * factor).to(values.dtype)
