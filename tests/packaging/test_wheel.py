"""The compiled wheel and the sdist, built and tested outside the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("wheel"),
    pytest.mark.skipif(sys.platform == "win32", reason="no native kernels for Windows yet"),
]


@pytest.fixture(scope="module")
def wheel(outside: Any) -> Any:
    log = outside.wheel(BASISCONV_BUILD="cpu")
    assert log.returncode == 0, log.stdout
    (built,) = (outside.folder / "wheels").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(outside: Any, wheel: Any) -> Any:
    log = outside.install(wheel)
    assert log.returncode == 0, log.stdout
    return outside


def library(installed: Any) -> Path:
    return installed.site / "basisconv_kernels" / "_C.abi3.so"


def test_one_wheel_serves_every_python(wheel: Any) -> None:
    assert "cp310-abi3" in wheel.name


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Any) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"basisconv_kernels"}
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {"basisconv_kernels/_C.abi3.so", "basisconv_kernels/core/_eager.abi3.so"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_library_asks_for_nothing_that_changes_with_a_version(installed: Any) -> None:
    """C functions of torch's stable ABI, libc and the C++ runtime; no symbol of Python, none of torch's C++."""
    command = ["nm", "-D", "--undefined-only", "--format=posix", library(installed)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[0] for line in listed.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = ("Py", "_Py", "_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert [symbol for symbol in symbols if symbol.startswith(unstable)] == []


def test_the_op_tests_pass_on_the_wheel(installed: Any) -> None:
    assert "base" in installed.cpu()["built"]
    log = installed.pytest("tests/ops", "tests/layers", "tests/compression/test_files.py")
    assert log.returncode == 0, log.stdout[-6000:]


def test_the_command_line_is_installed(installed: Any) -> None:
    pytest.importorskip("typer")
    helped = installed.command("demo", "--help")
    assert helped.returncode == 0, helped.stdout
    assert "--quick" in helped.stdout
    doctor = installed.command("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "basis_conv2d on cpu" in doctor.stdout


def test_the_demo_runs_from_the_wheel(installed: Any) -> None:
    for name in ("typer", "matplotlib", "jinja2"):
        pytest.importorskip(name)
    out = installed.folder / "demo"
    shown = installed.command("demo", "--quick", "--out", out)
    assert shown.returncode == 0, shown.stdout[-6000:]
    assert (out / "index.html").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["verification"]["passed"]
    assert results["environment"]["native_library"]["cpu"]["built"]


def other_pythons() -> list[Path]:
    """Interpreters from 3.10 on beside the one that runs: those on the path and those of pyenv."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = {}
    for minor in range(10, 16):
        on_path = shutil.which(f"python3.{minor}")
        candidates = [*sorted(versions.glob(f"3.{minor}.*/bin/python3.{minor}")), *([Path(on_path)] if on_path else [])]
        works = [path for path in candidates if subprocess.run([path, "-c", ""], check=False).returncode == 0]
        if works and minor != sys.version_info.minor:
            found[minor] = works[0]
    return list(found.values())


LOAD = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
print("loaded")
"""


def test_other_pythons_take_the_wheel(outside: Any, installed: Any, wheel: Any) -> None:
    """Without a torch for them: pip accepts it, every file compiles, the library loads beside LibTorch."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python from 3.10 on here")
    lib = Path(torch.__file__).parent / "lib"
    needed = [lib / name for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so")]
    for python in pythons:
        site = outside.folder / f"site-{python.name}"
        for command in (
            ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel],
            ["-m", "compileall", "-q", site],
            ["-c", LOAD, *needed, site / "basisconv_kernels" / library(installed).name],
        ):
            done = outside.run(python, *command)
            assert done.returncode == 0, f"{python}: {done.stdout[-3000:]}"
        assert "loaded" in done.stdout


def test_the_sdist_builds_the_same(outside: Any, wheel: Any) -> None:
    """Made where nothing can be compiled, built as ``pip install`` does: isolated, with this environment's torch."""
    log = outside.python(
        "setup.py", "-q", "sdist", "--dist-dir", outside.folder / "sdist",
        cwd=outside.sources, BASISCONV_BUILD="none",
    )  # fmt: skip
    assert log.returncode == 0, log.stdout
    (archive,) = (outside.folder / "sdist").glob("*.tar.gz")
    shutil.rmtree(outside.site, ignore_errors=True)
    log = outside.pip("install", "-v", "--no-deps", "--target", outside.site, archive, BASISCONV_BUILD="cpu")
    if "No matching distribution found for setuptools" in log.stdout:
        pytest.skip("an isolated build fetches setuptools and ninja, and no registry answers")
    assert log.returncode == 0, log.stdout[-6000:]
    with zipfile.ZipFile(wheel) as packed:
        expected = {name for name in packed.namelist() if name.startswith("basisconv_kernels/")}
    found = {path.relative_to(outside.site).as_posix() for path in outside.site.rglob("*") if path.is_file()}
    assert expected <= found
    assert "base" in outside.cpu()["built"]
