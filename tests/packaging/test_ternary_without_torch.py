"""The kernels of ``ternary_conv2d`` in a program of their own: forbidden pages, AVX-512 by means of AVX2 (SIMDe)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path("tests/packaging/ternary_without_torch.cpp")
EMULATED = ROOT / "tests" / "packaging" / "emulated"  # an <immintrin.h> that stands in for AVX-512
MORE = ROOT / "tests" / "packaging" / "emulated_ternary"  # and what that one lacks
SETS = {
    "base": [],
    "avx2": ["-DBASISCONV_AVX2", "-mavx2", "-mfma", "-mf16c"],
    # Not optimized: that takes the compiler minutes, and the run only seconds as it is.
    "avx512": [
        *("-DBASISCONV_AVX512", "-O0", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"),
        *("-isystem", str(MORE), "-isystem", str(EMULATED)),
    ],
}

pytestmark = [pytest.mark.full]


def built(folder: Path, instruction_set: str, source: str | None = None) -> Path:
    """The program with the kernels of one set; ``source`` stands in for csrc/cpu/ternary_conv2d.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if instruction_set != "base" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instructions of x86")
    if instruction_set == "avx512" and not (EMULATED.exists() and Path("/usr/include/simde/x86/avx512.h").exists()):
        pytest.skip("no SIMDe here (Debian: libsimde-dev)")
    kernel = ROOT / "csrc" / "cpu" / "ternary_conv2d.cpp"
    if source is not None:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        kernel = folder / "csrc" / "cpu" / "ternary_conv2d.cpp"
        kernel.write_text(source, encoding="utf-8")
    objects = []
    define = [f"-DTERNARY_{instruction_set.upper()}", "-DBASISCONV_WIDEST=base"]
    for path, name in (
        (kernel, instruction_set),
        (ROOT / "csrc" / "cpu" / "ternary_conv2d.cpp", "base"),
        (ROOT / "csrc" / "cpu" / "ternary_conv2d_plan.cpp", None),
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
    count = min(geometries, 300 if instruction_set == "avx512" else 5_000)
    done = run(built(tmp_path, instruction_set), instruction_set, count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [instruction_set, str(count), "geometries"]


SOURCE = (ROOT / "csrc" / "cpu" / "ternary_conv2d.cpp").read_text(encoding="utf-8")
PLANTED = {
    "a tail entry forgotten": (
        "for (; i < count; i++) one(i, sums);",
        "for (; i + 1 < count; i++) one(i, sums);",
        "got",
    ),
    "a write past the row": ("s.columns - x);\n      }", "static_cast<int64_t>(kWidth));\n      }", ""),
    "a read past the image": ("*end = first < size ?", "*end = first < size + 1 ?", ""),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    right, wrong, report = PLANTED[fault]
    assert SOURCE.count(right) == 1
    done = run(built(tmp_path, "base", SOURCE.replace(right, wrong)), "base", 2_000)
    assert done.returncode == 1
    assert report in done.stderr
