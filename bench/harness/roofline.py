"""What this machine can do at most, measured: multiply-accumulate rate and copy bandwidth, in a process of its own.

``python -m bench.harness.roofline THREADS`` prints one JSON object. The rate is the best of PyTorch's square matrix
products and of its dense 3×3 convolutions, the closest to the peak that portable code can ask for: on some processors
the library behind one of the two leaves half of it unused. For bfloat16 it includes matrix units.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from bench.harness.paths import ROOT

SIZES = (256, 384, 512, 768, 1024)
MAPS = ((64, 56), (128, 28))  # channels in and out, rows and columns
COPY_BYTES = 2**27  # far more than a core's caches
SECONDS = 0.12  # spent on each


@dataclass(frozen=True)
class Peaks:
    """FLOP/s by dtype name, and bytes read plus bytes written a second."""

    flops_per_s: dict[str, float]
    bytes_per_s: float


def _least(call: Callable[[], object]) -> float:
    """Least seconds of a call: a peak is what the machine did at its best."""
    call()
    end = time.perf_counter() + SECONDS
    least = float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def _product_rate(dtype: torch.dtype) -> float:
    best = 0.0
    for size in SIZES:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> object:
            return torch.mm(a, b, out=out)

        best = max(best, 2 * size**3 / _least(product))
    return best


def _convolution_rate(dtype: torch.dtype) -> float:
    best = 0.0
    for channels, side in MAPS:
        x = torch.randn(1, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)

        def convolution(x: torch.Tensor = x, weight: torch.Tensor = weight) -> object:
            return torch.conv2d(x, weight, padding=1)

        pairs = (side - 2) ** 2 * 9 + 4 * (side - 2) * 6 + 4 * 4  # of an output and a tap inside the image
        best = max(best, 2 * channels**2 * pairs / _least(convolution))
    return best


def measure(threads: int) -> Peaks:
    """Measure in this process."""
    torch.set_num_threads(threads)
    rates = {
        str(dtype).removeprefix("torch."): max(_product_rate(dtype), _convolution_rate(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    return Peaks(rates, 2 * COPY_BYTES / _least(lambda: target.copy_(source)))


def measure_apart(threads: int, environment: Mapping[str, str]) -> Peaks:
    """Measure in a fresh process with the environment of the workers."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.harness.roofline", str(threads)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Peaks(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
