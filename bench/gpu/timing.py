"""Times of one call on a device: in a captured graph with the second-level cache cold and warm, and eagerly.

A graph holds many calls in a row, so that neither the clock's resolution nor the launch of the graph counts. Cold: each
call has its own input and result, more than ``COLD_BYTES`` of them, so none of it is in the cache when its turn comes.
Warm: the same call again and again. Eager: what a caller waits for when calls follow each other without a graph, which
for small ones is the processor's time, not the GPU's.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.timing import Spread

COLD_BYTES = 200 * 2**20
MOST_COPIES = 2048
SAMPLES = 50
WARM_CALLS = 16
EAGER_CALLS = 30

Call = Callable[[], Any]


class CudaMeter:
    """Times on the current CUDA device."""

    def __init__(self, samples: int = SAMPLES, cold_bytes: int = COLD_BYTES):
        self.samples, self.cold_bytes = samples, cold_bytes

    def measure(self, make: Callable[[int], Call], moved: int) -> dict[str, Any]:
        """Microseconds a call.

        Args:
            make: i → the call on the i-th set of tensors.
            moved: bytes of input and result of one call.

        Returns:
            dict: ``graph_cold``, ``graph_warm``, ``eager``: spreads; ``graph`` instead, with the reason, where the call
            cannot be captured.
        """
        copies = self.copies(moved)
        calls = [make(i) for i in range(copies)]
        for call in (*calls[:3], *calls[:3]):
            call()
        torch.cuda.synchronize()
        found: dict[str, Any] = {"copies": copies, "moved_bytes": moved}
        try:
            found["graph_cold"] = self.replayed(calls).to_dict()
            found["graph_warm"] = self.replayed(calls[:1] * WARM_CALLS).to_dict()
        except RuntimeError as error:
            found["graph"] = f"cannot be captured: {str(error).splitlines()[0][:200]}"
        found["eager"] = self._eager(calls).to_dict()
        return found

    def copies(self, moved: int) -> int:
        """Sets of tensors of this many bytes that push each other out of the second-level cache."""
        return max(2, min(MOST_COPIES, math.ceil(self.cold_bytes / max(moved, 1))))

    def replayed(self, calls: list[Call]) -> Spread:
        """Microseconds a call when a captured graph of all of them is replayed.

        Raises:
            RuntimeError: a call cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # each result in memory of its own
        for _ in range(2):
            graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.samples + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        del kept
        pairs = itertools.pairwise(marks)
        return Spread.of([first.elapsed_time(second) * 1e3 / len(calls) for first, second in pairs])

    def _eager(self, calls: list[Call]) -> Spread:
        return eager_spread(calls, self.samples, torch.cuda.synchronize)

    def forget(self) -> None:
        """Give back what the last measurement held."""
        gc.collect()
        torch.cuda.empty_cache()


class CpuMeter:
    """The same on the processor, in a rehearsal: no graphs."""

    def __init__(self, samples: int = 3):
        self.samples = samples

    def measure(self, make: Callable[[int], Call], moved: int) -> dict[str, Any]:
        """As ``CudaMeter.measure``, eager only."""
        calls = [make(0), make(1)]
        spread = eager_spread(calls, self.samples, lambda: None, calls_a_sample=2)
        return {"copies": 2, "moved_bytes": moved, "graph": "no graphs on the CPU", "eager": spread.to_dict()}

    def forget(self) -> None:
        """Nothing is held."""


Meter = CudaMeter | CpuMeter


def meter(device: str) -> Meter:
    """The one of a device."""
    return CudaMeter() if device == "cuda" else CpuMeter()


def eager_spread(
    calls: list[Call], samples: int, wait: Callable[[], None], calls_a_sample: int = EAGER_CALLS
) -> Spread:
    """Microseconds of host time a call, each sample of some calls in a row and the wait at their end."""
    found = []
    for _ in range(max(3, samples // 5) + 1):
        began = time.perf_counter()
        for i in range(calls_a_sample):
            calls[i % len(calls)]()
        wait()
        found.append((time.perf_counter() - began) * 1e6 / calls_a_sample)
    return Spread.of(found[1:])


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
