"""The description of a call: sizes, work, and the text that logs and ids show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import testing
from basisconv_kernels.core.problem import Conv2dProblem


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_work_is_what_pytorch_counts(case):
    p = case.problem
    inputs = testing.make_inputs(case)
    with FlopCounterMode(display=False) as counter:
        out = testing.plain(case, inputs.tensors)
    assert tuple(out.shape[2:]) == p.output_size
    assert counter.get_total_flops() == 2 * p.macs()
    top, bottom, left, right = p.padding
    with FlopCounterMode(display=False) as counter:
        padded = F.pad(inputs.input, (left, right, top, bottom))
        dense = torch.zeros(p.K, p.C // p.groups, p.R, p.S)
        if p.K % p.groups == 0:
            F.conv2d(padded, dense, None, p.stride, 0, p.dilation, p.groups)
            assert counter.get_total_flops() == 2 * p.dense_macs()


def test_text():
    p = Conv2dProblem(C=64, Q=16, K=128)
    assert str(p) == "64→16→128 3×3 float32 cpu"
    p = dataclasses.replace(p, N=2, H=14, W=7, dtype=torch.bfloat16, channels_last=True, padding=(1, 1, 0, 2))
    assert str(p) == "N2 64→16→128 3×3 @14×7 bfloat16 cpu channels_last padding 1,1,0,2"
    p = Conv2dProblem(
        C=64, Q=16, K=128, R=1, S=5, stride=(2, 1), dilation=(1, 3), groups=4, compact=True,
        bias=True, residual=True, precise=True, activation="relu", device="cuda",
    )  # fmt: skip
    assert str(p) == ("64→16→128 1×5 float32 cuda stride 2,1 dilation 1,3 groups 4 compact bias residual precise relu")


def test_different_cases_have_different_texts():
    assert len({str(case) for case in testing.CASES}) == len(testing.CASES)


def test_a_problem_is_a_key():
    assert len({Conv2dProblem(C=1, Q=1, K=1), Conv2dProblem(C=1, Q=1, K=1), Conv2dProblem(C=1, Q=1, K=2)}) == 2
