"""Compiles CUDA sources against the CPU side of their primitives into a Python module of the tests.

A module is built once for a content of its sources and kept under ``build/``; nothing of it is ever installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CUDA = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "cuda_on_cpu"
# _longjmp between stacks is what fibers are; glibc's check of it must be off.
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]


def compiler() -> list[str]:
    """The C++ compiler; skips the test where there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler ({command[0]})")
    return command


def _fingerprint(sources: list[Path], options: list[str], root: Path) -> str:
    digest = hashlib.sha256(repr((options, sys.version_info[:2], compiler())).encode())
    headers = [
        path
        for part in ("csrc/common", "csrc/cuda", "csrc/ops", HERE.relative_to(ROOT))
        for path in sorted((root / part).rglob("*.h"))
    ]
    for path in (*sources, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, sources: list[Path], *options: str, root: Path = ROOT) -> ModuleType:
    """Compile ``sources`` (``.cu`` and ``.cpp``, of a checkout at ``root``) and import the module."""
    path = KEPT / f"{name}_{_fingerprint(sources, list(options), root)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        _compile(path, sources, [f"-DMODULE_NAME={name}", f"-I{root / 'tests' / 'cuda_on_cpu'}", *options])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(path: Path, sources: list[Path], options: list[str]) -> None:
    """All sources as one: their common headers cost more than they do."""
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.mkdir(parents=True)
    together = scratch / "together.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    linked = scratch / path.name
    command = [*compiler(), *FLAGS, *options, *includes, "-shared", together, "-o", linked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    linked.replace(path)  # whole or not at all: another process may be building the same
    shutil.rmtree(scratch)


def plant(root: Path, faults: Iterable[tuple[str, str, str]]) -> Path:
    """Copy the sources to ``root`` and plant faults, each behind its number (from 1) in the variable ``planted``.

    Args:
        faults: file in ``csrc/cuda``, the right text, the wrong one in which "#" is the number.

    Returns:
        Path: the folder of the planted kernels.
    """
    for part in ("csrc", "tests/cuda_on_cpu"):
        shutil.copytree(ROOT / part, root / part)
    folder = root / "csrc" / "cuda"
    for number, (name, right, wrong) in enumerate(faults, 1):
        source = folder / name
        text = source.read_text(encoding="utf-8")
        assert text.count(right) == 1, right
        source.write_text(text.replace(right, wrong.replace("#", str(number))), encoding="utf-8")
    fibers = root / "tests" / "cuda_on_cpu" / "fibers.h"
    fibers.write_text("#pragma once\ninline int planted = 0;\n" + fibers.read_text(encoding="utf-8"), encoding="utf-8")
    return folder
