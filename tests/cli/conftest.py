"""The command line run in this process, and a small network for it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from basisconv_kernels.__main__ import main

NETWORK = """
    from torch import nn

    def small():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
            nn.ReLU(), nn.Conv2d(24, 8, 1),
        )

    def not_a_network():
        return 3
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, which must be one JSON value."""
        return json.loads(self.out)


@pytest.fixture
def basisconv(capsys):
    """Run a command line: ``basisconv("env", "--json")``."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def network(tmp_path, monkeypatch):
    """``module:function`` of a small network that lies in the working directory."""
    (tmp_path / "tiny_network_for_cli.py").write_text(textwrap.dedent(NETWORK), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "tiny_network_for_cli:small"
