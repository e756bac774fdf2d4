"""From float weights to −1, 0, +1 and scales, with the gradients of training; for weights [K, …] of any shape.

Three rules. With w the float (shadow) weight:

- ``layerwise``: ``σ·sign(w)`` where a fixed mask is set, else 0; σ is trained. ``dw = g·mask``,
  ``dσ = Σ g·sign(w)·mask``.
- ``twn``: ±1 where ``|w| > Δ``, ``Δ[k] = 0.75·mean|w[k]|``; the scale α[k] is the mean of |w| there, the least-squares
  value. ``dw = g``.
- ``ttq``: ``+Wp`` above Δ, ``−Wn`` below −Δ, ``Δ = 0.05·max|w|``; Wp and Wn are trained. ``dw = g·{Wp, 1, Wn}``,
  ``dWp = Σ₊ g``, ``dWn = −Σ₋ g``.

``sign(0) = +1``. Trained scales count as at least ``LEAST_SCALE``, so that a step never turns all signs around.

Sources: Grimaldi, Tenace, Calimera 2019; TWN, arXiv 1605.04711; TTQ, arXiv 1612.01064.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RULES = ("layerwise", "twn", "ttq")
THRESHOLDS = {"layerwise": 0.0, "twn": 0.75, "ttq": 0.05}  # of mean |w| of a filter (TWN), of max |w| (TTQ)
LEAST_SCALE = 2.0**-24


def codes(weight: Tensor, mask: Tensor | None, rule: str, threshold: float) -> Tensor:
    """−1, 0, +1 in the shape and dtype of the weight."""
    if rule == "layerwise":
        signs = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
        return signs if mask is None else signs * mask
    size = weight.abs()
    if rule == "twn":
        limit = threshold * size.flatten(1).mean(1).reshape(-1, *[1] * (weight.dim() - 1))
    else:
        limit = threshold * size.max()
    return torch.where(size > limit, weight.sign(), torch.zeros_like(weight))


def least_squares_scale(weight: Tensor, ternary: Tensor, *, per_output: bool) -> Tensor:
    """The σ [1] or [K] that brings ``σ·ternary`` closest to the weight: mean |w| where it is not 0; 0 for none.

    Of all σ: the derivative of ``Σ (w − σ·t)²`` vanishes at ``Σ w·t / Σ t²``; t has the sign of w.
    """
    rows = (weight * ternary).flatten(1).sum(1), ternary.abs().flatten(1).sum(1)
    total, count = rows if per_output else (rows[0].sum().reshape(1), rows[1].sum().reshape(1))
    return total / count.clamp(min=1)


def at_least(scale: Tensor) -> Tensor:
    """A trained scale as it counts."""
    return scale.clamp(min=LEAST_SCALE)


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """A scale [1] or [K] beside weights [K, …]."""
    return scale.reshape(-1, *[1] * (like.dim() - 1))


class TernaryWeight(torch.autograd.Function):
    """The dense weight that a ternary layer stands for, in training: straight-through gradients by the rules above."""

    @staticmethod
    def forward(
        weight: Tensor,
        mask: Tensor | None,
        scale: Tensor | None,
        negative_scale: Tensor | None,
        rule: str,
        threshold: float,
    ) -> tuple[Tensor, Tensor]:
        """(the scaled weight, its codes)."""
        ternary = codes(weight, mask, rule, threshold)
        if scale is None:  # TWN
            factor = spread(least_squares_scale(weight, ternary, per_output=True), weight)
            return ternary * factor, ternary
        plus = spread(at_least(scale), weight)
        if negative_scale is None:
            return ternary * plus, ternary
        return torch.where(ternary < 0, ternary * spread(at_least(negative_scale), weight), ternary * plus), ternary

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep codes, mask and scales."""
        _, mask, scale, negative_scale, rule, _ = inputs
        ctx.rule = rule
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], mask, scale, negative_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        """Of weight, scale and negative_scale."""
        ternary, mask, scale, negative_scale = ctx.saved_tensors
        d_weight = g if mask is None else g * mask
        d_scale = d_negative = None
        if negative_scale is not None:  # TTQ
            plus, minus = spread(at_least(scale), g), spread(at_least(negative_scale), g)
            d_weight = torch.where(ternary > 0, g * plus, torch.where(ternary < 0, g * minus, d_weight))
            d_scale = _summed(g * (ternary > 0), scale)
            d_negative = -_summed(g * (ternary < 0), negative_scale)
        elif scale is not None:
            d_scale = _summed(g * ternary, scale)
        return d_weight, None, d_scale, d_negative, None, None


def _summed(products: Tensor, scale: Tensor) -> Tensor:
    """Σ over what a scale [1] or [K] multiplies."""
    rows = products.flatten(1).sum(1)
    return rows if scale.shape[0] == rows.shape[0] else rows.sum().reshape(1)
