"""The compiled wheel and the sdist, built and tested outside the tree."""

from __future__ import annotations

import sys
import zipfile
from typing import Any

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform == "win32", reason="no native kernels for Windows yet"),
]


@pytest.fixture(scope="module")
def wheel(outside: Any) -> Any:
    log = outside.pip(
        "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", outside.folder / "wheels",
        outside.sources, BASISCONV_BUILD="cpu",
    )  # fmt: skip
    assert log.returncode == 0, log.stdout
    (built,) = (outside.folder / "wheels").glob("*.whl")
    return built


def test_one_wheel_serves_every_python(wheel: Any) -> None:
    assert "cp310-abi3" in wheel.name


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Any) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"basisconv_kernels"}
    assert sum(name.endswith(".so") for name in names) == 1


def test_the_op_tests_pass_on_the_wheel(outside: Any, wheel: Any) -> None:
    assert outside.install(wheel).returncode == 0
    log = outside.pytest("tests/ops", "tests/layers", "tests/compression/test_files.py")
    assert log.returncode == 0, log.stdout[-6000:]
    used = outside.python("-c", "from basisconv_kernels.core import registry; print(registry.absent('cpu'))")
    assert used.stdout.strip() == "None"


def test_the_sdist_builds_the_same(outside: Any) -> None:
    log = outside.python("setup.py", "-q", "sdist", "--dist-dir", outside.folder / "sdist", cwd=outside.sources)
    assert log.returncode == 0, log.stdout
    (archive,) = (outside.folder / "sdist").glob("*.tar.gz")
    log = outside.install(archive, BASISCONV_BUILD="cpu")
    assert log.returncode == 0, log.stdout[-6000:]
