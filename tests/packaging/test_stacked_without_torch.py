"""The kernels of ``stacked_binary_conv2d`` in a program of their own: sanitized, and AVX-512 emulated where it is not.

SIMDe (Debian: libsimde-dev) emulates instructions one by one: values and reads are those of the real ones.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "packaging"
PROGRAM = HERE / "stacked_without_torch.cpp"
KERNELS = ROOT / "csrc" / "cpu" / "stacked_binary_conv2d.cpp"
ONCE = (PROGRAM, ROOT / "csrc" / "cpu" / "stacked_binary_conv2d_plan.cpp", ROOT / "csrc" / "cpu" / "isa.cpp")
AVX2 = ["-DBASISCONV_AVX2", "-mavx2", "-mfma", "-mf16c"]
MOST_GEOMETRIES = 400

pytestmark = pytest.mark.full


def compiled(folder: Path, source: Path, name: str, *options: str) -> Path:
    made = folder / f"{name}.o"
    command = ["g++", "-std=c++20", "-O1", "-w", "-DBASISCONV_WIDEST=avx512", *options, "-c", source, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three sets in one program under AddressSanitizer and UBSan, AVX-512 by SIMDe."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("no SIMDe here: apt install libsimde-dev")
    folder = tmp_path_factory.mktemp("stacked")
    shutil.copy(HERE / "emulated_avx512.h", folder / "immintrin.h")
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    emulated = [f"-I{folder}", f"-I{ROOT / 'csrc' / 'common'}", "-DBASISCONV_AVX512"]
    objects = [compiled(folder, source, source.stem, "-DBASISCONV_EMULATED", *sanitized) for source in ONCE]
    for name, options in (("base", []), ("avx2", AVX2), ("avx512", emulated)):
        objects.append(compiled(folder, KERNELS, name, f"-DBASISCONV_ISA={name}", *options, *sanitized))
    made = folder / "stacked_without_torch"
    subprocess.run(["g++", *sanitized, *objects, "-o", made], check=True)
    return made


@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
def test_every_bit_is_that_of_plain_loops(program: Path, instruction_set: str, geometries: int) -> None:
    if instruction_set == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    count = str(min(geometries, MOST_GEOMETRIES))
    done = subprocess.run([program, instruction_set, "1", count], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [instruction_set, count, "geometries"]
