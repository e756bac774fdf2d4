"""``python -m bench.gpu check|bench|probe|keep``, by way of ``make gpu-check`` and so on.

Installs nothing and asks nobody. What is measured lies in ``out/gpu`` and, packed, in ``--out``; run again, it goes on.

``keep`` puts rows into the repository: files of results, the table of automatic choice, and documents.

Exit status: 0 all that ran was right; 1 something was wrong, or nothing ran; 2 no CUDA device, or wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import check, facts
from bench.gpu.archive import Archive, take_up
from bench.gpu.journal import Journal, work
from bench.gpu.supervise import REPLACE_ME, supervise

FOLDER = facts.ROOT / "out" / "gpu"
BUDGETS = {"check": 540.0, "bench": 480.0, "probe": 420.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    commands = root.add_subparsers(dest="command", required=True)
    for name, budget in BUDGETS.items():
        command = commands.add_parser(name)
        command.add_argument("--budget", type=float, default=budget, help=f"seconds (default {budget:.0f})")
        command.add_argument("--out", type=Path, default=FOLDER.parent, help="folder of the archive (default out)")
        command.add_argument(
            "--resume", type=Path, help="archive of an earlier run, or bench/results/DEVICE: its rows are done"
        )
        command.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
        command.add_argument("--folder", type=Path, default=FOLDER, help="where the rows are kept (default out/gpu)")
        if name == "check":
            command.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
            command.add_argument("--only", help=f"one of its parts: {', '.join(check.NAMES)}", choices=check.NAMES)
    kept = commands.add_parser("keep", help="put rows into bench/results, and make tables and documents of those")
    kept.add_argument("sources", nargs="*", type=Path, help="archives or folders of runs; none: those that are kept")
    worker = commands.add_parser("work", help="what the others run, again and again")
    worker.add_argument("what", choices=("library", "sanitizer", "bench", "probe"))
    worker.add_argument("--folder", type=Path, required=True)
    worker.add_argument("--deadline", type=float, required=True)
    worker.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    worker.add_argument("--part", default="0/1", help="I/N: of processes that share the sanitizer's calls")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    asked = parser().parse_args(arguments)
    if asked.command == "work":
        return _work(asked)
    if asked.command == "keep":
        return _keep(asked.sources)
    started = time.time()
    folder: Path = asked.folder / asked.command
    folder.mkdir(parents=True, exist_ok=True)
    archive = Archive(folder, asked.out, f"gpu-{asked.command}")
    if asked.resume is not None:
        try:
            print(f"{take_up(asked.resume, folder)} rows taken up from {asked.resume.name}")
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    if asked.device == "cuda" and (missing := facts.no_device()) is not None:
        text = f"gpu-{asked.command}: {missing}; nothing was run. A rehearsal on the CPU: --device cpu\n"
        _finish(folder, archive, text)
        return 2
    absent = [name for name, path in facts.tools().items() if path is None]
    print(f"not on the path: {', '.join(absent) or 'nothing'}; what needs them is skipped with its reason", flush=True)
    troubles = _run(asked, folder, started + asked.budget, archive)
    text, wrong = _summary(asked.command, folder)
    text += "".join(f"not finished: {trouble}\n" for trouble in troubles)
    _finish(folder, archive, text)
    return 1 if wrong else 0


def _run(asked: argparse.Namespace, folder: Path, deadline: float, archive: Archive) -> list[str]:
    if asked.command == "check":
        only = check.NAMES if asked.only is None else (asked.only,)
        return check.run(folder, deadline, asked.device, archive.now_and_then, jobs=max(1, asked.jobs), only=only)
    journal = Journal(folder / f"{asked.command}.jsonl")
    command = [sys.executable, "-m", "bench.gpu", "work", "--folder", str(folder), "--deadline", str(deadline)]
    environment = {"PYTHONPATH": os.pathsep.join([str(facts.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    trouble = supervise(
        [*command, "--device", asked.device, asked.command], journal, deadline, folder / "log.txt",
        environment=environment, tick=archive.now_and_then,
    )  # fmt: skip
    return [trouble] if trouble else []


def _summary(command: str, folder: Path) -> tuple[str, bool]:
    journal = Journal(folder / f"{command}.jsonl")
    if command == "bench":
        from bench.gpu import report

        return report.summary(journal)
    text, wrong = check.summary(journal)
    if command == "probe":
        rows = [f"{key}: {json.dumps(line['data'])}\n" for key, line in journal.last().items() if line.get("data")]
        text += "".join(rows)
    return text, wrong


def _finish(folder: Path, archive: Archive, text: str) -> None:
    (folder / "summary.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"written: {archive.pack().name}", flush=True)


def _keep(sources: Sequence[Path]) -> int:
    from bench.gpu import documents, keep

    try:
        written = [*(keep.keep(sources) if sources else []), *documents.write()]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("".join(f"{path.relative_to(facts.ROOT)}\n" for path in written) or "nothing changed\n", end="")
    return 0


def _work(asked: argparse.Namespace) -> int:
    began, about = time.time(), facts.context(asked.device)
    name = {"library": "check", "sanitizer": "check"}.get(asked.what, asked.what)
    part, parts = (int(number) for number in asked.part.split("/"))
    journal = Journal(asked.folder / f"{name}.jsonl", about).part(part)
    steps = []
    if asked.device == "cuda" and asked.what != "sanitizer":
        work([check.library_step(about)], journal, asked.deadline)
        row = journal.last().get("library", {})
        if row.get("data", {}).get("library") == "built" and row["at"] > began:
            return REPLACE_ME  # this process has already looked for a library, in vain
    if asked.what == "sanitizer":
        steps = check.sanitizer_steps(about, part, parts)
    elif asked.what == "bench":
        from bench.gpu import bits, chains, filters_of_bits, layers, networks, timing

        meter = timing.meter(asked.device)
        rows = layers.steps(about, asked.device, meter)
        parts = (bits, filters_of_bits, chains, networks)
        beyond = [step for part in parts for step in part.steps(about, asked.device, meter)]
        # The layers that count, then layers of bits, chains and a taste of all, then the rest.
        steps = [*rows[: layers.FIRST], *beyond, *rows[layers.FIRST :]]
    elif asked.what == "probe":
        from bench.gpu import probe

        steps = probe.steps(about, asked.device)
    finished = work(steps, journal, asked.deadline, healthy=lambda: facts.answers(asked.device))
    return 0 if finished else REPLACE_ME


if __name__ == "__main__":
    sys.exit(main())
