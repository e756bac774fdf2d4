"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the op tests.

The compiler does not instrument masked loads and stores of AVX-512, nor those of tiles: test_kernels_without_torch.py
stops them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("sanitizers"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of the sanitizer runtime"),
]

# Python itself leaks at exit, and torch allocates with one operator and frees with another.
ASAN = "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0:exitcode=77"
ASAN += ":allocator_may_return_null=1"  # torch has an error of its own for memory that there is not

# A call on memory that is not as the tensors say: one float short, or off the alignment of a float.
MISCALLED = """
import ctypes, torch
from basisconv_kernels.core import extension
assert extension.load() is None
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
count = 6 * 7 * 5
held = malloc(4 * count - {missing} + {shift})
memory = (ctypes.c_char * (4 * count)).from_address(held + {shift})
image = torch.frombuffer(memory, dtype=torch.float32).view(1, 6, 7, 5)
basis, mixing = torch.ones(2, 6, 2, 2), torch.ones(3, 2)
torch.ops.basisconv.basis_conv2d(image, basis, mixing, None, None, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, None, False)
print("nothing noticed")
"""


@pytest.fixture(scope="module")
def sanitized(outside: Any) -> Any:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(str(path.resolve()))
    log = outside.install(outside.sources, BASISCONV_BUILD="cpu", BASISCONV_SANITIZE="address,undefined", DEBUG="1")
    assert log.returncode == 0, log.stdout[-6000:]
    outside.environment = {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return outside


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_vpopcntdq", "avx512_bf16", "amx"])
def test_op_tests_are_clean(sanitized: Any, isa: str) -> None:
    in_use = sanitized.cpu(BASISCONV_CPU_ISA=isa)["in_use"]
    if in_use != isa:
        pytest.skip(f"this processor has {in_use} at most")
    log = sanitized.pytest(
        "tests/ops/test_basis_conv2d.py", "tests/ops/test_basis_conv2d_native.py",
        "tests/ops/test_binary_conv2d.py", "tests/ops/test_bitpack.py", "tests/ops/test_basis_conv2d_planned.py",
        "tests/ops/test_binary_conv2d_planned.py", "tests/ops/test_stacked_binary_conv2d_planned.py",
        "tests/ops/test_ternary_conv2d_planned.py", "-x", "--geometries=500",
        "--deselect=tests/ops/test_basis_conv2d_native.py::test_every_instruction_set_passes_every_case",
        BASISCONV_CPU_ISA=isa,
    )  # fmt: skip
    assert "runtime error" not in log.stdout, log.stdout[-6000:]
    assert "AddressSanitizer" not in log.stdout, log.stdout[-6000:]
    assert log.returncode == 0, log.stdout[-6000:]


@pytest.mark.parametrize(
    ("missing", "shift", "report"),
    [(4, 0, "AddressSanitizer: heap-buffer-overflow"), (0, 1, "runtime error: .* misaligned address")],
    ids=["past the end", "off the alignment"],
)
def test_the_sanitizers_see_into_the_kernels(sanitized: Any, missing: int, shift: int, report: str) -> None:
    log = sanitized.python("-c", MISCALLED.format(missing=missing, shift=shift), BASISCONV_CPU_ISA="avx2")
    assert log.returncode != 0, log.stdout
    assert "nothing noticed" not in log.stdout
    assert re.search(report, log.stdout), log.stdout[-3000:]
    assert "csrc/cpu" in log.stdout
