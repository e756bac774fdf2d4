"""Times of functions on the current CUDA device, in turn: in a captured graph that is replayed, and called eagerly.

In a graph the time is the device's; in eager calls it is what a caller waits for, which for small ones is the
processor's time. A choice that holds for both must not be slower in either.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from basisconv_kernels.core import log
from basisconv_kernels.core.timing import LEAST_ROUNDS, WARM_UPS, Spread
from basisconv_kernels.core.tuning import FORWARD, TRAINING

COLD_BYTES = 200 * 2**20  # calls on so many bytes of tensors find none of them in the cache when their turn comes
MOST_COPIES = 64

Calls = Mapping[str, Sequence[Callable[[], object]]]


def copies(moved: int) -> int:
    """How many sets of tensors a function should be timed on, of ``moved`` bytes each."""
    return max(2, min(MOST_COPIES, math.ceil(COLD_BYTES / max(moved, 1))))


def compare(calls: Calls, seconds: float) -> dict[str, dict[str, Spread]]:
    """Milliseconds a call by way, ``"graph"`` and ``"eager"``, and by name.

    Args:
        calls: by name, each on several sets of tensors.
        seconds: for all of them together; seven rounds of both ways are done in any case.
    """
    for each in calls.values():
        for call in (*each[:WARM_UPS], *each[:WARM_UPS]):  # compiles, and lets cuDNN choose its algorithms
            call()
    torch.cuda.synchronize()
    graphs = {name: graph for name, each in calls.items() if (graph := _captured(name, each)) is not None}
    found = {
        "graph": _in_turn({name: _replay(graph, len(calls[name])) for name, graph in graphs.items()}, seconds / 2),
        "eager": _in_turn({name: _eager(each) for name, each in calls.items()}, seconds / 2),
    }
    return {way: times for way, times in found.items() if times}


def _captured(name: str, calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # each result in memory of its own
    except RuntimeError as error:
        log.once(f"{name} cannot be captured in a CUDA graph: {str(error).splitlines()[0][:200]}", logging.WARNING)
        return None
    del kept
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, calls: int) -> Callable[[], float]:
    def sample() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    return sample


def _eager(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    def sample() -> float:
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3 / len(calls)

    return sample


def _in_turn(samples: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, Spread]:
    taken: dict[str, list[float]] = {name: [] for name in samples}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, sample in samples.items():
            taken[name].append(sample())
        rounds += 1
    return {name: Spread.of(values) for name, values in taken.items()}


def entries(op: str, problem: Any, step: str, calls: Calls, seconds: float) -> list[dict[str, Any]]:
    """The entries of a tuned table, one a way; docs/dispatch.md describes them.

    Args:
        op, problem: what is timed.
        step: ``tuning.FORWARD`` or ``tuning.TRAINING``, which keeps a graph for gradients.
        calls, seconds: as for ``compare``; names are those of backends.
    """
    with torch.inference_mode(step == FORWARD), torch.set_grad_enabled(step == TRAINING):
        found = compare(calls, seconds)
    return [entry(op, problem.to_json(), step, way, times) for way, times in found.items()]


def entry(op: str, problem: dict[str, Any], step: str, way: str, times: Mapping[str, Spread]) -> dict[str, Any]:
    """One entry: what its times, by backend in milliseconds, belong to. Threads do not matter on a GPU."""
    return {
        "op": op,
        "problem": problem,
        "step": step,
        "way": way,
        "threads": 0,
        "ms": {name: spread.to_dict() for name, spread in times.items()},
        "fastest": min(times, key=lambda name: times[name].median),
        "disturbed": 0.0,
    }
