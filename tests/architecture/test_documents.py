"""Commands, options, targets, links and examples of the documents exist and run, and no variable is missing there."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "bench").rglob("*.md")])
PACKAGE = ROOT / "basisconv_kernels"
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}

documents = pytest.mark.parametrize("name", TEXTS)


def typed(*starts: str) -> list[tuple[str, list[str]]]:
    """Command lines with such a start in code blocks and code spans, as (document, words)."""
    found = []
    for name, text in TEXTS.items():
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += [line for line in text.splitlines() if line.startswith("    ")]
        lines += re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            if line.strip().startswith(starts):
                found.append((name, shlex.split(line, comments=True)))
    assert found, starts
    return found


@documents
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[name]):
        assert "://" in target or (ROOT / name).parent.joinpath(target).exists(), target


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, (_, *words) in typed("make "):
        assert words[0] in targets, (name, words)


@pytest.mark.parametrize(
    ("start", "module"), [("basisconv ", "basisconv_kernels.cli"), ("python -m bench ", "bench.__main__")]
)
def test_commands_take_the_options_that_documents_give_them(start, module):
    typer = pytest.importorskip("typer")
    commands = typer.main.get_command(importlib.import_module(module).app).commands
    for name, words in typed(start):
        command, *rest = words[len(start.split()) :]
        if "|" in command:
            assert set(command.split("|")) == set(commands), name
            continue
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, (name, words)


def test_every_environment_variable_is_documented():
    used = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]:
        used |= set(re.findall(r'"(BASISCONV_[A-Z_]+)"', path.read_text(encoding="utf-8")))
    documented = set(re.findall(r"^\| `(BASISCONV_[A-Z_]+)`", TEXTS["docs/env.md"], re.MULTILINE))
    assert used == documented


def with_examples() -> list[str]:
    """Modules whose docstrings hold examples."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]


@pytest.mark.parametrize("module", with_examples())
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
