"""With no compiler the package installs, imports, runs on the reference, and says so."""

from __future__ import annotations

from typing import Any

import pytest

USE = """
import torch, basisconv_kernels
from basisconv_kernels.core import registry
print("cpu:", registry.absent("cpu"))
out = basisconv_kernels.basis_conv2d(torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3), torch.ones(3, 2))
print("sum:", out.sum().item())
"""


pytestmark = pytest.mark.xdist_group("without_compiler")


@pytest.fixture(scope="module")
def installed(outside: Any) -> Any:
    outside.log = outside.install(outside.sources, CXX="no-such-compiler")
    return outside


def test_install_succeeds_and_says_why_nothing_native_was_built(installed: Any) -> None:
    assert installed.log.returncode == 0, installed.log.stdout
    assert "no C++ compiler (no-such-compiler)" in " ".join(installed.log.stdout.split())


def test_a_compiler_of_an_older_language_counts_as_none(outside: Any) -> None:
    older = outside.folder / "older"
    older.write_text("#!/bin/sh\necho 'error: unrecognized command-line option -std=c++20' >&2\nexit 1\n")
    older.chmod(0o755)
    log = outside.wheel(CXX=str(older))
    assert log.returncode == 0, log.stdout
    reason = f"no native kernels ({older} cannot compile C++20: error: unrecognized command-line option -std=c++20)"
    assert reason in " ".join(log.stdout.split())
    (built,) = (outside.folder / "wheels").glob("*.whl")
    assert "py3-none-any" in built.name


def test_it_runs_on_the_reference(installed: Any) -> None:
    used = installed.python("-c", USE)
    assert used.returncode == 0, used.stdout
    assert "cpu: the native library is not built" in used.stdout
    assert "sum: 1944.0" in used.stdout  # 9 pixels, 3 outputs, 2 maps of 4*9 ones


def test_the_tree_is_not_what_was_imported(installed: Any) -> None:
    used = installed.python("-c", "import basisconv_kernels, pathlib; print(pathlib.Path(basisconv_kernels.__file__))")
    assert str(installed.site) in used.stdout


def test_triton_kernels_are_one_copy_under_the_package(installed: Any) -> None:
    used = installed.python("-c", "import basisconv_kernels.triton_kernels as t; print(t.__file__)")
    assert used.returncode == 0, used.stdout
    assert str(installed.site / "basisconv_kernels" / "triton_kernels") in used.stdout


def test_data_files_and_licences_travel(installed: Any) -> None:
    package = installed.site / "basisconv_kernels"
    for name in ("fashion_vgg.safetensors", "t10k-images-idx3-ubyte.gz", "FASHION_MNIST_LICENSE"):
        assert (package / "assets" / name).is_file()
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("mode", ["cpu", "cuda", "nonsense"])
def test_an_explicit_wish_that_cannot_be_met_fails(outside: Any, mode: str) -> None:
    log = outside.wheel(CXX="no-such-compiler", BASISCONV_BUILD=mode)
    assert log.returncode != 0
    assert "BASISCONV_BUILD" in log.stdout
