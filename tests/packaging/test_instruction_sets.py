"""All tests of the native kernels once more on each instruction set below the widest; a process has only one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from basisconv_kernels.core import extension

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "ops/test_binary_conv2d.py",
    "ops/test_bitpack.py",
    "ops/test_basis_conv2d.py",
    "ops/test_basis_conv2d_autograd.py",
    "layers/test_packing.py",
)
GEOMETRIES = 5_000  # a dtype

CPU = extension.facts().get("cpu", {})
BELOW = [name for name in CPU.get("built", []) if name != CPU["in_use"]]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(extension.load() is not None, reason=f"cpu: {extension.load()}"),
]


@pytest.mark.parametrize("instruction_set", BELOW)
def test_the_long_op_tests_pass(request: pytest.FixtureRequest, instruction_set: str) -> None:
    if CPU["built"].index(instruction_set) > CPU["built"].index(CPU["processor"]):
        pytest.skip(f"this processor has {CPU['processor']} at most")
    count = min(GEOMETRIES, request.config.getoption("--geometries") or GEOMETRIES)
    tests = [str(ROOT / "tests" / name) for name in FILES]
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "--full", f"--geometries={count}"]
    log = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests, "-k", "cpu or packing"],
        cwd=ROOT, env={**os.environ, "BASISCONV_CPU_ISA": instruction_set},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert log.returncode == 0, log.stdout[-6000:]
