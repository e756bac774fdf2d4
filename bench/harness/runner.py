"""One run: build a case, let every engine prepare it, check, then time all of them in turn, round by round."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from basisconv_kernels.core.problem import TuckerConv2dProblem
from bench.harness import bits, gate, payload, quiet, rows, tucker
from bench.harness.case import Case, Form, Suite
from bench.harness.engines import find, memory_environment
from bench.harness.errors import EngineMissingError, WorkerDiedError
from bench.harness.machine import now
from bench.harness.roofline import Peaks
from bench.harness.rows import Row
from bench.harness.work import im2col_bytes, linear_work, tensors, work
from bench.harness.workers import Pool, WorkerProcess

Say = Callable[[str], None]

# How much longer a sample of a network is: ten calls or so. One or two would find caches and page tables as the engine
# before left them, which the layers, called fifty times a sample, do not.
NETWORK_SAMPLE = 5


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: samples of each method; in every round each engine is asked once.
        sample_s: aimed length of a sample, seconds; of a network ``NETWORK_SAMPLE`` times as long.
        threads: of every engine.
        patience_s: how long a sample may wait for the core's full speed.
        more_rounds: disturbed rounds are taken again, up to ``more_rounds * rounds`` in all.
    """

    rounds: int = 15
    sample_s: float = 0.02
    threads: int = 1
    patience_s: float = 0.1
    more_rounds: float = 2.0


@dataclass
class _Entry:
    """One method of one engine while a case is measured."""

    row: Row
    method: int
    samples: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)


def _work_of(case: Case, form: Form, peaks: Peaks) -> dict[str, Any]:
    """Work and roofline; nothing for networks and training steps, whose work the model does not know."""
    if case.op:
        return bits.work_of(case, form)
    if case.kind == "linear" and case.linear is not None:
        found, dtype = linear_work(*case.linear), "float32"
    elif case.kind == "layer" and case.problem is not None:
        found = (tucker.work if isinstance(case.problem, TuckerConv2dProblem) else work)(case.problem, form)
        dtype = str(case.problem.dtype).removeprefix("torch.")
    else:
        return {}
    bound = found.seconds(peaks.flops_per_s[dtype], peaks.bytes_per_s)
    return {"flops": found.flops, "bytes": found.bytes, "roofline_s": bound}


def _judged(row: Row) -> bool:
    """Whether a result must keep all rules: what our kernels gave, and networks of them that no compiler changed."""
    return row.form == "fused" and not (row.kind == "network" and row.engine == "ours_compiled")


def _dtype(case: Case) -> torch.dtype:
    return case.problem.dtype if case.problem is not None else torch.float32


class Runner:
    """Measures the cases of one suite.

    Args:
        suite: what is measured.
        engines: by whom, in the order of a round.
        pool: their processes.
        peaks: of this machine, for the roofline.
        context: what every row carries.
        options: how.
        say: where progress goes.
    """

    def __init__(
        self, suite: Suite, engines: Sequence[str], pool: Pool, peaks: Peaks, context: dict[str, Any],
        options: Options, say: Say,
    ) -> None:  # fmt: skip
        self.suite = suite
        self.engines = tuple(engines)
        self.pool = pool
        self.peaks = peaks
        self.context = context
        self.options = options
        self.say = say
        self._best_probe = math.inf

    def run(self, case: Case) -> list[Row]:
        """All rows of a case: one a method, or one that says why an engine has none."""
        with tempfile.TemporaryDirectory(prefix="basisconv-bench-") as name:
            folder = Path(name)
            made = payload.build(case, folder / "case")
            if case.kind == "memory":
                return [row for engine in self._engines_for(case) for row in self._memory(case, engine, made, folder)]
            return self._times(case, made, folder)

    def _engines_for(self, case: Case) -> list[str]:
        """The engines that this kind of case is for."""
        return [name for name in self.engines if find(name).takes(case.kind, case.forms)]

    def _row(self, case: Case, engine: str, **fields: Any) -> Row:
        values: dict[str, Any] = {"form": "", "layout": "", "time": now(), **fields}
        parts = [[part.case, part.count, part.converted] for part in case.parts]
        values["problem"] = rows.describe(case.problem) if case.problem is not None else {}
        return Row(self.suite.name, case.id, case.kind, engine, parts=parts, context=self.context, **values)

    def _prepare(
        self, case: Case, engine: str, worker: WorkerProcess, made: payload.Payload, folder: Path
    ) -> tuple[list[_Entry], list[Row]]:
        """Build the engine's methods and pass each through the gate: (those that may be timed, rows of the others)."""
        answer = worker.ask("prepare", folder=str(made.folder))
        if "unsupported" in answer:
            return [], [self._row(case, engine, status="missing", reason=answer["unsupported"])]
        passed: list[_Entry] = []
        others: list[Row] = []
        for number, method in enumerate(answer["methods"]):
            written = worker.ask("output", method=number, prefix=str(folder / f"result-{number}"))
            results = gate.load(written["outputs"])
            row = self._row(case, engine, status="ok", work=_work_of(case, method["form"], self.peaks), **method)
            try:
                row.error = gate.check(results, made.answers[method["form"]], _dtype(case), _judged(row))
            except gate.WrongResultError as wrong:
                found = {key: value for key, value in wrong.found.items() if math.isfinite(value)}
                others.append(replace(row, status="failed", reason=str(wrong), error=found))
                continue
            passed.append(_Entry(row, number))
        return passed, others

    def _times(self, case: Case, made: payload.Payload, folder: Path) -> list[Row]:
        entries: dict[str, list[_Entry]] = {}
        done: list[Row] = []
        for engine in self._engines_for(case):
            self.say(f"{self.suite.name} {case.id}: {engine} prepares and is checked")
            try:
                worker = self.pool.get(engine)
                entries[engine], others = self._prepare(case, engine, worker, made, folder)
                done += others
            except EngineMissingError as why:
                done.append(self._row(case, engine, status="missing", reason=str(why)))
            except WorkerDiedError as why:
                self.pool.drop(engine)
                entries.pop(engine, None)
                done.append(self._row(case, engine, status="died", reason=str(why)))
        done += self._rounds(case, entries)
        for engine, kept in entries.items():
            done += [replace(entry.row, time=now()) for entry in kept]
            try:
                self.pool.get(engine).ask("release")
            except WorkerDiedError:  # its samples stand; the next case gets a fresh process
                self.pool.drop(engine)
        return done

    def _rounds(self, case: Case, entries: dict[str, list[_Entry]]) -> list[Row]:
        """A B C A B C …: each round asks every method of every engine for one sample; returns rows of the dead.

        Rounds in which a probe found the core slow are taken again as long as the options allow; the quietest stay.
        """
        dead: list[Row] = []
        slowest: list[float] = []  # probe of each round
        wanted = self.options.rounds
        while len(slowest) < wanted or (
            len(slowest) < wanted * self.options.more_rounds
            and sum(probe <= quiet.SLOWER * self._best_probe for probe in slowest) < wanted
        ):
            self.say(f"{self.suite.name} {case.id}: round {len(slowest) + 1} of {wanted}")
            slowest.append(0.0)
            for engine in list(entries):
                try:
                    worker = self.pool.get(engine)
                    for entry in entries[engine]:
                        slowest[-1] = max(slowest[-1], self._sample(worker, entry))
                except WorkerDiedError as why:
                    self.pool.drop(engine)
                    del entries[engine]
                    dead.append(self._row(case, engine, status="died", reason=str(why)))
        kept = quiet.quietest(slowest, wanted)
        for entry in (entry for found in entries.values() for entry in found):
            entry.row.samples = [entry.samples[number] for number in kept]
            entry.row.disturbed = sum(entry.probes[number] > quiet.SLOWER * self._best_probe for number in kept)
        return dead

    def _sample(self, worker: WorkerProcess, entry: _Entry) -> float:
        """One more sample of a method; returns the slower of the probes around it."""
        if not entry.samples:
            seconds = self.options.sample_s * (NETWORK_SAMPLE if entry.row.kind == "network" else 1)
            sized = worker.ask("calibrate", method=entry.method, seconds=seconds)
            entry.row.calls = sized["calls"]
        got = worker.ask(
            "sample", method=entry.method, calls=entry.row.calls, patience_s=self.options.patience_s,
            best_probe=self._best_probe if math.isfinite(self._best_probe) else 0.0,
        )  # fmt: skip
        self._best_probe = min(self._best_probe, got["best_probe"])
        entry.samples.append(got["seconds"])
        entry.probes.append(got["probe"])
        return float(got["probe"])

    # --- memory -------------------------------------------------------------------------------------------------------

    def _memory(self, case: Case, engine: str, made: payload.Payload, folder: Path) -> list[Row]:
        """Peak memory of every method's first call, each in a fresh process that ran a tiny case before."""
        self.say(f"{self.suite.name} {case.id}: {engine} memory")
        assert case.problem is not None
        tiny = replace(case.problem, N=1, C=8, K=8, Q=min(case.problem.Q, 8), H=8, W=8)
        small = payload.build(replace(case, problem=tiny), folder / "tiny")
        found: list[Row] = []
        try:
            with WorkerProcess(engine, memory_environment(self.options.threads)) as worker:
                answer = worker.ask("prepare", folder=str(made.folder))
            if "unsupported" in answer:
                return [self._row(case, engine, status="missing", reason=answer["unsupported"])]
            for number, method in enumerate(answer["methods"]):
                with WorkerProcess(engine, memory_environment(self.options.threads)) as worker:
                    worker.ask("prepare", folder=str(small.folder))
                    worker.ask("output", method=number, prefix=str(folder / "tiny-result"))
                    worker.ask("prepare", folder=str(made.folder))
                    measured = worker.ask("memory", method=number)
                    written = worker.ask("output", method=number, prefix=str(folder / "result"))
                found.append(self._memory_row(case, engine, method, measured, written["outputs"], made))
        except EngineMissingError as why:
            found.append(self._row(case, engine, status="missing", reason=str(why)))
        except WorkerDiedError as why:
            found.append(self._row(case, engine, status="died", reason=str(why)))
        shutil.rmtree(folder / "tiny", ignore_errors=True)
        return found

    def _memory_row(
        self, case: Case, engine: str, method: dict[str, str], measured: dict[str, Any], outputs: list[str],
        made: payload.Payload,
    ) -> Row:  # fmt: skip
        row = self._row(case, engine, status="ok", **method)
        try:
            answers = made.answers[method["form"]]  # type: ignore[index]
            row.error = gate.check(gate.load(outputs), answers, _dtype(case), _judged(row))
        except gate.WrongResultError as wrong:
            return replace(row, status="failed", reason=str(wrong))
        if "unsupported" in measured:
            return replace(row, status="missing", reason=measured["unsupported"])
        assert case.problem is not None
        size = tensors(case.problem)
        row.memory = {
            "extra_bytes": max(0, measured["added_bytes"] - size.output),
            "output_bytes": size.output,
            "maps_bytes": size.maps,
            "im2col_bytes": im2col_bytes(case.problem),
        }
        return row
