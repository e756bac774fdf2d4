"""The worker process: one engine, driven by one request a line until its stdin ends.

``python -m bench.harness.worker ENGINE``. It catches nothing that an engine throws: the process ends, the parent sees
it and says so. In between two requests it sleeps in a blocking read.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench.harness import engines, memory
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Engine, Files, Method
from bench.harness.quiet import Watch

MAX_CALLS = 5000


def _limit_threads() -> None:
    """Tell torch, where it is loaded; other engines are told when a model is compiled."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.set_num_interop_threads(1)
        torch.manual_seed(0)


def _time(call: Any, calls: int) -> float:
    """Median seconds of ``calls`` calls, each with all of its host cost. One untimed call first refills the caches."""
    clock = time.perf_counter
    call()
    taken = []
    for _ in range(calls):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken)


class Worker:
    """The requests, one method each; a reply is a JSON object."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.methods: list[Method] = []
        self.watch = Watch()

    def prepare(self, folder: str) -> dict[str, Any]:
        """Build every method of a case; ``unsupported`` says why there is none."""
        self.methods = []
        gc.collect()
        try:
            self.methods = self.engine.prepare(Files(Path(folder)))
        except UnsupportedError as why:
            return {"unsupported": str(why)}
        return {"methods": [{"form": m.form, "layout": m.layout, "detail": m.detail} for m in self.methods]}

    def output(self, method: int, prefix: str) -> dict[str, Any]:
        """Write the results of one call for the parent to check."""
        paths = []
        with self.methods[method].mode():
            arrays = self.methods[method].output()
        for number, array in enumerate(arrays):
            paths.append(f"{prefix}-{number}.npy")
            np.save(paths[-1], array)
        return {"outputs": paths}

    def calibrate(self, method: int, seconds: float) -> dict[str, Any]:
        """How many calls fill a sample of this length."""
        with self.methods[method].mode():
            once = _time(self.methods[method].call, 3)
        return {"calls": max(1, min(MAX_CALLS, round(seconds / once)))}

    def sample(self, method: int, calls: int, patience_s: float, best_probe: float) -> dict[str, Any]:
        """One sample, taken while the core has its full speed, or as it is once patience ends."""
        gc.disable()
        with self.methods[method].mode():
            seconds, probe = self.watch.during(
                lambda: _time(self.methods[method].call, calls), patience_s, best_probe or float("inf")
            )
        gc.enable()
        return {"seconds": seconds, "probe": probe, "best_probe": self.watch.best}

    def memory(self, method: int) -> dict[str, Any]:
        """Peak resident bytes that one call adds."""
        with self.methods[method].mode():
            return memory.added_by(self.methods[method].call)

    def release(self) -> dict[str, Any]:
        """Drop everything of the case."""
        self.methods = []
        gc.collect()
        return {}


REQUESTS = ("prepare", "output", "calibrate", "sample", "memory", "release")


def serve(name: str, requests: TextIO, replies: TextIO) -> None:
    """Answer until the parent closes the pipe. The first reply says whether the engine exists here."""

    def reply(data: dict[str, Any]) -> None:
        replies.write(json.dumps(data) + "\n")
        replies.flush()

    spec = engines.find(name)
    module, _, attribute = spec.target.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("bench", "basisconv_kernels"):
            raise
        reply({"missing": f"{error.name} is not installed"})
        return
    _limit_threads()
    worker = Worker(made(spec.argument) if spec.argument else made())
    reply({"ready": name})
    for line in requests:
        request = json.loads(line)
        what = request.pop("do")
        if what not in REQUESTS:
            raise ValueError(f"worker: no request has the name {what!r}")
        reply(getattr(worker, what)(**request))


def main() -> None:
    """Keep the real stdout for replies; whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)


if __name__ == "__main__":
    main()
