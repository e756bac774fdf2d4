"""One short run of the demo, shared by the tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from basisconv_kernels.__main__ import main


@dataclass(frozen=True)
class Run:
    """What ``basisconv demo --quick`` left behind."""

    code: int
    folder: Path
    results: dict[str, Any]
    page: str


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The results of a quick run, whatever part of them a test looks at."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    code = main(["demo", "--quick", "--out", str(folder)])
    return Run(
        code,
        folder,
        json.loads((folder / "results.json").read_text("utf-8")),
        (folder / "index.html").read_text("utf-8"),
    )
