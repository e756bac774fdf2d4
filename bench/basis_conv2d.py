"""The suites of ``basis_conv2d``: cases, engines and the bars, all set before anything was measured.

The shapes are those of ``testing.PERFORMANCE_CASES``; here they are sorted into suites and given their bars.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.testing import PERFORMANCE_CASES
from bench import models
from bench.harness.case import Case, Form, Suite, Target
from bench.harness.engines import BASELINES

SMALL_Q = 12
"""Up to here 16-lane engines leave lanes empty; such cases form C2."""

_PROBLEMS = {case.name: replace(case.problem, bias=True) for case in PERFORMANCE_CASES}


def _tag(problem: Conv2dProblem) -> str:
    if problem.Q <= SMALL_Q:
        return "small_q"
    return "3x3_stride1" if (problem.R, problem.S, problem.stride) == (3, 3, (1, 1)) else "other_geometry"


def _layers(dtype: torch.dtype = torch.float32) -> tuple[Case, ...]:
    return tuple(
        Case(name, "layer", replace(problem, dtype=dtype), tags=frozenset({_tag(problem)}))
        for name, problem in _PROBLEMS.items()
    )


def _tagged(*tags: str) -> tuple[Case, ...]:
    return tuple(case for case in _layers() if case.tags & set(tags))


def _training(name: str, batch: int) -> list[Case]:
    problem = replace(_PROBLEMS[name], N=batch)
    head = models.conv_case_id(problem)
    forms: tuple[Form, ...] = ("fused", "two_step")
    return [
        Case(f"{head}_{state}", "training", problem, forms, frozenset({state}), frozen=state == "frozen")
        for state in ("frozen", "trained")
    ]


def _memory(name: str, batch: int, dtype: torch.dtype = torch.float32) -> Case:
    """Batches large enough that Z and an im2col buffer would stand out from scratch memory and page noise."""
    problem = replace(_PROBLEMS[name], N=batch, dtype=dtype)
    suffix = "" if dtype is torch.float32 else "_bf16"
    return Case(models.conv_case_id(problem) + suffix, "memory", problem, ("fused", "two_step"))


C1 = Suite(
    name="C1",
    title="Fused float32 against the best two-step, Q ≥ 16",
    cases=_tagged("3x3_stride1", "other_geometry"),
    engines=("ours", *BASELINES),
    targets=(
        Target("C1 3×3 stride 1, mean", "geomean", 1.35, 1.6, "3x3_stride1", BASELINES),
        Target("C1 3×3 stride 1, each", "each", 1.1, None, "3x3_stride1", BASELINES),
        Target("C1 other geometries, each", "each", 0.97, 1.1, "other_geometry", BASELINES),
    ),
)

C2 = Suite(
    name="C2",
    title="Fused float32 against the best two-step, Q ≤ 12 on maps from 56×56",
    cases=_tagged("small_q"),
    engines=("ours", *BASELINES, "onednn_avx2"),
    targets=(
        Target("C2 each", "each", 1.8, 2.3, "small_q", BASELINES),
        Target("C2 each, against oneDNN capped to AVX2", "each", 1.25, 1.5, "small_q", ("onednn_avx2",)),
    ),
)

C3 = Suite(
    name="C3",
    title="Fused bfloat16 against the best bfloat16 two-step",
    cases=_layers(torch.bfloat16),
    engines=("ours", *BASELINES, "onednn_no_amx"),
    targets=(Target("C3 mean", "geomean", 1.2, 1.4, "", BASELINES),),
)

C10 = Suite(
    name="C10",
    title="Peak extra memory of one call, beyond its result",
    cases=(
        _memory("n8_64to64_at56_q16", 64),
        _memory("n1_64to64_at112_q8", 32),
        _memory("n8_128to128_at28_q16", 128),
        _memory("n1_128to256_at28_q64_stride2", 128),
        _memory("n8_64to64_at56_q16", 64, torch.bfloat16),
    ),
    engines=("ours", "torch_eager"),
    targets=(Target("C10 no [N, Q, OH, OW] and no im2col; stretch: 1 MiB a thread", "memory", None),),
)

C11 = Suite(
    name="C11",
    title="Training step, forward and backward, against the same step through two nn.Conv2d",
    cases=tuple(
        case
        for name in ("n8_64to64_at56_q16", "n1_128to128_at28_q32", "n1_256to256_at14_q64", "n1_512to512_at7_q128")
        for case in _training(name, 8)
    ),
    engines=("ours", "torch_eager"),
    targets=(Target("C11 each", "each", 1.0, 1.2, "", ("torch_eager",)),),
)

SMOKE = Suite(
    name="smoke",
    title="One tiny layer: proves that every engine runs; no bar",
    cases=(
        Case(
            "n2_8to12_at9_q5",
            "layer",
            Conv2dProblem(N=2, C=8, Q=5, K=12, H=9, W=9, padding=(1, 1, 1, 1), channels_last=True, bias=True),
        ),
    ),
    engines=("ours", *BASELINES, "onednn_avx2"),
)


def suites() -> tuple[Suite, ...]:
    """The suites of this op, and its networks."""
    return (C1, C2, C3, models.suite(), C10, C11, SMOKE)
