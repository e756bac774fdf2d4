"""The suite of ``tucker_conv2d``: its forms agree, its work is what loops and PyTorch count, and a case runs whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels.core.problem import TuckerConv2dProblem
from bench import suites
from bench.harness import payload, tucker
from bench.harness.case import Case

PROBLEM = TuckerConv2dProblem(
    N=2, C=6, H=9, W=8, rank_in=3, Q=4, K=7, stride=(2, 1), padding=(1, 1, 2, 2), channels_last=True, bias=True
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forms_agree_within_what_the_gate_allows(tmp_path, dtype):
    made = payload.build(Case("small", "layer", replace(PROBLEM, dtype=dtype)), tmp_path)
    x = torch.load(tmp_path / "input.pt")
    for form in ("fused", "two_step", "dense"):
        with torch.no_grad():
            out = torch.load(tmp_path / f"{form}.pt", weights_only=False)(x)
        exact, allowed = made.answers[form].exact[0], made.answers[form].allowed
        assert ((out.double() - exact).abs() <= allowed).all(), form
        assert ((out.double() * 1.1 - exact).abs() > allowed).any(), form


@pytest.mark.parametrize("form", ["two_step", "dense"])
def test_operations_agree_with_pytorch(form):
    x, forms = tucker.layer_forms(PROBLEM, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forms[form](x)
    assert tucker.work(PROBLEM, form).flops == counter.get_total_flops()


def test_bytes_are_those_of_the_tensors():
    x, forms = tucker.layer_forms(PROBLEM, torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad():
        for part in forms["two_step"]:
            out = part(x)
            biases = 0 if part.bias is None else part.bias.numel()
            seen.append(4 * (x.numel() + part.weight.numel() + biases + out.numel()))
            x = out
    assert [stage.bytes for stage in tucker.work(PROBLEM, "two_step").stages] == seen
    fused = tucker.work(PROBLEM, "fused")
    assert fused.flops == tucker.work(PROBLEM, "two_step").flops
    assert sum(seen) - fused.bytes == 2 * 4 * PROBLEM.N * PROBLEM.Q * PROBLEM.output_size[0] * PROBLEM.output_size[1]


def test_the_suite_is_found():
    suite = suites.find("tucker")
    assert all(isinstance(case.problem, TuckerConv2dProblem) for case in suite.cases)
    assert len({case.id for case in suite.cases}) == len(suite.cases)
