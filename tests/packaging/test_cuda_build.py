"""Building with CUDA kernels: what is chosen and why, which symbols the library needs, loading without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from basisconv_kernels.core import extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``setup.py`` as a module, without what this machine's environment asks of it."""
    for name in ("CUDA_HOME", "NVCC", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("basisconv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.9, V12.9.86" ;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/opt/some cuda/lib/stubs" "-L/opt/some cuda/lib"' >&2 ;;
esac
"""


def test_the_toolkit_is_what_nvcc_says(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "nvcc-wrapper"
    wrapper.write_text(NVCC)
    wrapper.chmod(0o755)
    monkeypatch.setenv("NVCC", str(wrapper))
    libraries = ["-L/opt/some cuda/lib/stubs", "-L/opt/some cuda/lib"]
    assert build.toolkit() == build.Toolkit([str(wrapper)], "12.9", libraries)
    assert build.cuda_toolkit("auto", "12.8").version == "12.9"
    assert build.cuda_toolkit("cuda", None).version == "12.9"
    assert "BASISCONV_BUILD=cuda" in build.cuda_toolkit("auto", None)
    assert build.cuda_toolkit("cpu", "12.8") == "BASISCONV_BUILD=cpu"


def test_without_nvcc(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.cuda_toolkit("auto", "12.8") == "no nvcc"
    with pytest.raises(SystemExit, match="BASISCONV_BUILD=cuda is impossible: no nvcc"):
        build.cuda_toolkit("cuda", "12.8")


def test_architectures(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    default = build.architectures()
    assert default.names == ["8.0", "9.0a+PTX"]
    # Ordinary kernels run on every 9.0; the PTX is for what is newer.
    wanted = ["code=sm_80", "code=sm_90", "code=compute_90"]
    assert [option.split(",")[1] for option in default.options[1::2]] == wanted
    assert default.hopper
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 8.9")
    assert build.architectures()[:] == (
        ["8.6", "8.9"],
        ["-gencode", "arch=compute_86,code=sm_86", "-gencode", "arch=compute_89,code=sm_89"],
        False,
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    with pytest.raises(SystemExit, match=r"8.0 or later, like 8.0;9.0a\+PTX, got '7.5'"):
        build.architectures()


# What one library for many torches and Pythons may need: LibTorch's stable C functions and the C and C++ libraries.
ALLOWED = re.compile(r"(aoti_torch_|torch_)\w+|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_Z(N[KOR]*|T\w|S)?St.*")
WEAK = re.compile(r"_ITM_\w+|__gmon_start__|__cxa_finalize.*|.*@GLIBC.*|_Z.*")
# Looked up at run time, since only CUDA builds of torch have it; a symbol of that name would stay empty there.
LOOKED_UP = "aoti_torch_get_current_cuda_stream"


# The headers promise one library for torch 2.10 and later; of this release it is looked up, since a machine with a GPU
# is likely to have it.
OLDER = [
    line
    for line in (Path(__file__).with_name("torch_2.11_symbols.txt")).read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def undefined(library: Path) -> dict[str, str]:
    """{symbol: "U" or, if it may be absent, "w"} of what a library expects of others."""
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[1]: line.split()[0] for line in listed.stdout.splitlines()}


def audit(library: Path) -> None:
    symbols = undefined(library)
    assert [s for s, kind in symbols.items() if kind == "U" and not ALLOWED.fullmatch(s)] == []
    assert [s for s, kind in symbols.items() if kind != "U" and not WEAK.fullmatch(s)] == []
    of_torch = {s for s in symbols if re.match(r"(aoti_)?torch_", s)}
    assert of_torch - set(OLDER) == set(), "torch 2.11 does not have them"
    assert LOOKED_UP not in symbols


def test_the_older_release_has_what_this_one_has_and_not_all_of_it() -> None:
    """The list is one: functions that came later are missing, so an audit that finds nothing has looked."""
    assert len(OLDER) > 400
    assert {LOOKED_UP, "torch_call_dispatcher", "torch_parallel_for"} <= set(OLDER)
    assert "torch_stream_native_handle" not in OLDER  # since 2.13


def test_the_library_needs_only_the_stable_abi() -> None:
    if extension.load() is not None:
        pytest.skip(str(extension.load()))
    library = extension.path()
    assert library is not None
    audit(library)


USE = """
import torch
from basisconv_kernels import basis_conv2d
from basisconv_kernels.core import extension, registry
print("facts:", extension.facts()["cuda"]["built"], "|", registry.absent("cuda"))
print(basis_conv2d(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), torch.ones(3, 2), backend="cpu").sum().item())
shapes = [[20, 8, 3, 3], [9, 20]]
print(torch.ops.basisconv.basis_conv2d_cuda_packed_bytes.default(*shapes, 1))
"""


@pytest.mark.full
def test_a_cuda_build_loads_and_runs_without_a_gpu(outside: Any, build: Any) -> None:
    if isinstance(build.toolkit(), str):
        pytest.skip(build.toolkit())
    log = outside.install(outside.sources, BASISCONV_BUILD="cuda")
    assert log.returncode == 0, log.stdout[-3000:]
    assert "and CUDA kernels (8.0, 9.0a+PTX; nvcc" in " ".join(log.stdout.split())
    used = outside.python("-c", USE, CUDA_VISIBLE_DEVICES="")
    assert used.returncode == 0, used.stdout
    assert "facts: 8.0,9.0a+PTX | no CUDA device" in used.stdout
    assert "1944.0" in used.stdout
    assert str(64 + 9 * 32 * 128 + 64 * 32 * 2) in used.stdout  # tag, nine tiles of the basis, one of coefficients
    (library,) = (outside.site / "basisconv_kernels").glob("_C*.so")
    audit(library)
    assert LOOKED_UP.encode() in library.read_bytes()
