"""The package built by other compilers than the one at hand."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import pytest

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("portable")]

SETS = ["base", "avx2", "avx512", "avx512_vpopcntdq", "avx512_bf16", "amx"]


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
        assert clang.cpu()["built"] == SETS


REFUSES = """#!/bin/sh
for argument in "$@"; do
  case "$argument" in {option}*) echo "error: unrecognized command-line option '$argument'" >&2; exit 1;; esac
done
exec {compiler} "$@"
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="has one instruction set only")
@pytest.mark.parametrize(
    ("option", "built"),
    [("-mamx", SETS[:5]), ("-mavx512bf16", SETS[:4]), ("-mavx512", SETS[:2]), ("-mavx", SETS[:1])],
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
    left_out = ", ".join(SETS[len(built) :])
    assert f"CPU kernels ({', '.join(built)}) without {left_out} ({script}: error: unrecognized" in line
    facts = outside.cpu()
    assert facts["built"] == built
    assert facts["in_use"] in built
    log = outside.pytest("tests/ops/test_basis_conv2d.py", "-k", "test_result or test_packed")
    assert log.returncode == 0, log.stdout[-6000:]
