"""C9: stacked binary filters and binary weights with real activations, against the dense convolution they replace.

    python -m bench.stacked_binary_conv2d                         # every case, one thread
    python -m bench.stacked_binary_conv2d --case 64_at56 --seconds 2 --json rows.jsonl

Nothing is timed whose result is wrong: the gate is the check of ``basisconv_kernels.testing``. The rivals are timed in
turn, in one process and on one pool of threads: the dense float32 convolution in its best form (oneDNN with weights
packed for it, channels_last and NCHW; the faster counts), the same arithmetic without the fused kernel (the split
folded into the batch, then selected and added), and ours. A ratio is taken round by round; the row says how many
samples were disturbed. Slow cases are printed like the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import basisconv_kernels
from basisconv_kernels import testing
from basisconv_kernels.core import machine, registry
from basisconv_kernels.core.timing import Series, disturbed, interleave, speed_up
from basisconv_kernels.ops.stacked_binary_conv2d import CANDIDATES
from basisconv_kernels.reference import stacked_binary_conv2d as reference
from bench.harness.case import Case, Suite, Target
from bench.harness.engines import BASELINES

# Least speed-up over dense float32: a bank of K/4 filters in two splits, of outputs up to 4 MB and beyond, and a bank
# of all K filters. Set before anything was measured, for a processor with AVX-512.
STACKED, STACKED_LARGE, BINARY_WEIGHTS = 5.0, 4.0, 2.0
LARGE_BYTES = 4 * 2**20

STACKED_STRETCH = {"narrow": 6.5, "wide": 8.5}  # by channels: 64, and more
BINARY_WEIGHTS_STRETCH = 2.6


def _kind(case: testing.StackedCase) -> str:
    if case.problem.n >= case.problem.K:
        return "bwn"
    if bar(case) == STACKED_LARGE:
        return "large"
    return "narrow" if case.problem.C <= 64 else "wide"


def suites() -> tuple[Suite, ...]:
    """C9."""
    cases = tuple(
        Case(c.name, "layer", c.problem, ("fused", "dense"), frozenset({_kind(c)}), op="stacked")
        for c in testing.STACKED_PERFORMANCE_CASES
    )

    def each(text: str, must: float, stretch: float | None, tag: str) -> Target:
        return Target(f"C9 {text}", "each", must, stretch, tag, BASELINES, "dense")

    targets = (
        each("bank K/4, 64 channels", STACKED, STACKED_STRETCH["narrow"], "narrow"),
        each("bank K/4, more channels", STACKED, STACKED_STRETCH["wide"], "wide"),
        each("bank K/4, outputs over 4 MB", STACKED_LARGE, None, "large"),
        each("binary weights, bank K", BINARY_WEIGHTS, BINARY_WEIGHTS_STRETCH, "bwn"),
    )
    title = "Stacked binary filters and binary weights, real input, against the best dense float32"
    return (Suite("C9", title, cases, ("ours", *BASELINES), targets),)


Call = Callable[[], object]


def dense(filters: Tensor, x: Tensor, padding: int) -> Call:
    """The dense convolution with weights packed for oneDNN; PyTorch's own call where that is not to be had."""
    one, pad = [1, 1], [padding, padding]
    if not torch.backends.mkldnn.is_available():
        return lambda: torch.nn.functional.conv2d(x, filters, None, 1, padding)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(filters.to_mkldnn(), pad, one, one, 1, list(x.shape))
    pointwise = torch.ops.mkldnn._convolution_pointwise
    return lambda: pointwise(x, packed, None, pad, one, one, 1, "none", [], "")


def two_step(bank: Tensor, index: Tensor, x: Tensor, padding: int) -> Call:
    """The split folded into the batch, one convolution with the bank, then selected and added."""
    n, low = bank.shape[:2]
    N, C, H, W = x.shape
    splits = C // low
    folded = x.permute(0, 2, 3, 1).reshape(N, H, W, splits, low).permute(0, 3, 4, 1, 2).reshape(N * splits, low, H, W)
    run = dense(bank, folded.contiguous(memory_format=torch.channels_last), padding)
    parts = [index[:, i].contiguous() for i in range(splits)]

    def call() -> Tensor:
        maps: Any = run()
        maps = maps.view(N, splits, n, *maps.shape[2:])
        total = maps[:, 0].index_select(1, parts[0])
        for i in range(1, splits):
            total = total + maps[:, i].index_select(1, parts[i])
        return total

    return call


def calls_of(case: testing.StackedCase) -> dict[str, Call]:
    """Every rival of a case as a call without arguments."""
    inputs = testing.make_stacked_inputs(case)
    x, bank, index, _, _ = inputs.tensors
    x = x.contiguous(memory_format=torch.channels_last)
    padding = case.problem.padding[0]
    filters = reference.stacked_filters(bank, index)
    packed = basisconv_kernels.stacked_binary_conv2d_pack(bank, index)
    op = basisconv_kernels.stacked_binary_conv2d
    calls: dict[str, Call] = {
        "ours": lambda: op(x, bank, index, padding=padding, packed=packed),
        "dense, channels_last": dense(filters, x, padding),
        "dense, NCHW": dense(filters, x.contiguous(), padding),
    }
    if case.problem.splits > 1:
        calls["bank folded into the batch, then gathered"] = two_step(bank, index, x, padding)
    return calls


def bar(case: testing.StackedCase) -> float:
    """The least speed-up over dense float32 that the case must reach."""
    p = case.problem
    if p.n >= p.K:
        return BINARY_WEIGHTS
    OH, OW = p.output_size
    return STACKED_LARGE if p.N * p.K * OH * OW * p.dtype.itemsize > LARGE_BYTES else STACKED


def measure(case: testing.StackedCase, seconds: float) -> dict[str, Any]:
    """One row; ``failed`` instead of times where the result is wrong."""
    p = case.problem
    chosen = registry.select("stacked_binary_conv2d", CANDIDATES, p, registry.wish()).name
    row: dict[str, Any] = {
        "case": case.name, "problem": p.to_json(), "backend": chosen, "threads": torch.get_num_threads(),
        "form": basisconv_kernels.stacked_binary_conv2d_form((p.n, p.low, p.R, p.S), (p.K, p.splits)),
        "cpu": machine.cpu_name(), "isa": machine.isa(), "torch": torch.__version__,
        "basisconv_kernels": basisconv_kernels.__version__, "bar": bar(case),
    }  # fmt: skip
    try:
        testing.check_stacked(case, basisconv_kernels.stacked_binary_conv2d)
    except testing.Mismatch as error:
        return {**row, "failed": str(error)}
    with torch.no_grad():
        taken = interleave(calls_of(case), seconds)
    spreads = {name: series.scaled(1e3).spread().to_dict() for name, series in taken.items()}
    rivals = {name: series for name, series in taken.items() if name.startswith("dense")}
    best = min(rivals, key=lambda name: rivals[name].spread().median)
    ratio = speed_up(rivals[best], taken["ours"])
    pairs = p.dense_macs() / (taken["ours"].spread().median * 1e9)
    others = {name: speed_up(series, taken["ours"]).to_dict() for name, series in taken.items() if name != "ours"}
    return {
        **row, "ms": spreads, "best_dense": best, "speed_up": ratio.to_dict(), "speed_ups": others,
        "dense_equivalent_gmac_s": round(pairs, 1), "disturbed": round(_disturbed(taken), 3),
    }  # fmt: skip


def _disturbed(taken: dict[str, Series]) -> float:
    return disturbed(taken.values())


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"{row['case']:<34} FAILED: {row['failed']}"
    times = ", ".join(f"{name} {spread['median']:.3f}" for name, spread in row["ms"].items())
    ratio = row["speed_up"]
    verdict = "reaches" if ratio["median"] >= row["bar"] else "misses"
    return (
        f"{row['case']:<34} {row['form']:<8} {ratio['median']:5.2f}x dense ({ratio['q1']:.2f}-{ratio['q3']:.2f}), "
        f"{verdict} {row['bar']:g}x; {row['dense_equivalent_gmac_s']:.0f} GMAC/s; ms: {times}; "
        f"{100 * row['disturbed']:.0f} % disturbed"
    )


def main(
    case: Annotated[list[str] | None, typer.Option(help="Only cases whose name contains this.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; dense stays float32.")] = "float32",
    seconds: Annotated[float, typer.Option(help="To spend on a case.")] = 2.0,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Append rows to this file, one a line.")] = None,
) -> None:
    """Gate, time and judge the cases of C9."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    failed = False
    for found in testing.STACKED_PERFORMANCE_CASES:
        if case and not any(word in found.name for word in case):
            continue
        chosen = replace(found, problem=replace(found.problem, dtype=getattr(torch, dtype)))
        row = measure(chosen, seconds)
        failed |= "failed" in row
        print(line(row), flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
