"""``ternary_conv2d`` against the dense convolution of the same weights: ``python -m bench.ternary_conv2d``.

Every case is checked by ``testing.ternary_conv2d.check`` first; one that fails gets no time. Then our op (planes packed
once), PyTorch's dense convolution in both memory formats, and the compiled and frozen one run in turn, round by round,
so that what slows the machine slows all of them. The work of our kernel grows with the density of the weights, so each
shape is measured at several, at 1 too, where it has nothing to gain. Slow rows are printed like the others.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core import registry, timing
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.ops.ternary_conv2d import CANDIDATES, ternary_conv2d
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.reference.ternary_conv2d import scaled_weight
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import Mismatch
from basisconv_kernels.testing import ternary_conv2d as ternary
from bench.harness import machine
from bench.harness.case import Case, Suite, Target
from bench.harness.engine_torch import compile_module, freeze
from bench.harness.engines import BASELINES

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
SHAPES = {
    "n1_64_at56": (1, 64, 56),
    "n1_128_at28": (1, 128, 28),
    "n1_256_at14": (1, 256, 14),
    "n1_512_at7": (1, 512, 7),
}
BATCHED = {"n8_64_at56": (8, 64, 56), "n8_256_at14": (8, 256, 14)}


def suites() -> tuple[Suite, ...]:
    """Ternary weights at several densities; no bar was set for them."""
    cases = []
    for name, (N, C, size) in {**SHAPES, **BATCHED}.items():
        for density in DENSITIES:
            problem = TernaryConv2dProblem(
                N=N, C=C, K=C, H=size, W=size, padding=(1, 1, 1, 1), scales="none", channels_last=True
            )
            found = Case(f"{name}_d{density:g}", "layer", problem, ("fused", "dense"), op="ternary", density=density)
            cases.append(found)
    title = "Ternary weights against the best dense float32, by density"
    targets = (Target("ternary each", "each", None, None, "", BASELINES, "dense"),)
    return (Suite("ternary", title, tuple(cases), ("ours", *BASELINES), targets),)


def case_of(name: str, density: float, scales: str = "one") -> ternary.TernaryCase:
    """A 3×3 layer, C → C, bias, channels_last."""
    N, C, size = {**SHAPES, **BATCHED}[name]
    problem = TernaryConv2dProblem(
        N=N, C=C, K=C, H=size, W=size, padding=(1, 1, 1, 1), scales=scales, channels_last=True, bias=True
    )
    return ternary.TernaryCase(name, "a shape of the performance goals", problem, density=density)


def calls_of(case: ternary.TernaryCase, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """The functions to time, by name."""
    inputs = ternary.make_inputs(case)
    x, planes, scale, negative, bias = inputs.tensors
    x = x.contiguous(memory_format=torch.channels_last)
    packed = ternary_conv2d_pack(planes, case.problem.C)
    ours = functools.partial(
        ternary_conv2d, x, planes, scale, bias, negative_scale=negative, packed=packed, **case.arguments()
    )
    dense = nn.Conv2d(case.problem.C, case.problem.K, 3, padding=1).eval()
    with torch.no_grad():
        dense.weight.copy_(scaled_weight(planes, scale, negative, case.problem.C, torch.float32))
        dense.bias.copy_(bias)  # type: ignore[union-attr,arg-type]
    planar = x.contiguous()
    last = nn.Conv2d(case.problem.C, case.problem.K, 3, padding=1).eval()
    last.load_state_dict(dense.state_dict())
    last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "dense_channels_last": functools.partial(last, x),
        "dense_nchw": functools.partial(dense, planar),
    }
    if compiled:
        freeze()
        torch._dynamo.reset()
        calls["dense_compiled"] = functools.partial(compile_module(last), x)
    return calls


def measure(case: ternary.TernaryCase, seconds: float, compiled: bool) -> dict[str, Any]:
    """The gate, then times; a row of the result."""
    p = case.problem
    backend = next(name for name, why in registry.reasons(CANDIDATES, p).items() if not why)
    row: dict[str, Any] = {"case": case.name, "density": case.density, "backend": backend, "problem": p.to_json()}
    try:
        row["gate"] = round(ternary.check(case, ternary_conv2d), 4)
    except Mismatch as error:
        return row | {"failed": str(error)}
    with torch.inference_mode():
        taken = timing.interleave(calls_of(case, compiled), seconds)
    spreads = {name: series.scaled(1e3).spread() for name, series in taken.items()}
    rival = min((name for name in spreads if name != "ours"), key=lambda name: spreads[name].median)
    ours = spreads["ours"].median
    row["ms"] = {name: spread.to_dict() for name, spread in spreads.items()}
    row["rival"] = rival
    row["speed_up"] = timing.speed_up(taken[rival], taken["ours"]).to_dict()
    row["dense_gmacs"] = round(p.macs() / ours / 1e6, 1)
    row["gadds"] = round(p.macs() * case.density / ours / 1e6, 1)
    row["disturbed"] = round(timing.disturbed(taken.values()), 3)
    return row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['case']:12} density {row['density']:<5} on {row['backend']}"
    if "failed" in row:
        return f"{head} FAILED {row['failed']}"
    return (
        f"{head} {row['ms']['ours']['median']:8.3f} ms, best dense {row['ms'][row['rival']]['median']:8.3f} ms "
        f"({row['rival']}), {row['speed_up']['median']:5.2f} times as fast; {row['gadds']:6.1f} G additions/s"
    )


def main() -> None:
    """Measure and print; with ``--output`` also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(SHAPES), choices=[*SHAPES, *BATCHED])
    parser.add_argument("--density", nargs="*", type=float, default=list(DENSITIES))
    parser.add_argument("--scales", default="one", choices=["none", "one", "two"])
    parser.add_argument("--seconds", type=float, default=0.7, help="of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also the compiled and frozen dense convolution")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.case:
        for density in arguments.density:
            row = measure(case_of(name, density, arguments.scales), arguments.seconds, arguments.compiled)
            rows.append(row)
            print(line(row), flush=True)
    if arguments.output:
        result = {
            "op": "ternary_conv2d",
            "dtype": dtype_name(torch.float32),
            "context": machine.context(arguments.threads, {}),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    raise SystemExit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
