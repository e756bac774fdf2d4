"""The kernels of ``stacked_binary_conv2d`` in a program of their own: sanitized, AVX-512 and AMX emulated.

SIMDe (Debian: libsimde-dev) emulates instructions one by one: values and reads are those of the real ones.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "packaging"
PROGRAM = HERE / "stacked_without_torch.cpp"
CPU = ROOT / "csrc" / "cpu"
ONCE = (PROGRAM, CPU / "stacked_binary_conv2d_plan.cpp", CPU / "isa.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
MOST_GEOMETRIES = 400
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("stacked_without_torch")]


def compiled(folder: Path, source: Path, name: str, *options: str) -> Path:
    made = folder / f"{name}.o"
    command = ["g++", "-std=c++20", "-O1", "-w", "-DBASISCONV_WIDEST=amx", *options, "-c", source, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def options_of(name: str, folder: Path) -> list[str]:
    """Of a set's own sources; AVX-512 and AMX by means of what stands in for them."""
    emulated = {
        "avx512": [f"-I{folder}", f"-I{ROOT / 'csrc' / 'common'}", "-DBASISCONV_AVX512"],
        "amx": ["-O0", *AVX2, "-isystem", str(HERE / "emulated"), "-DBASISCONV_AVX512", "-DBASISCONV_PAIRS"],
    }
    return [f"-DBASISCONV_ISA={name}", *{"base": [], "avx2": ["-DBASISCONV_AVX2", *AVX2], **emulated}[name]]


def kernel_of(name: str, folder: Path, root: Path = ROOT) -> Path:
    source = root / "csrc" / "cpu" / f"stacked_binary_conv2d{'_amx' if name == 'amx' else ''}.cpp"
    return compiled(folder, source, name, *options_of(name, folder), *SANITIZED)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything under AddressSanitizer and UBSan."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instruction sets of another processor")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("no SIMDe here: apt install libsimde-dev")
    folder = tmp_path_factory.mktemp("stacked")
    shutil.copy(HERE / "emulated_avx512.h", folder / "immintrin.h")
    made = {source.stem: compiled(folder, source, source.stem, "-DBASISCONV_EMULATED", *SANITIZED) for source in ONCE}
    return made | {name: kernel_of(name, folder) for name in ("base", "avx2", "avx512", "amx")}


def run(objects: dict[str, Path], folder: Path, instruction_set: str, count: int) -> subprocess.CompletedProcess[str]:
    program = folder / "stacked_without_torch"
    subprocess.run(["g++", *SANITIZED, *objects.values(), "-o", program], check=True)
    command = [program, instruction_set, "1", str(count)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512", "amx"])
def test_every_bit_is_that_of_plain_loops(
    objects: dict[str, Path], tmp_path: Path, instruction_set: str, geometries: int
) -> None:
    if instruction_set != "base" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    count = min(geometries, MOST_GEOMETRIES)
    done = run(objects, tmp_path, instruction_set, count)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [instruction_set, str(count), "geometries"]


PLANTED = {
    "a term forgotten": ("sign_products.h", "i > 1; i--", "i > 2; i--"),
    "another tile of pixels": ("sign_products.h", "_tile_dpbf16ps(2, 5, 6);", "_tile_dpbf16ps(2, 4, 6);"),
    "channels in another order": ("stacked_binary_conv2d_amx.cpp", "c % kDepth / kTilePlaces;", "c % kDepth % 2;"),
    "a register of maps forgotten": ("stacked_binary_conv2d_outputs.h", "upper, low, high", "0 * upper, low, high"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(objects: dict[str, Path], tmp_path: Path, fault: str) -> None:
    file, right, wrong = PLANTED[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cpu" / file
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    done = run(objects | {"amx": kernel_of("amx", tmp_path, tmp_path)}, tmp_path, "amx", MOST_GEOMETRIES)
    assert done.returncode == 1
    assert "expected" in done.stderr
