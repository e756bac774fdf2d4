"""The kernels on other compilers and processors: without torch where there is none, as a build of the package else."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "kernels_without_torch.cpp"
SOURCES = [ROOT / "csrc" / "cpu" / name for name in ("basis_conv2d.cpp", "basis_conv2d_plan.cpp", "isa.cpp")]
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
BASE = ["-DBASISCONV_ISA=base", "-DBASISCONV_WIDEST=base"]

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("portable")]

# Compiler → what runs its programs here, and how many geometries it has time for.
CROSS = {
    "g++": ([], 3000),
    "clang++": ([], 3000),
    "aarch64-linux-gnu-g++": (["qemu-aarch64-static"], 300),
}


@pytest.mark.parametrize("compiler", CROSS)
def test_base_kernels_compute_what_plain_loops_do(tmp_path: Path, compiler: str) -> None:
    """Also a compilation with all warnings as errors, without torch's headers."""
    runner, geometries = CROSS[compiler]
    for tool in (compiler, *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    program = tmp_path / "kernels_without_torch"
    static = ["-static"] if runner else []  # the emulator has no libraries of the other processor
    built = subprocess.run(
        [compiler, "-std=c++20", "-O2", *STRICT, *BASE, *static, PROGRAM, *SOURCES, "-o", program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*runner, program, "1", str(geometries)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(geometries), "geometries"]


def test_a_difference_is_found(tmp_path: Path) -> None:
    """The same program with a kernel that forgets the last output of some results."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    wrong = tmp_path / "csrc" / "cpu"
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    tests = tmp_path / "tests" / "packaging"
    tests.mkdir(parents=True)
    shutil.copy(PROGRAM, tests)
    source = (wrong / "basis_conv2d.cpp").read_text(encoding="utf-8")
    right = "const int64_t k = p * rows + row;"
    assert right in source
    (wrong / "basis_conv2d.cpp").write_text(source.replace(right, f"{right} if (k == 30) {{ packed++; continue; }}"))
    program = tmp_path / "kernels_without_torch"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            *BASE,
            tests / PROGRAM.name,
            *(wrong / path.name for path in SOURCES),
            "-o",
            program,
        ],
        check=True,
    )
    done = subprocess.run([program, "1", "3000"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected" in done.stderr


@pytest.fixture(scope="module")
def clang(outside: Any) -> Any:
    if shutil.which("clang++") is None:
        pytest.skip("no clang++ here")
    log = outside.install(outside.sources, BASISCONV_BUILD="cpu", CXX="clang++", CC="clang")
    assert log.returncode == 0, log.stdout[-6000:]
    return outside


def test_the_op_tests_pass_when_clang_compiled(clang: Any) -> None:
    log = clang.pytest("tests/ops/test_basis_conv2d.py", "tests/ops/test_basis_conv2d_native.py")
    assert log.returncode == 0, log.stdout[-6000:]
    if platform.machine() in ("x86_64", "AMD64"):
        assert clang.cpu()["built"] == ["base", "avx2", "avx512", "amx"]


REFUSES = """#!/bin/sh
for argument in "$@"; do
  case "$argument" in {option}*) echo "error: unrecognized command-line option '$argument'" >&2; exit 1;; esac
done
exec {compiler} "$@"
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="has one instruction set only")
@pytest.mark.parametrize(
    ("option", "built"),
    [("-mamx", ["base", "avx2", "avx512"]), ("-mavx512", ["base", "avx2"]), ("-mavx", ["base"])],
)
def test_what_the_compiler_does_not_know_is_left_out(outside: Any, option: str, built: list[str]) -> None:
    """An older compiler, played by one that refuses the options: it builds the rest, says so, and the rest runs."""
    if shutil.which("c++") is None:
        pytest.skip("no c++ here")
    script = outside.folder / "older"
    script.write_text(REFUSES.format(option=option, compiler=shutil.which("c++")), encoding="utf-8")
    script.chmod(0o755)
    shutil.rmtree(outside.site, ignore_errors=True)
    shutil.rmtree(outside.sources / "build", ignore_errors=True)
    log = outside.install(outside.sources, CXX=str(script), CC=str(script))
    assert log.returncode == 0, log.stdout[-6000:]
    (line,) = [line.strip() for line in log.stdout.splitlines() if "basisconv_kernels build:" in line]
    left_out = ", ".join(["base", "avx2", "avx512", "amx"][len(built) :])
    assert f"CPU kernels ({', '.join(built)}) without {left_out} ({script}: error: unrecognized" in line
    facts = outside.cpu()
    assert facts["built"] == built
    assert facts["in_use"] in built
    log = outside.pytest("tests/ops/test_basis_conv2d.py", "-k", "test_result or test_packed")
    assert log.returncode == 0, log.stdout[-6000:]
