"""Building and installing the package outside the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTEST_OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
FACTS = "import json; from basisconv_kernels.core import extension; print(json.dumps(extension.facts()))"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with both outputs in one text."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BASISCONV_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@dataclass
class Outside:
    """A folder with a copy of the sources, away from the tree, and what is built and installed there."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> Path:
        """The copy of the sources."""
        return self.folder / "sources"

    @property
    def site(self) -> Path:
        """Where wheels are installed; torch still comes from the running environment."""
        return self.folder / "site"

    def copy_sources(self) -> None:
        """Copy what git would: no builds, no caches."""
        ignored = shutil.ignore_patterns(
            "*.so", "__pycache__", "*.egg-info", ".git", ".venv*", "build", "out", ".*_cache"
        )
        shutil.copytree(ROOT, self.sources, ignore=ignored)

    def pip(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run pip without build isolation: the registry is not asked."""
        return run(sys.executable, "-m", "pip", *arguments, cwd=self.folder, **{**self.environment, **environment})

    def wheel(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Build the wheel of the copied sources into the folder ``wheels``."""
        return self.pip(
            "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", self.folder / "wheels",
            self.sources, **environment,
        )  # fmt: skip

    def install(self, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Install a folder, wheel or sdist into an empty ``site``."""
        shutil.rmtree(self.site, ignore_errors=True)
        return self.pip(
            "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", self.site, source,
            **environment,
        )  # fmt: skip

    def python(
        self, *arguments: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with the installed package, in a folder that is not the tree."""
        environment = {**self.environment, "PYTHONPATH": str(self.site), **environment}
        return run(sys.executable, *arguments, cwd=cwd or self.folder, **environment)

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the installed command ``basisconv`` as a user would."""
        return self.run(self.site / "bin" / "basisconv", *arguments, PYTHONPATH=str(self.site), COLUMNS="300")

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run any command in this folder."""
        return run(*command, cwd=self.folder, **environment)

    def pytest(self, *paths: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run copied tests against the installed package."""
        shutil.copytree(ROOT / "tests", self.folder / "tests", dirs_exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", self.folder)  # options and markers
        return self.python("-m", "pytest", *PYTEST_OPTIONS, *paths, **environment)

    def cpu(self, **environment: str) -> dict[str, Any]:
        """What the installed native library says about instruction sets; fails where none was built."""
        told = self.python("-c", FACTS, **environment)
        assert told.returncode == 0, told.stdout
        facts = json.loads(told.stdout)
        assert facts, "the native library does not load"
        return facts["cpu"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """A fresh copy of the sources outside the tree."""
    place = Outside(tmp_path_factory.mktemp("outside"))
    place.copy_sources()
    return place
