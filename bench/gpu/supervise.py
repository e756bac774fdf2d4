"""Runs a working process and replaces it when it dies, hangs, or asks for that, until its work or the time is over.

Kernels that nobody has seen on a device may fault, which ends CUDA for their process, or wait for ever. Both cost one
step here: the journal says which one was under way, it is noted as died or hung, and a fresh process goes on behind it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.gpu.journal import DIED, HUNG, Journal

REPLACE_ME = 75
"""Exit status of a working process that wants a fresh one to go on."""

POLL = 0.1  # seconds
START_PATIENCE = 240.0  # seconds until the first step begins: importing torch on a cold disk
MOST_LOSSES = 40  # processes lost before it is given up


def supervise(
    command: Sequence[str],
    journal: Journal,
    deadline: float,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    tick: Callable[[], None] = lambda: None,
    start_patience: float = START_PATIENCE,
) -> str:
    """Run a command again and again until it ends with 0.

    Args:
        command: a process that works off steps through ``journal`` and ends with 0, or ``REPLACE_ME``.
        journal: the same.
        deadline: seconds since the epoch; whatever runs then is ended, its step stays open.
        log: gets all output.
        environment: added to that of this process.
        tick: called about once a second.
        start_patience: seconds that a process may be silent before its first step.

    Returns:
        str: empty when all is done, else why not, in words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MOST_LOSSES):
        if time.time() >= deadline:
            return "the time is over"
        began = log.stat().st_size if log.exists() else 0
        before = _size(journal)
        with log.open("ab") as output:
            child = subprocess.Popen(
                list(command), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        try:
            fate = _watch(child, journal, deadline, tick, start_patience)
        finally:
            _end(child)
        tail = _tail(log, began)
        open_step = journal.open() if _size(journal) > before else None
        if fate == "late":
            return "the time is over"
        if open_step is not None:
            how = f"exit status {child.returncode}" if fate == "ended" else "silent for too long"
            journal.end(
                open_step["key"], DIED if fate == "ended" else HUNG, open_step.get("stamp", ""),
                note=f"{how}; its last words: {tail}", data={},
            )  # fmt: skip
        elif fate == "silent":
            return f"the process did not begin a step within {start_patience:.0f} s: {tail}"
        elif child.returncode == 0:
            return ""
        elif child.returncode != REPLACE_ME:
            return f"the process ended with status {child.returncode}: {tail}"
        elif _size(journal) == before:
            return f"the process asked for a fresh one without doing anything: {tail}"
    return f"{MOST_LOSSES} processes were lost"


def _watch(
    child: subprocess.Popen[bytes], journal: Journal, deadline: float, tick: Callable[[], None], start_patience: float
) -> str:
    """``ended``, ``late`` or ``silent``."""
    size, heard, ticked, patience = _size(journal), time.time(), time.time(), start_patience
    while child.poll() is None:
        time.sleep(POLL)
        now = time.time()
        if _size(journal) != size:
            size, heard = _size(journal), now
            open_step = journal.open()
            patience = start_patience if open_step is None else float(open_step.get("patience", start_patience))
        if now - ticked >= 1:
            tick()
            ticked = now
        if now >= deadline:
            return "late"
        if now - heard > patience:
            return "silent"
    return "ended"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(POLL)  # its children may need as long
    if child.poll() is None:
        child.wait(1)


def _size(journal: Journal) -> int:
    return journal.path.stat().st_size if journal.path.exists() else 0


def _tail(log: Path, start: int, most: int = 1500) -> str:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        return file.read().decode("utf-8", "replace").strip()
