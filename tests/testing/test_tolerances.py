"""What the rules allow, apart from any kernel."""

from __future__ import annotations

import functools
from math import sqrt

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d import basis_conv2d
from basisconv_kernels.testing import tolerances


def allowed(errors, partial_sums):
    bound = tolerances.Bound(torch.zeros_like(errors), torch.zeros_like(errors), partial_sums)
    return tolerances.allowed_beside_plain(errors, bound, torch.float32)


def test_outputs_of_padding_alone_change_nothing_of_what_the_others_may_have():
    drawn = torch.Generator().manual_seed(0)
    errors, sums = torch.rand(34, generator=drawn).double() * 1e-8, 1 + torch.rand(34, generator=drawn).double()
    nothing = torch.zeros(102, dtype=torch.float64)
    worst, mean = allowed(errors, sums)
    padded_worst, padded_mean = allowed(torch.cat([errors, nothing]), torch.cat([sums, nothing]))
    assert padded_worst == worst
    assert padded_mean * sqrt(136 / 34) == pytest.approx(mean)  # the same sum of squares


def test_without_any_sum_nothing_is_allowed():
    nothing = torch.zeros(5, dtype=torch.float64)
    assert allowed(nothing, nothing) == (0.0, 0.0)


@pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")
def test_seventeen_outputs_share_the_roundings_of_four_numbers():
    """A drawn geometry of which two pixels in eight read the image: plain PyTorch happens to be nearly exact there."""
    problem = Conv2dProblem(C=3, Q=2, K=17, R=1, S=1, N=1, H=5, W=2, stride=(2, 2), padding=(3, 0, 0, 1))
    case = testing.Case("drawn", "mostly padding", problem, "dense")
    testing.check(case, functools.partial(basis_conv2d, backend="cpu"), seed=4508)
