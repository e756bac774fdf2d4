"""The kernels of ``binary_conv2d`` in a program of their own: fenced memory, and AVX-512 emulated."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path("tests/packaging/binary_without_torch.cpp")
ONCE = ("isa", "binary_conv2d_plan", "binary_conv2d_table")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-DBASISCONV_AVX512", *AVX2, "-I", "tests/packaging/emulated_bits"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
SETS = {
    "base": STRICT,
    "avx2": ["-DBASISCONV_AVX2", *AVX2, *STRICT],
    "avx512": AVX512,
    "avx512_vpopcntdq": [*AVX512, "-DBASISCONV_VPOPCNTDQ"],
}
# Compiling the emulated byte shuffles takes a minute.
LONG = {"base", "avx2", "avx512"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def build(folder: Path, name: str, root: Path = ROOT) -> Path:
    if name != "base" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("an instruction set of another processor")
    if name.startswith("avx512") and not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is not installed: Debian's libsimde-dev")
    kernel, program = folder / "kernel.o", folder / "program"
    common = ["g++", "-std=c++20", "-O1", "-DBASISCONV_WIDEST=amx"]
    once = [f"csrc/cpu/{stem}.cpp" for stem in ONCE]
    for command in (
        [*common, f"-DBASISCONV_ISA={name}", *SETS[name], "-c", "csrc/cpu/binary_conv2d.cpp", "-o", kernel],
        [*common, f"-DBASISCONV_TESTED={name}", *STRICT, PROGRAM, *once, kernel, "-o", program],
    ):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(program: Path, geometries: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, "1", str(geometries)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in LONG else []) for name in SETS]
)
def test_every_number_is_that_of_plain_loops(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    count = 3_000 if request.config.getoption("--full") else 100
    done = run(build(tmp_path, name), count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, str(count), "geometries"]


PLANTED = {
    "a tap forgotten": ("binary_conv2d_rows.h", "memcpy(to, bits, count * plan.pixel_bytes);",
                        "memcpy(to, bits, (count > 5 ? 5 : count) * plan.pixel_bytes);", "expected"),
    "a border off by one": ("binary_conv2d_table.cpp", "columns.lo[column] <= s && s <= columns.hi[column]",
                            "columns.lo[column] <= s && s < columns.hi[column]", "expected"),
    "a read past the end": ("binary_conv2d_store.h", "(raw[i] <= limit[i]) ^ (flip[i] != 0)",
                            "(raw[i] <= limit[i]) ^ (flip[i + 1024] != 0)", "touched"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("name", "right", "wrong", "report"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, name: str, right: str, wrong: str, report: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests" / "packaging", tmp_path / "tests" / "packaging")
    source = tmp_path / "csrc" / "cpu" / name
    text = source.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    done = run(build(tmp_path, "base", tmp_path), 2_000)
    assert done.returncode == 1
    assert report in done.stderr
