"""Modules that run the CUDA sources on the CPU, one build a session."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cuda_on_cpu import building

KERNELS = [*sorted(building.CUDA.glob("basis_conv2d*.cu")), building.HERE / "module.cpp"]


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The kernels as they are."""
    return building.build("basisconv_emulated", KERNELS)
