"""The correctness gate: an engine's results against float64, before any time is taken. No number of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basisconv_kernels.testing import tolerances
from bench.harness.answers import Answers


class WrongResultError(ValueError):
    """Results that are not within the tolerance; ``found`` holds the measured errors."""

    def __init__(self, message: str, found: dict[str, Any]) -> None:
        super().__init__(message)
        self.found = found


def check(results: Sequence[Tensor], answers: Answers, dtype: torch.dtype, judged: bool) -> dict[str, Any]:
    """Compare results with the answers by the rules of ``testing/tolerances.py``.

    Rule 1, a bound on every element, where the answers carry one. Rule 2, the largest error beside that of plain
    PyTorch, for whoever is judged. Others need not keep it, so that a rival that merely sums in another order is not
    thrown out of the race: where there is no rule 1 they may be off by what one network computed in two ways may be.

    Args:
        results: what the engine computed, float32, one tensor an answer.
        answers: what is right and what is allowed.
        dtype: in which the engine was asked to compute.
        judged: whether this is a fused kernel, or a network of them without a compiler, which must keep both rules.

    Returns:
        ``worst`` (largest error over what is allowed, at most 1), ``largest`` (error) and ``plain`` (error of plain
        PyTorch) of the worst tensor.

    Raises:
        WrongResultError: a count or shape that differs, a value that is not finite, an error above the tolerance.
    """
    if len(results) != len(answers.exact):
        raise WrongResultError(f"gave {len(results)} results instead of {len(answers.exact)}", {})
    found: dict[str, Any] = {"worst": 0.0, "largest": 0.0, "plain": 0.0}
    compared = zip(results, answers.exact, answers.plain_error, answers.scale, strict=True)
    for number, (result, exact, beside, scale) in enumerate(compared):
        what = "the result" if number == 0 else f"gradient {number}"
        if result.numel() != exact.numel():
            raise WrongResultError(f"{what} has shape {list(result.shape)} instead of {list(exact.shape)}", {})
        error = (result.reshape(exact.shape).double() - exact).abs()
        if not bool(torch.isfinite(error).all()):
            raise WrongResultError(f"{what} is not finite in {int((~torch.isfinite(error)).sum())} elements", {})
        largest = error.max().item()
        share = 0.0
        if number == 0 and answers.allowed is not None:
            share = (error / answers.allowed).max().item()
        if judged or answers.allowed is None:
            limit = tolerances.worst_beside_plain(beside, scale, dtype)
            if not judged:
                limit = max(limit, tolerances.SAME_NETWORK[dtype] * exact.abs().max().item())
            share = max(share, _share(largest, limit))
        if share >= found["worst"]:
            found = {"worst": share, "largest": largest, "plain": beside}
    if found["worst"] > 1:
        raise WrongResultError(
            f"largest error {found['largest']:.3g} (plain PyTorch {found['plain']:.3g}) is "
            f"{found['worst']:.3g} times what is allowed",
            found,
        )
    return found


def _share(error: float, allowed: float) -> float:
    if allowed > 0:
        return error / allowed
    return 0.0 if error == 0 else math.inf


def load(paths: Sequence[str]) -> list[Tensor]:
    """The results that a worker wrote."""
    return [torch.from_numpy(np.load(Path(path))) for path in paths]
