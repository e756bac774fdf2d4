"""Facts about the processor and the package that other modules key on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import basisconv_kernels
from basisconv_kernels.core import extension, machine


def test_the_processor_has_a_name():
    assert machine.cpu_name().strip() == machine.cpu_name() != ""


def test_the_instruction_set_is_what_the_library_states(monkeypatch):
    assert machine.isa() in ("none", "base", "avx2", "avx512", "avx512_vpopcntdq", "avx512_bf16", "amx")
    monkeypatch.setattr(extension, "facts", dict)
    assert machine.isa() == "none"


def test_the_version_is_that_of_the_project():
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("runs outside the tree")
    (stated,) = re.findall(r'^version = "(.+)"$', project.read_text("utf-8"), re.MULTILINE)
    assert basisconv_kernels.__version__ == stated
