"""The binary convolution: suites C5 to C8, and all of its forms in one process: ``python -m bench.binary_conv2d``.

    C5  packed → packed on AVX-512 VPOPCNTDQ, AMX   at least 800 GMAC/s and 13 times the best dense float32 convolution
    C6  float → float, packing inside               at least 2.5 times the best int8 convolution
    C7  float → float                               at least 9 times Larq Compute Engine with indirect BGEMM
    C8  packed → packed on AVX2                     at least 350 GMAC/s (set for 3.7 GHz)

The bars were set before anything was measured; ``python -m bench run --suite C5`` measures a suite, every engine in its
own process. For a look at all forms side by side this file also runs by itself.

3×3, C → C, one multiply-accumulate a pair of operands, those in the padding included, for every rival alike. All are
timed in turn in one process, which is fair here: all of them are torch, on torch's threads. No time is printed of a
case whose results are not those of the reference, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import machine, timing
from basisconv_kernels.ops.binary_conv2d import binary_conv2d
from basisconv_kernels.ops.binary_conv2d_native import binary_conv2d_pack
from basisconv_kernels.ops.bitpack import bitpack
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from bench.harness.case import Case, Form, Suite, Target
from bench.harness.engines import BASELINES, INT8


@dataclass(frozen=True)
class Shape:
    """One layer: batch, channels in and out, height and width of the map."""

    N: int
    C: int
    H: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return self.N * self.C * self.C * 9 * self.H * self.H

    def __str__(self) -> str:
        return f"n{self.N}_{self.C}to{self.C}_at{self.H}"


SHAPES = (Shape(1, 64, 56), Shape(1, 128, 28), Shape(1, 256, 14), Shape(1, 512, 7), Shape(8, 64, 56), Shape(8, 128, 28))
POPCOUNT = ("avx512_vpopcntdq", "avx512_bf16", "amx")
LEAST_RATE = {**dict.fromkeys(POPCOUNT, ("C5", 800.0)), "avx2": ("C8", 350.0)}
LEAST_OVER_DENSE = dict.fromkeys(POPCOUNT, ("C5", 13.0))
LEAST_OVER_INT8 = ("C6", 2.5)


def _cases(op: str, forms: tuple[Form, ...]) -> tuple[Case, ...]:
    """The shapes as cases; ``narrow`` are those of 64 channels."""
    packed = op == "binary_packed"
    found = []
    for shape in SHAPES:
        problem = BinaryConv2dProblem(
            N=shape.N, C=shape.C, K=shape.C, H=shape.H, W=shape.H, padding=(1, 1, 1, 1), channels_last=True,
            planes=int(packed), output="packed" if packed else "float",
        )  # fmt: skip
        tags = frozenset({"narrow" if shape.C <= 64 else "wide"})
        found.append(Case(str(shape), "layer", problem, forms, tags, op=op))
    return tuple(found)


def suites() -> tuple[Suite, ...]:
    """C5 to C8."""
    return (
        Suite(
            name="C5",
            title="Binary, packed → packed, against the best dense float32",
            cases=_cases("binary_packed", ("fused", "dense")),
            engines=("ours", *BASELINES),
            targets=(
                Target("C5 against dense, each", "each", 13.0, 17.0, "", BASELINES, "dense"),
                Target("C5 rate, 64 channels", "rate", 800.0, 900.0, "narrow"),
                Target("C5 rate, more channels", "rate", 800.0, 1000.0, "wide"),
            ),
        ),
        Suite(
            name="C6",
            title="Binary, float → float, against the best int8 convolution",
            cases=_cases("binary_float", ("fused", "int8", "dense")),
            engines=("ours", *INT8, *BASELINES),
            targets=(
                Target("C6 against int8 of PyTorch, each", "each", 2.5, 3.0, "", ("torch_int8",), "int8"),
                Target("C6 against int8 of PyTorch, mean", "geomean", 2.5, 4.0, "", ("torch_int8",), "int8"),
                Target("C6 against the best int8, each", "each", None, None, "", INT8, "int8"),
            ),
        ),
        Suite(
            name="C7",
            title="Binary, float → float, against Larq Compute Engine",
            cases=_cases("binary_float", ("fused", "binary")),
            engines=("ours", "larq"),
            targets=(Target("C7 each", "each", 9.0, 11.0, "", ("larq",), "binary"),),
        ),
        Suite(
            name="C8",
            title="Binary, packed → packed, with AVX2 alone",
            cases=_cases("binary_packed", ("fused", "dense")),
            engines=("ours_avx2", "torch_eager"),
            targets=(
                Target("C8 rate, 64 channels", "rate", 350.0, 400.0, "narrow"),
                Target("C8 rate, more channels", "rate", 350.0, 450.0, "wide"),
            ),
        ),
    )


def int8(x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """Torch's quantized convolution, quantized in and out; None where this build of torch has none."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return None
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.ao.nn.quantized.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        filters = torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8)
        layer.set_weight_bias(filters, None)
        layer.scale, layer.zero_point = 1.0, 0
        quantized = torch.quantize_per_tensor(x, 0.02, 64, torch.quint8)
        quantized = quantized.contiguous(memory_format=torch.channels_last)
    return lambda: layer(quantized)


def calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """Everybody on one shape, after a check of our results.

    Raises:
        ValueError: a result of ours is not that of the reference.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.N, shape.C, shape.H, shape.H, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape.C, shape.C, 3, 3, generator=generator)
    bits, packed = bitpack(x), binary_conv2d_pack(weight)
    settings: dict[str, Any] = {"padding": 1, "packed": packed}
    ours: dict[str, Callable[[], Any]] = {
        "packed → packed": lambda: binary_conv2d(bits, weight, output="packed", **settings),
        "packed → float": lambda: binary_conv2d(bits, weight, **settings),
        "float → float": lambda: binary_conv2d(x, weight, **settings),
        "float → packed": lambda: binary_conv2d(x, weight, output="packed", **settings),
    }
    for name, call in ours.items():
        output = "packed" if name.endswith("packed") else "float"
        expected, got = binary_conv2d(x, weight, padding=1, output=output, backend="reference"), call()
        same = torch.equal(got.words, expected.words) if output == "packed" else torch.equal(got, expected)
        if not same:
            raise ValueError(f"bench: {name} on {shape} differs from the reference; no time is taken")
    convolution = torch.nn.Conv2d(shape.C, shape.C, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    convolution.weight.data.copy_(weight)
    ours["pack"] = lambda: bitpack(x)
    ours["dense float32"] = lambda: convolution(x)
    quantized = int8(x, weight)
    if quantized is not None:
        ours["dense int8"] = quantized
    return ours


def judge(isa: str, rates: dict[str, timing.Spread], over_dense: float, over_int8: float | None) -> list[str]:
    """The bars that hold on this instruction set, each with what was reached."""
    found = []
    rate = rates["packed → packed"].median
    if isa in LEAST_RATE:
        name, least = LEAST_RATE[isa]
        found.append(f"{name} {'met' if rate >= least else 'short'}: {rate:.0f} of {least:.0f} GMAC/s")
    if isa in LEAST_OVER_DENSE:
        name, least = LEAST_OVER_DENSE[isa]
        found.append(f"{name} {'met' if over_dense >= least else 'short'}: {over_dense:.1f} of {least:.0f} × float32")
    if over_int8 is not None:
        name, least = LEAST_OVER_INT8
        found.append(f"{name} {'met' if over_int8 >= least else 'short'}: {over_int8:.2f} of {least} × int8")
    return found


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    """One row: GMAC/s of everybody, ratios within the rounds, and the bars."""
    with torch.inference_mode():
        taken = timing.interleave(calls(shape), seconds)
    rates = {
        name: timing.Spread.of([shape.macs / value / 1e9 for value in series.values])
        for name, series in taken.items()
        if name != "pack"
    }
    over_dense = timing.speed_up(taken["dense float32"], taken["packed → packed"]).median
    over_int8 = None
    if "dense int8" in taken:
        over_int8 = timing.speed_up(taken["dense int8"], taken["float → float"]).median
    isa = machine.isa()
    return {
        "case": str(shape),
        "cpu": machine.cpu_name(),
        "isa": isa,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gmac_per_s": {name: rate.to_dict() for name, rate in rates.items()},
        "pack_us": taken["pack"].scaled(1e6).spread().to_dict(),
        "packed_over_dense": over_dense,
        "float_over_int8": over_int8,
        "bars": judge(isa, rates, over_dense, over_int8),
        "disturbed": round(timing.disturbed(taken.values()), 4),
    }


def main() -> None:
    """Measure every shape and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="a shape, for all together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the rows to this file, one line of JSON each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in SHAPES:
        row = measure(shape, options.seconds)
        shown = ", ".join(f"{name} {rate['median']:.0f}" for name, rate in row["gmac_per_s"].items())
        print(
            f"{row['case']} GMAC/s: {shown} | {'; '.join(row['bars'])} | disturbed {row['disturbed']:.0%}", flush=True
        )
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
