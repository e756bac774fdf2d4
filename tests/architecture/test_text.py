"""Cheap hygiene of every text file: no paths of one machine, no promise without an event, no long files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = (".py", ".cpp", ".cu", ".cuh", ".h")
TEXT = (*CODE, ".md", ".toml", ".yaml", ".yml", ".txt", ".j2", ".cfg", ".in", "")
SKIPPED = ("build", "dist", "out", "results")
MOST_LINES = 400

# Spelled in pieces so that this file does not contain what it looks for.
MACHINE = re.compile(r"(?<![\w.:/])/(?:" + "|".join(("work", "root", "home", "Users", "mnt", "tmp")) + r")/\w")
PROMISE = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b(?!\(\w[^)]*\):)")


def files() -> list[Path]:
    """What git tracks or would track; outside a checkout, every file that is not hidden."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix in TEXT and not set(path.relative_to(ROOT).parts) & set(SKIPPED)
    )


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def test_there_are_files_to_look_at():
    assert Path(__file__) in files()


def test_no_path_of_one_machine():
    assert lines_with(MACHINE) == []


def test_no_promise_without_its_event():
    """``TODO(event): …`` names what has to happen first."""
    assert [line for line in lines_with(PROMISE) if not line.startswith("tests/architecture/test_text.py")] == []


@pytest.mark.parametrize(
    "path", [path for path in files() if path.suffix in CODE], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_files_stay_short(path):
    """About 300 lines; past that, split by variant."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("ending", [" \n", "\t\n", "\r\n"], ids=["space", "tab", "carriage return"])
def test_lines_end_cleanly(ending):
    wrong = [path.relative_to(ROOT).as_posix() for path in files() if ending.encode() in path.read_bytes()]
    assert wrong == []
