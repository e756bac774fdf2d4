"""The kernels in a program of their own, with pages that may not be touched: by other compilers, on other processors,
and with instructions that this processor lacks.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path("tests/packaging/kernels_without_torch.cpp")
ONCE = (PROGRAM, Path("csrc/cpu/basis_conv2d_plan.cpp"), Path("csrc/cpu/isa.cpp"))
# GCC warns about its own AVX-512 headers.
STRICT = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",
]
LACKS_THE_SET = 3  # exit status of the program
# AVX-512, its products of bfloat16 and AMX by means of AVX2. Not optimized: that takes the compiler minutes, and the
# run only seconds as it is.
IMITATED = ("avx512", "avx512_bf16", "amx")
HEADERS = ROOT / "tests" / "packaging" / "emulated"
EMULATED = ["-O0", "-mavx2", "-mfma", "-mf16c", "-isystem", str(HEADERS)]

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("kernels_without_torch")]


def instruction_sets() -> dict[str, Any]:
    """Sources and options of each set, as the package is built."""
    spec = importlib.util.spec_from_file_location("basisconv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.instruction_sets()


SETS = instruction_sets()


def build(
    folder: Path,
    compiler: str,
    sets: list[str],
    *options: str,
    root: Path = ROOT,
    emulated: tuple[str, ...] = (),
    changed: str = "",
) -> Path:
    """Compile the program with the kernels of these sets, with all warnings as errors.

    Objects whose names do not begin with ``changed`` must lie in the folder already.
    """
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    widest = [f"-DBASISCONV_WIDEST={sets[-1]}", *(["-DBASISCONV_EMULATED"] if emulated else [])]
    jobs = [(path, path.stem, []) for path in ONCE]
    for name in sets:
        sources, own, _ = SETS[name]
        if name in emulated:
            own = [*EMULATED, *(option for option in own if option.startswith("-D"))]
        own = [f"-DBASISCONV_ISA={name}", *own]
        of_this_op = [Path(path) for path in sources if Path(path).stem.startswith("basis_conv2d")]
        jobs += [(path, f"{name}_{path.stem}", own) for path in of_this_op]

    def compiled(job: tuple[Path, str, list[str]]) -> Path:
        source, name, own = job
        made = folder / f"{name}.o"
        if not name.startswith(changed):
            return made
        done = subprocess.run(
            [compiler, "-std=c++20", "-O2", *STRICT, *options, *widest, *own, "-c", root / source, "-o", made],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 1)) as pool:
        objects = list(pool.map(compiled, jobs))
    program = folder / "kernels_without_torch"
    subprocess.run([compiler, *options, *objects, "-o", program], check=True)
    return program


def run(program: Path, instruction_set: str, geometries: int, *runner: str) -> subprocess.CompletedProcess[str]:
    command = [*runner, program, instruction_set, "1", str(geometries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == LACKS_THE_SET:
        pytest.skip(done.stderr.strip())
    return done


def agrees(program: Path, instruction_set: str, geometries: int, *runner: str) -> None:
    done = run(program, instruction_set, geometries, *runner)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [instruction_set, str(geometries), "geometries"]


@pytest.fixture(scope="module", params=["g++", "clang++"])
def native_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), request.param, list(SETS))


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_bit_is_that_of_plain_loops(native_program: Path, instruction_set: str, geometries: int) -> None:
    agrees(native_program, instruction_set, min(geometries, 5_000))


@pytest.mark.parametrize(("compiler", "emulator"), [("aarch64-linux-gnu-g++", "qemu-aarch64-static")])
def test_on_another_processor(tmp_path: Path, compiler: str, emulator: str, geometries: int) -> None:
    if shutil.which(emulator) is None:
        pytest.skip(f"no {emulator} here")
    program = build(tmp_path, compiler, ["base"], "-static")  # the emulator has no libraries of the other processor
    agrees(program, "base", min(geometries, 300), emulator)


def emulated_program(folder: Path, root: Path = ROOT, changed: str = "") -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("stands in for instructions of x86")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("no SIMDe here (Debian: libsimde-dev)")
    # GCC notes that other compilers pass vectors of 512 bits in another way.
    return build(folder, "g++", list(SETS), "-Wno-psabi", root=root, emulated=IMITATED, changed=changed)


@pytest.fixture(scope="module")
def emulating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_program(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("instruction_set", IMITATED)
def test_with_instructions_that_this_processor_may_lack(emulating: Path, instruction_set: str, geometries: int) -> None:
    agrees(emulating, instruction_set, min(geometries, 1_000))


COEFFICIENT = "from_float(of_map[v] && k < count"
LOAD_OF_N = "static BASISCONV_INLINE Reg load_n(const T* p, int64_t n) {"
PLANTED = {
    "an output forgotten": (
        "basis_conv2d.cpp", COEFFICIENT, f"if (p * rows + k == 30) {{ packed++; continue; }} {COEFFICIENT}", "expected",
    ),
    "a read past the end": (
        "simd.h", LOAD_OF_N, f"{LOAD_OF_N} (void)*reinterpret_cast<const volatile char*>(p + kWidth - 1);", "touched",
    ),
}  # fmt: skip


MASKED = "_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))"
PLANTED_FOR_EMULATION = {
    "a read past the end": ("avx512", "simd.h", MASKED, "load(p + 0 * n)", "touched"),
    "taps of another filter block": (
        "avx512", "basis_conv2d_winograd.h", "winograd_taps_at(pack, f, b)", "winograd_taps_at(pack, 0, b)", "expected",
    ),
    "pairs beside the map": (
        "avx512_bf16", "basis_conv2d_pair_rows.h", "_mm512_maskz_loadu_epi16(valid, from)", "_mm512_loadu_si512(from)",
        "expected|touched",
    ),
    "another tile": (
        "amx", "basis_conv2d_amx_products.h", "stored(1, sums.tiles[1]", "stored(1, sums.tiles[0]", "expected",
    ),
    "a tile beyond the image": (
        "amx", "basis_conv2d_amx_columns.h", "std::min((first + t) * kSide, pixels - kSide)", "(first + t) * kSide",
        "touched",
    ),
    "a row of taps above the image": (
        "amx", "basis_conv2d_amx_columns.h", "part.first_tap + r) * kColumns", "r) * kColumns", "expected",
    ),
}  # fmt: skip


def plant(folder: Path, *faults: tuple[str, str, str]) -> Path:
    """A copy of the sources with what is right in a file replaced by what is wrong."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / PROGRAM).parent.mkdir(parents=True)
    shutil.copy(ROOT / PROGRAM, folder / PROGRAM)
    for name, right, wrong in faults:
        source = folder / "csrc" / "cpu" / name
        text = source.read_text(encoding="utf-8")
        assert right in text
        source.write_text(text.replace(right, wrong), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "right", "wrong", "report"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, name: str, right: str, wrong: str, report: str) -> None:
    program = build(tmp_path, "g++", ["base"], "-O1", root=plant(tmp_path, (name, right, wrong)))
    done = run(program, "base", 3_000)
    assert done.returncode == 1
    assert re.search(report, done.stderr)


@pytest.mark.parametrize(
    ("instruction_set", "name", "right", "wrong", "report"), PLANTED_FOR_EMULATION.values(), ids=PLANTED_FOR_EMULATION
)
def test_emulation_finds_a_planted_fault(
    emulating: Path, tmp_path: Path, instruction_set: str, name: str, right: str, wrong: str, report: str
) -> None:
    root = plant(tmp_path, (name, right, wrong))
    shutil.copytree(emulating.parent, tmp_path / "objects")
    done = run(emulated_program(tmp_path / "objects", root, changed=f"{instruction_set}_"), instruction_set, 500)
    assert done.returncode == 1
    assert re.search(report, done.stderr)
