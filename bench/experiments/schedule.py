"""Several trainings at once on one device, each in a process of its own, within a given time."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Job:
    """One experiment with one seed; ``after`` is the job whose network it starts from, or None."""

    name: str
    seed: int
    after: tuple[str, int] | None

    @property
    def key(self) -> tuple[str, int]:
        """Name and seed."""
        return self.name, self.seed


@dataclass
class Outcome:
    """What became of all jobs: those done, failed with the words of the error, and not begun or cut off."""

    done: list[Job]
    failed: dict[Job, str]
    left: list[Job]


def _serve(pipe: Connection, work: Callable[[str, int], Any]) -> None:
    """A worker: one job after the other, until the pipe closes."""
    while True:
        try:
            name, seed = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, work(name, seed)))
        except Exception:  # whatever a training dies of is its line in the log; the others go on
            pipe.send((False, traceback.format_exc()))


def run(
    jobs: Iterable[Job],
    work: Callable[[str, int], Any],
    *,
    workers: int,
    seconds: float,
    finished: Callable[[Job, Any], None],
) -> Outcome:
    """Do jobs in their order, each as soon as a worker is free and the job that it comes after is done.

    Args:
        jobs: the most important first; one may come after a job of this list, or after one that was done before.
        work: (name, seed) → result, called in the workers; importable, and what it leaves must be whole or not there.
        workers: processes.
        seconds: then what still runs is killed.
        finished: called here with each job's result.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    left, outcome = list(jobs), Outcome([], {}, [])
    pending = {job.key for job in left}
    processes: dict[Any, Any] = {}
    busy: dict[Any, Job] = {}  # by the pipe of the worker that does it
    for _ in range(min(workers, len(left))):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, work), daemon=True)
        process.start()
        there.close()
        processes[here] = process
    idle = list(processes)
    try:
        while (left or busy) and (remaining := end - time.monotonic()) > 0:
            for job in [job for job in left if job.after in {failed.key for failed in outcome.failed}]:
                left.remove(job)
                outcome.failed[job] = f"{job.after} failed"
            ready = [job for job in left if job.after not in pending]
            for pipe, job in zip(list(idle), ready, strict=False):
                idle.remove(pipe)
                left.remove(job)
                pipe.send(job.key)
                busy[pipe] = job
            if not busy:
                break
            for pipe in (pipe for pipe in wait(list(busy), timeout=min(remaining, 1.0)) if pipe in busy):
                job = busy.pop(pipe)
                try:
                    right, result = pipe.recv()
                except (EOFError, OSError):
                    right, result = False, "the process died"
                else:
                    idle.append(pipe)
                if right:
                    pending.discard(job.key)
                    finished(job, result)
                    outcome.done.append(job)
                else:
                    outcome.failed[job] = result
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join(10)
    outcome.left = [*busy.values(), *left]
    return outcome
