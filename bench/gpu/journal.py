"""The journal of a run: one JSON line a step, written as it ends, read again by a run that goes on.

A step begins with a line of status ``started`` and ends with one of ``FINAL``. A line is whole or not there: it is
written by one call, and a last line without its end, of a process that was killed, is left out when reading. ``stamp``
says what a result belongs to (device, versions, sources): a line with another stamp is history, its step runs again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = "started"
PASSED, FAILED, SKIPPED, HUNG, DIED = "passed", "failed", "skipped", "hung", "died"
FINAL = (PASSED, FAILED, SKIPPED, HUNG, DIED)
WRONG = (FAILED, HUNG, DIED)


class Unavailable(Exception):
    """A step cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Step:
    """One piece of work.

    Attributes:
        key: its name, unique in its run.
        run: does it; returns JSON values, raises ``Unavailable`` where something is missing.
        seconds: how long it should take, to leave it out where that is more than what is left.
        patience: seconds of silence after which it hangs.
        stamp: what its result belongs to.
    """

    key: str
    run: Callable[[], Mapping[str, Any]]
    seconds: float = 5.0
    patience: float = 60.0
    stamp: str = ""


class Journal:
    """The lines of one file; ``context`` is added to every final line.

    Processes that work at once have a file each, ``check.jsonl``, ``check.1.jsonl`` and so on: every one writes into
    its own and knows what the others ended.
    """

    def __init__(self, path: Path, context: Mapping[str, Any] | None = None):
        self.path = path
        self.context = dict(context or {})

    def part(self, i: int) -> Journal:
        """The journal of the i-th process of several; the first one has this file."""
        return self if i == 0 else Journal(self.path.with_suffix(f".{i}{self.path.suffix}"), self.context)

    def whole(self) -> list[Journal]:
        """The journals of all processes that work at once, with this one."""
        first, *_, suffix = self.path.name.split(".")
        found = {self.path, *self.path.parent.glob(f"{first}.{suffix}"), *self.path.parent.glob(f"{first}.*.{suffix}")}
        return [Journal(path, self.context) for path in sorted(found)]

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
        with self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = end > 0 and file.read(1) != b"\n"  # what a killed process began stays a line of its own
            file.write((b"\n" if torn else b"") + text.encode())
            os.fsync(file.fileno())

    def start(self, key: str, stamp: str = "", patience: float = 60.0) -> None:
        """Say that a step begins."""
        self.write({"key": key, "status": STARTED, "stamp": stamp, "patience": patience, "at": time.time()})

    def end(self, key: str, status: str, stamp: str = "", **more: Any) -> None:
        """Say how a step ended; ``more`` is usually ``note``, ``seconds`` and ``data``."""
        self.write({"key": key, "status": status, "stamp": stamp, "at": time.time(), **more, "context": self.context})

    def lines(self) -> Iterator[dict[str, Any]]:
        """All whole lines."""
        if not self.path.exists():
            return
        for text in self.path.read_text("utf-8", "replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"key", "status"} <= line.keys():
                yield line

    def last(self) -> dict[str, dict[str, Any]]:
        """{key: its newest line} of this journal and those beside it, in the order of first appearance."""
        found: dict[str, dict[str, Any]] = {}
        for journal in self.whole():
            for line in journal.lines():
                before = found.get(line["key"])
                if before is None or before.get("at", 0) <= line.get("at", 0):
                    found[line["key"]] = line
        return found

    def done(self) -> set[tuple[str, str]]:
        """(key, stamp) of all steps that need not run again, whoever ended them."""
        lines = (line for journal in self.whole() for line in journal.lines())
        return {(line["key"], line.get("stamp", "")) for line in lines if line["status"] in FINAL}

    def open(self) -> dict[str, Any] | None:
        """The line of the step that began and did not end, if the newest is one."""
        newest = None
        for line in self.lines():
            newest = line
        return newest if newest is not None and newest["status"] == STARTED else None


def work(
    steps: Sequence[Step],
    journal: Journal,
    deadline: float,
    healthy: Callable[[], bool] = lambda: True,
    again: Callable[[], bool] = lambda: False,
) -> bool:
    """Run the steps that no earlier run ended, in their order, each that still fits into the time.

    Args:
        steps: by priority.
        journal: where they are noted.
        deadline: seconds since the epoch.
        healthy: asked after a failure: whether the device still answers. CUDA is lost for the process after a fault.
        again: asked before each step: whether this process has to end early, say because it holds too much memory.

    Returns:
        bool: True if all that fit were run; False if the process should be replaced by a fresh one that goes on.
    """
    done = journal.done()
    for step in steps:
        if (step.key, step.stamp) in done:
            continue
        if time.time() + step.seconds > deadline:
            continue  # a shorter one may still fit
        if again():
            return False
        journal.start(step.key, step.stamp, step.patience)
        began = time.time()
        status, note, data = PASSED, "", {}
        try:
            data = dict(step.run())
        except Unavailable as reason:
            status, note = SKIPPED, str(reason)
        except Exception as error:  # any failure of a kernel is a result
            status, note = FAILED, f"{type(error).__name__}: {error}"[:2000]
        journal.end(step.key, status, step.stamp, note=note, seconds=round(time.time() - began, 3), data=data)
        if status == FAILED and not healthy():
            return False
    return True
