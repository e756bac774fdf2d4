"""Modules that run the CUDA sources on the CPU, one build a session."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cuda_on_cpu import building

KERNELS = sorted(building.CUDA.glob("basis_conv2d*.cu"))
# The kernel of the whole chain and the packing of its weights; module.cpp's kernels stay out of it.
CHAIN = [building.CUDA / "basis_conv2d.cu", building.CUDA / "tucker_conv2d.cu"]
BITS = [building.CUDA / "bitpack.cu", *sorted(building.CUDA.glob("binary_conv2d*.cu"))]
TERNARY = sorted(building.CUDA.glob("ternary_conv2d*.cu"))


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The kernels and the primitives as they are."""
    own = [building.HERE / "primitives.cu", building.HERE / "module.cpp"]
    return building.build("basisconv_emulated", [*KERNELS, *own])


@pytest.fixture(scope="session")
def binary_module() -> ModuleType:
    """The kernels of bits as they are."""
    return building.build("basisconv_binary", [*BITS, building.HERE / "binary_module.cpp"])


@pytest.fixture(scope="session")
def tucker_module() -> ModuleType:
    """The one-pass kernel of ``tucker_conv2d`` as it is."""
    return building.build("basisconv_tucker", [*CHAIN, building.HERE / "tucker_module.cpp"])


@pytest.fixture(scope="session")
def ternary_module() -> ModuleType:
    """The kernel of filters of -1, 0 and +1 as it is."""
    return building.build("basisconv_ternary", [*TERNARY, building.HERE / "ternary_module.cpp"])
