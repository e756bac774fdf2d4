"""The suite of ``tucker_conv2d``: the layers of the performance goals, both ranks a quarter of the channels.

``python -m bench run --suite tucker`` measures them on the CPU; on a GPU they are rows of ``make gpu-bench``.
"""

from __future__ import annotations

from basisconv_kernels.core.problem import TuckerConv2dProblem
from bench.harness.case import Case, Suite, Target
from bench.harness.engines import BASELINES

SHARE = 4
SHAPES = {
    "n1_64_at56": (1, 64, 56, 1),
    "n1_128_at28": (1, 128, 28, 1),
    "n1_256_at14": (1, 256, 14, 1),
    "n1_512_at7": (1, 512, 7, 1),
    "n8_64_at56": (8, 64, 56, 1),
    "n1_128_at28_stride2": (1, 128, 28, 2),
}


def suites() -> tuple[Suite, ...]:
    """The chain against the best three convolutions and the best dense one; no bar was set for it."""
    cases = []
    for name, (N, C, size, stride) in SHAPES.items():
        problem = TuckerConv2dProblem(
            N=N, C=C, rank_in=C // SHARE, Q=C // SHARE, K=C, H=size, W=size, stride=(stride, stride),
            padding=(1, 1, 1, 1), channels_last=True, bias=True,
        )  # fmt: skip
        cases.append(Case(name, "layer", problem))
    targets = (
        Target("tucker each, against three convolutions", "each", None, None, "", BASELINES, "two_step"),
        Target("tucker each, against the dense one", "each", None, None, "", BASELINES, "dense"),
    )
    title = "Tucker chains, ranks C/4 and K/4, against the best of three convolutions and one"
    return (Suite("tucker", title, tuple(cases), ("ours", *BASELINES), targets),)
