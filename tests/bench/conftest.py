"""Synthetic rows for the tests of the benchmark harness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.harness.rows import Row


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row of suite C1 with a time; every field can be given."""

    def make(engine: str = "ours", form: str = "fused", samples: tuple[float, ...] = (1e-3,), **fields: Any) -> Row:
        values: dict[str, Any] = {
            "suite": "C1",
            "case": "n1_64to64_at56_q16",
            "kind": "layer",
            "layout": "channels_last",
            "status": "ok",
            "context": {"threads": 1, "device": {"cpu": "Some CPU"}, "versions": {"torch": "2"}, "git": {}},
            **fields,
        }
        return Row(engine=engine, form=form, samples=list(samples), **values)

    return make
