"""The kernels of ``ternary_conv2d`` in a program of their own: forbidden pages, AVX-512 and AMX by means of AVX2."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
PROGRAM = Path("tests/packaging/ternary_without_torch.cpp")
EMULATED = ROOT / "tests" / "packaging" / "emulated"  # an <immintrin.h> that stands in for AVX-512
MORE = ROOT / "tests" / "packaging" / "emulated_ternary"  # and what that one lacks
# Not optimized: that takes the compiler minutes, and the run only seconds as it is.
AVX512 = [
    *("-DBASISCONV_AVX512", "-O0", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"),
    *("-isystem", str(MORE), "-isystem", str(EMULATED)),
]
SETS = {
    "base": [],
    "avx2": ["-DBASISCONV_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "amx": ["-DBASISCONV_PAIRS", *AVX512],
}

pytestmark = [pytest.mark.full]


def built(folder: Path, instruction_set: str, source: str | None = None) -> Path:
    """The program with the kernels of one set; ``source`` stands in for those in csrc/cpu."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if instruction_set != "base" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instructions of x86")
    if instruction_set in ("avx512", "amx") and not (
        EMULATED.exists() and Path("/usr/include/simde/x86/avx512.h").exists()
    ):
        pytest.skip("no SIMDe here (Debian: libsimde-dev)")
    kernel = CPU / f"ternary_conv2d{'_amx' if instruction_set == 'amx' else ''}.cpp"
    if source is not None:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        kernel = folder / kernel.relative_to(ROOT)
        kernel.write_text(source, encoding="utf-8")
    objects = []
    define = [f"-DTERNARY_{instruction_set.upper()}", "-DBASISCONV_WIDEST=base"]
    for path, name in (
        (kernel, instruction_set),
        (CPU / "ternary_conv2d.cpp", "base"),
        (CPU / "ternary_conv2d_plan.cpp", None),
        (CPU / "stacked_binary_conv2d_plan.cpp", None),
        (ROOT / PROGRAM, None),
    ):
        made = folder / f"{len(objects)}.o"
        options = [f"-DBASISCONV_ISA={name}", *SETS[name]] if name else []
        if (instruction_set, name, len(objects)) == ("base", "base", 1):
            continue
        command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
        command += ["-Wno-uninitialized", *define, *options, "-c", str(path), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        objects.append(made)
    program = folder / "ternary_without_torch"
    subprocess.run(["g++", *objects, "-o", program], check=True)
    return program


def run(program: Path, instruction_set: str, geometries: int) -> subprocess.CompletedProcess[str]:
    command = [program, instruction_set, "1", str(geometries)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_bit_is_that_of_plain_loops(tmp_path: Path, instruction_set: str, geometries: int) -> None:
    count = min(geometries, 300 if instruction_set in ("avx512", "amx") else 5_000)
    done = run(built(tmp_path, instruction_set), instruction_set, count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [instruction_set, str(count), "geometries"]


PLANTED = {
    "a tail entry forgotten": (
        "base",
        "for (; i < count; i++) one(i, sums);",
        "for (; i + 1 < count; i++) one(i, sums);",
        "got",
    ),
    "a write past the row": ("base", "s.columns - x);\n      }", "static_cast<int64_t>(kWidth));\n      }", ""),
    "a read past the image": ("base", "(size - first + step - 1) / step", "(size - first + step) / step", ""),
    "the bits of another sign": ("amx", "negative = words[plane + i]", "negative = words[0 * plane + i]", "got"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    name, right, wrong, report = PLANTED[fault]
    source = (CPU / f"ternary_conv2d{'_amx' if name == 'amx' else ''}.cpp").read_text(encoding="utf-8")
    assert source.count(right) == 1
    done = run(built(tmp_path, name, source.replace(right, wrong)), name, 2_000)
    assert done.returncode == 1
    assert report in done.stderr
