"""The kernels of ``binary_conv2d`` in a program of their own: fenced memory, and AVX-512 and AMX emulated."""

from __future__ import annotations

import importlib.util
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
    "amx": AVX512,
}
# Compiling the emulated byte shuffles takes a minute.
LONG = {"base", "avx2", "avx512"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def build(folder: Path, name: str, root: Path = ROOT, options: list[str] | None = None) -> Path:
    """The program of one set; emulated where this takes AVX-512, unless compiled with ``options`` of its own."""
    if name != "base" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("an instruction set of another processor")
    emulated = options is None and SETS[name][:1] == AVX512[:1]
    if emulated and not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is not installed: Debian's libsimde-dev")
    kernel, program = folder / "kernel.o", folder / "program"
    source = f"csrc/cpu/binary_conv2d{'_amx' if name == 'amx' else ''}.cpp"
    common = ["g++", "-std=c++20", "-O1", "-DBASISCONV_WIDEST=amx"]
    once = [f"csrc/cpu/{stem}.cpp" for stem in ONCE]
    for command in (
        [*common, f"-DBASISCONV_ISA={name}", *(options or SETS[name]), "-c", source, "-o", kernel],
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


def test_the_matrix_unit_of_this_processor(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As the package is built, where there is one: the instructions themselves, no imitation of them."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").exists() else []
    if not {"amx_tile", "amx_int8", "amx_bf16"} <= set(flags):
        pytest.skip("this processor has no matrix unit")
    spec = importlib.util.spec_from_file_location("basisconv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count = 20_000 if request.config.getoption("--full") else 1_000
    done = run(build(tmp_path, "amx", options=["-O3", *module.instruction_sets()["amx"].options]), count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["amx", str(count), "geometries"]


# N C H K R stride groups planes threads; the first rows are those of suite C5.
CHOICES = {
    "1 64 56 64 3 1 1 0 1": "products",
    "1 128 28 128 3 1 1 0 1": "products",
    "1 256 14 256 3 1 1 0 1": "products",
    "1 512 7 512 3 1 1 0 1": "products",
    "8 64 56 64 3 1 1 0 2": "products",
    "1 3 112 64 7 2 1 0 1": "counts",  # three channels of 64
    "1 512 1 512 1 1 1 0 1": "counts",  # one pixel of a tile's sixteen
    "1 256 4 256 3 1 1 0 1": "counts",  # 22 numbered pixels to expand all filters for
    "1 128 28 128 3 1 128 0 1": "counts",  # depthwise: one filter of sixteen, one channel of 64
    "1 64 7 16 3 1 1 0 1": "counts",
    "1 64 7 16 3 1 1 4 1": "products",  # the same with four planes, which are one product
}  # fmt: skip


def test_the_quicker_way_is_chosen(tmp_path: Path) -> None:
    program = tmp_path / "choice"
    once = [f"csrc/cpu/{stem}.cpp" for stem in ONCE if stem != "binary_conv2d_table"]
    command = ["g++", "-std=c++20", "-DBASISCONV_WIDEST=amx", *STRICT, "tests/packaging/binary_choice.cpp", *once]
    subprocess.run([*command, "-o", program], cwd=ROOT, check=True)

    def chosen(isa: str) -> list[list[str]]:
        done = subprocess.run([program, isa], input="\n".join(CHOICES), capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    with_unit = chosen("amx")
    assert dict(zip(CHOICES, (way for way, _ in with_unit), strict=True)) == CHOICES
    assert {way for way, _ in chosen("avx512_bf16")} == {"counts"}
    assert max(int(scratch) for _, scratch in with_unit) <= 1 << 18  # what the second-level cache holds with ease


PLANTED = {
    "a tap forgotten": ("base", "binary_conv2d_rows.h", "memcpy(to, bits, count * plan.pixel_bytes);",
                        "memcpy(to, bits, (count > 5 ? 5 : count) * plan.pixel_bytes);", "expected"),
    "a border off by one": ("base", "binary_conv2d_table.cpp", "columns.lo[column] <= s && s <= columns.hi[column]",
                            "columns.lo[column] <= s && s < columns.hi[column]", "expected"),
    "a read past the end": ("base", "binary_conv2d_store.h", "(raw[i] <= limit[i]) ^ (flip[i] != 0)",
                            "(raw[i] <= limit[i]) ^ (flip[i + 1024] != 0)", "touched"),
    "half of the channels": ("amx", "binary_conv2d_amx.cpp", "bytes_left < 8 ? 4 : 8", "4", "expected"),
    "a pixel between two rows": ("amx", "binary_conv2d_amx.cpp", "last = i - at.x + p.OW;",
                                 "last = i - at.x + p.OW + 1;", "output"),
    "filters overwritten before their use": ("amx", "binary_conv2d_amx.cpp", "plan.block ? -1 : plan.kept - 1",
                                             "plan.block ? -1 : 0", "expected"),
    "sums begun anew": ("amx", "binary_conv2d_amx.cpp", "done == 0, tiles.raw", "true, tiles.raw", "expected"),
    "a code with a sign": ("amx", "binary_conv2d_amx.cpp", "1 << plane", "(plane > 2 ? -1 : 1) << plane", "expected"),
    "a word of filters past the end": ("amx", "binary_conv2d_amx.cpp", "2 * c + 1 < pack.units", "true", "touched"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("isa", "name", "right", "wrong", "report"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, isa: str, name: str, right: str, wrong: str, report: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests" / "packaging", tmp_path / "tests" / "packaging")
    source = tmp_path / "csrc" / "cpu" / name
    text = source.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    done = run(build(tmp_path, isa, tmp_path), 2_000)
    assert done.returncode == 1
    assert report in done.stderr
