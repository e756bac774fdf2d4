"""``make gpu-check``: is everything right on this device. The order is that of what the next step relies on.

1. The library: the one that was carried here where it loads and has CUDA kernels, else built in place.
2. Each wrapper of ``csrc/cuda/device.h`` and ``hopper.h`` alone, every swizzle and N.
3. Triton in bfloat16: what its interpreter cannot show.
4. The rest of the tests marked ``gpu``, those of the CUDA and Triton kernels first.
5. ``compute-sanitizer`` on one small shape a kernel, each of its four tools.
6. The tests of the CPU kernels with this machine's torch and Python: one library for all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import facts
from bench.gpu.journal import PASSED, SKIPPED, WRONG, Journal, Step, Unavailable
from bench.gpu.supervise import supervise

BUILD_SECONDS = 420.0
POLL = 0.2  # seconds
PYTEST = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors")


class Phase(NamedTuple):
    """Tests that run together, in a process of their own."""

    name: str
    arguments: tuple[str, ...]


PHASES = (
    Phase("wrappers", ("tests/gpu/test_wrappers.py", "-m", "gpu")),
    Phase("bfloat16 in Triton", ("tests/triton/test_basis_conv2d_gpu.py", "-m", "gpu", "-k", "tile_table and bfloat")),
    Phase("kernels", ("tests/gpu", "tests/triton", "tests/ops/test_basis_conv2d_cuda.py", "-m", "gpu and not full")),
    Phase("ops", ("tests/ops", "-m", "gpu and not full")),
    Phase("large", ("tests/gpu", "tests/triton", "tests/ops", "-m", "gpu and full", "--full")),
    Phase("elsewhere", ("tests", "-m", "gpu and not full")),
    Phase("one library", ("tests/ops", "tests/packaging/test_cuda_build.py", "-m", "not gpu and not full")),
)
SANITIZER = "compute-sanitizer"  # before the large tests
NAMES = tuple(name for phase in PHASES for name in ([SANITIZER] * (phase.name == "large") + [phase.name]))


# --- the library ------------------------------------------------------------------------------------------------------

LOOK = """
import json
from basisconv_kernels.core import extension
print(json.dumps([extension.load(), extension.facts(), str(extension._find())]))
"""


def library() -> dict[str, Any]:
    """Use the library that is there, or build one in place.

    Raises:
        Unavailable: it cannot be built; Triton is checked nevertheless.
    """

    def look() -> list[Any]:
        done = subprocess.run([sys.executable, "-c", LOOK], cwd=facts.ROOT, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else [done.stderr.strip()[-500:], {}, None]

    absent, about, path = look()
    if absent is None and "cuda" in about:
        return {"library": "carried", "path": path, "facts": about}
    carried = absent or "it has no CUDA kernels"
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=facts.ROOT, capture_output=True,
        text=True, check=False, env={**os.environ, "BASISCONV_BUILD": "cuda"},
    )  # fmt: skip
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise Unavailable(f"carried library: {carried}; building one: {' / '.join(lines[-4:])}")
    absent, about, path = look()
    if absent is not None or "cuda" not in about:
        raise Unavailable(f"the library was built and does not serve: {absent or about}")
    return {"library": "built", "before": carried, "path": path, "facts": about}


def library_step(about: Mapping[str, Any]) -> Step:
    """The first step of every command."""
    return Step("library", library, BUILD_SECONDS / 2, BUILD_SECONDS, facts.stamp(dict(about), ours=True))


# --- the run ----------------------------------------------------------------------------------------------------------


def phase_command(phase: Phase, journal: Path, deadline: float, device: str, part: str = "0/1") -> list[str]:
    """The pytest that runs a phase, or the part I/N of it."""
    noting = ["-p", "bench.gpu.pytest_journal", "--journal", str(journal), "--journal-deadline", str(deadline)]
    noting += ["--journal-device", device, "--journal-part", part]
    return [sys.executable, "-m", "pytest", *phase.arguments, *PYTEST, *noting]


def run(
    folder: Path,
    deadline: float,
    device: str,
    tick: Any,
    phases: Sequence[Phase] = PHASES,
    jobs: int = 1,
    only: Sequence[str] = NAMES,
) -> list[str]:
    """The phases asked for, each in ``jobs`` processes at once; what could not be run, in words.

    Most of the time goes into compiling and into references, so a device serves several processes as quickly as one.
    Tests that take gigabytes run alone.
    """
    journal = Journal(folder / "check.jsonl")
    own = [sys.executable, "-m", "bench.gpu", "work", "--folder", str(folder), "--deadline", str(deadline)]
    own += ["--device", device]
    commands: dict[str, list[list[str]]] = {"library": [[*own, "library"]]}
    for phase in phases:
        if phase.name == "large":
            commands[SANITIZER] = [[*own, "--part", f"{i}/{jobs}", "sanitizer"] for i in range(jobs)]
        n = 1 if phase.name == "large" else jobs
        commands[phase.name] = [
            phase_command(phase, journal.part(i).path, deadline, device, f"{i}/{n}") for i in range(n)
        ]
    troubles = []
    for name, parts in commands.items():
        if name in NAMES and name not in only:
            continue
        found = _at_once(parts, journal, deadline, folder, tick)
        troubles += [f"{name}: {trouble}" for trouble in dict.fromkeys(filter(None, found))]
    return troubles


def _at_once(
    commands: Sequence[Sequence[str]], journal: Journal, deadline: float, folder: Path, tick: Any
) -> list[str]:
    """Supervise all commands until they end, each with a journal and a log of its own; their troubles."""
    environment = {"PYTHONPATH": os.pathsep.join([str(facts.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if len(commands) > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(commands)))

    def supervised(i: int, command: Sequence[str]) -> str:
        log = folder / ("log.txt" if i == 0 else f"log.{i}.txt")
        return supervise(command, journal.part(i), deadline, log, environment=environment)

    with ThreadPoolExecutor(len(commands)) as pool:
        running = [pool.submit(supervised, i, command) for i, command in enumerate(commands)]
        while not all(one.done() for one in running):
            tick()
            time.sleep(POLL)
        return [one.result() for one in running]


# --- summary ----------------------------------------------------------------------------------------------------------


def summary(journal: Journal) -> tuple[str, bool]:
    """A table for people, and whether anything was wrong; only lines of the newest stamp count."""
    last = journal.last()
    newest = next((line["stamp"] for line in reversed(list(last.values())) if line.get("stamp")), "")
    # What does not depend on our sources has a stamp that is the beginning of the others.
    rows = {
        key: line
        for key, line in last.items()
        if newest.startswith(line.get("stamp", "")) or line.get("stamp", "").startswith(newest)
    }
    counts = Counter(line["status"] for line in rows.values())
    text = [newest, "  ".join(f"{status} {n}" for status, n in sorted(counts.items())) or "nothing ran"]
    for key, line in rows.items():
        if line["status"] in WRONG:
            text.append(f"{line['status'].upper()} {key}: {_first(line)}")
    reasons = Counter(_first(line) for line in rows.values() if line["status"] == SKIPPED)
    text += [f"skipped {n}: {reason}" for reason, n in reasons.most_common()]
    wrong = any(counts[status] for status in WRONG)
    return "\n".join(text) + "\n", wrong or not counts[PASSED]


def _first(line: Mapping[str, Any]) -> str:
    return (str(line.get("note") or "").splitlines() or [""])[0][:300]


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def sanitizer_steps(about: Mapping[str, Any], part: int = 0, parts: int = 1) -> list[Step]:
    """Every tool on every small call of ``bench.gpu.small``; or every ``parts``-th of these from ``part`` on."""
    from bench.gpu import small

    stamp = facts.stamp(dict(about), ours=True)
    steps = [
        Step(f"{tool} {name}", lambda tool=tool, name=name: _sanitize(tool, name), 25, 240, stamp)  # type: ignore[misc]
        for tool in SANITIZERS
        for name in small.CALLS
    ]
    return steps[part::parts]


def _sanitize(tool: str, name: str) -> dict[str, Any]:
    sanitizer = facts.tools()["compute-sanitizer"]
    if sanitizer is None:
        raise Unavailable("compute-sanitizer is not on the path")

    def told_by(*filtering: str) -> tuple[int, str]:
        command = [sanitizer, "--tool", tool, *filtering, "--error-exitcode", "99", "--print-limit", "5"]
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.gpu.small", name], cwd=facts.ROOT, capture_output=True, text=True,
            check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(facts.ROOT)},
        )  # fmt: skip
        return done.returncode, (done.stdout + done.stderr).strip()

    # Our kernels only: it is quicker, and what a library reads of its own workspace is not our concern.
    status, told = told_by("--kernel-regex", "kns=conv2d")
    if status not in (0, 3, 99):
        status, told = told_by()
    if "not supported" in told.lower() or "LibraryNotLoaded" in told:
        raise Unavailable(f"compute-sanitizer does not work here: {_line(told, 'not')}")
    if "Internal Sanitizer Error" in told:  # racecheck on kernels that share out their registers anew
        raise Unavailable(f"compute-sanitizer itself fails on this kernel: {_line(told, 'Internal Sanitizer Error')}")
    if status == 3:
        raise Unavailable(told.splitlines()[-1])
    if status != 0:
        raise RuntimeError(f"{tool} ended with {status}: {told[-1500:]}")
    return {"said": _line(told, "ERROR SUMMARY") or _line(told, "RACECHECK SUMMARY")}


def _line(text: str, word: str) -> str:
    return next((line.strip() for line in text.splitlines() if word in line), "")
