"""Where things lie. Imports nothing heavy: worker processes without PyTorch load it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
