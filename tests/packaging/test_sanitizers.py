"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the op tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of the sanitizer runtime"),
]

# Python itself leaks at exit, and torch allocates with one operator and frees with another.
ASAN = "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0:exitcode=77"


@pytest.fixture(scope="module")
def sanitized(outside: Any) -> Any:
    log = outside.install(outside.sources, BASISCONV_BUILD="cpu", BASISCONV_SANITIZE="address,undefined", DEBUG="1")
    assert log.returncode == 0, log.stdout[-6000:]
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(str(path.resolve()))
    outside.environment = {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return outside


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_op_tests_are_clean(sanitized: Any, isa: str) -> None:
    log = sanitized.pytest("tests/ops/test_basis_conv2d.py", "-x", BASISCONV_CPU_ISA=isa)
    assert "runtime error" not in log.stdout, log.stdout[-6000:]
    assert "AddressSanitizer" not in log.stdout, log.stdout[-6000:]
    assert log.returncode == 0, log.stdout[-6000:]
