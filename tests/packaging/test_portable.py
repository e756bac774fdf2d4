"""The portable kernels compile for other processors and with other compilers, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("basis_conv2d.cpp", "basis_conv2d_plan.cpp", "isa.cpp")


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++", "g++"])
@pytest.mark.parametrize("source", SOURCES)
def test_base_kernels_compile(tmp_path: Path, compiler: str, source: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
    done = subprocess.run(
        [compiler, "-std=c++20", "-O1", *strict, "-DBASISCONV_ISA=base", "-c", ROOT / "csrc" / "cpu" / source,
         "-o", tmp_path / "object.o"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
