"""The work model against counts made in another way: loops, PyTorch's own counter, and real tensors."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness.payload import layer_forms
from bench.harness.work import Stage, Work, im2col_bytes, linear_work, work

PROBLEMS = {
    "odd": Conv2dProblem(N=2, C=5, H=9, W=11, Q=7, K=13, padding=(1, 1, 1, 1), bias=True),
    "strided": Conv2dProblem(
        N=3, C=4, H=10, W=7, Q=3, K=6, R=2, S=3, stride=(2, 1), padding=(1, 1, 0, 0), dilation=(1, 2), bias=True
    ),
    "half": Conv2dProblem(N=1, C=8, H=6, W=5, Q=4, K=9, padding=(1, 1, 1, 1), bias=True, dtype=torch.bfloat16),
}


def looped_macs(p: Conv2dProblem, filters: int, taps: int) -> int:
    """Multiply-accumulates of a stage, one by one."""
    oh, ow = p.output_size
    return sum(1 for _ in product(range(p.N), range(oh), range(ow), range(filters), range(taps)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_operations_agree_with_loops(name: str) -> None:
    p = PROBLEMS[name]
    taps = p.C * p.R * p.S
    assert work(p, "dense").flops == 2 * looped_macs(p, p.K, taps)
    both = 2 * (looped_macs(p, p.Q, taps) + looped_macs(p, p.K, p.Q))
    assert work(p, "two_step").flops == both
    assert work(p, "fused").flops == both


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("form", ["dense", "two_step"])
def test_operations_agree_with_pytorch(name: str, form: str) -> None:
    x, forms = layer_forms(PROBLEMS[name], torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forms[form](x)
    assert work(PROBLEMS[name], form).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", PROBLEMS)
def test_bytes_agree_with_tensors(name: str) -> None:
    x, forms = layer_forms(PROBLEMS[name], torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = forms["two_step"][0](x)
        out = forms["two_step"](x)
    weights = {form: sum(p.nbytes for p in module.parameters()) for form, module in forms.items()}
    assert work(PROBLEMS[name], "dense").bytes == x.nbytes + weights["dense"] + out.nbytes
    assert work(PROBLEMS[name], "two_step").bytes == x.nbytes + weights["two_step"] + 2 * maps.nbytes + out.nbytes
    assert work(PROBLEMS[name], "fused").bytes == x.nbytes + weights["fused"] + out.nbytes


def test_im2col_is_what_unfold_makes() -> None:
    p = PROBLEMS["odd"]
    columns = torch.nn.functional.unfold(torch.zeros(p.N, p.C, p.H, p.W), (p.R, p.S), padding=1)
    assert im2col_bytes(p) == columns.nbytes


def test_linear() -> None:
    layer = torch.nn.Linear(7, 5)
    x = torch.zeros(3, 7)
    found = linear_work(3, 7, 5)
    assert found.flops == 2 * 3 * 7 * 5
    assert found.bytes == x.nbytes + sum(p.nbytes for p in layer.parameters()) + layer(x).nbytes


def test_roofline_adds_kernels_and_overlaps_inside_one() -> None:
    computing, moving = Stage(flops=100, bytes=1), Stage(flops=1, bytes=100)
    assert computing.seconds(10.0, 10.0) == 10.0
    assert moving.seconds(10.0, 10.0) == 10.0
    assert Work((computing, moving)).seconds(10.0, 10.0) == 20.0
    assert Work((Stage(101, 101),)).seconds(10.0, 10.0) == pytest.approx(10.1)
