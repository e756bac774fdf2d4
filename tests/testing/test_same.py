"""The comparison of layers and networks: what it lets pass, what it refuses, and what it says."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.testing import Mismatch, tolerances

CHECKS = {
    "layer": (testing.check_same_layer, tolerances.SAME_LAYER),
    "network": (testing.check_same_network, tolerances.SAME_NETWORK),
}
checks = pytest.mark.parametrize(("check", "shares"), CHECKS.values(), ids=CHECKS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


@dtypes
@checks
def test_the_share_is_of_the_largest_number(check, shares, dtype):
    expected = torch.tensor([1.0, -8.0, 0.0], dtype=torch.float64)
    for factor in (0.4, 1.6):
        got = (expected + torch.tensor([0.0, 0.0, factor * 8 * shares[dtype]])).to(dtype)
        if factor < 1:
            check(got, expected)
        else:
            with pytest.raises(Mismatch, match=r"first mismatch at \[2\]: got .*, expected 0 ± .*; 1 of 3 are wrong"):
                check(got, expected)


@checks
def test_what_is_no_number_or_has_another_shape_is_refused(check, shares):
    expected = torch.ones(2, 3)
    for wrong in (torch.nan, torch.inf):
        got = expected.clone()
        got[1, 2] = wrong
        with pytest.raises(Mismatch, match=r"first mismatch at \[1, 2\]"):
            check(got, expected)
    with pytest.raises(Mismatch, match=r"shape \[2, 2\] where \[2, 3\] was expected"):
        check(expected[:, :2], expected)
    with pytest.raises(Mismatch):
        check(torch.zeros(2, 3), torch.full((2, 3), torch.nan))
    check(expected[:0], expected[:0])


def test_a_network_may_lose_more_than_a_layer():
    for dtype in testing.DTYPES:
        assert tolerances.SAME_LAYER[dtype] <= tolerances.SAME_NETWORK[dtype] < 1
