"""The README's table: made from rows, and equal to what the committed rows make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from bench import suites as all_suites
from bench.harness import readme, rows
from bench.harness.rows import Row

ROOT = Path(__file__).parents[2]
SUITES = all_suites.suites()


@pytest.fixture
def measured(make_row: Callable[..., Row]) -> list[Row]:
    """Two cases of C1, one of which we lose; C10; and the rows of another processor."""
    lost = {"case": "n1_128to256_at28_q64_stride2"}
    memory: dict[str, Any] = {"extra_bytes": 2**19, "maps_bytes": 2**24, "im2col_bytes": 2**26, "output_bytes": 2**22}
    elsewhere = {"threads": 1, "device": {"cpu": "Other CPU"}, "git": {"commit": "fedcba9876", "dirty": True}}
    return [
        make_row(samples=(1e-3, 1e-3)),
        make_row("openvino", "two_step", (2e-3, 2e-3)),
        make_row("onnxruntime", "two_step", (3e-3, 3e-3)),
        make_row("openvino", "dense", (4e-3, 4e-3)),
        make_row(samples=(1e-3, 1e-3), **lost),
        make_row("openvino", "two_step", (0.5e-3, 0.5e-3), **lost),
        make_row(suite="C10", case="n64_64to64_at56_q16", samples=(), kind="memory", memory=memory),
        make_row(samples=(1e-3,), context=elsewhere),
        make_row("openvino", "two_step", (1.25e-3,), context=elsewhere),
    ]


def test_one_line_a_suite_with_the_lost_cases_by_name(measured: list[Row], tmp_path: Path) -> None:
    rows.append(tmp_path / "all.jsonl", measured)
    text = readme.block(rows.read([tmp_path / "all.jsonl"]), SUITES)
    first, other = text.split("**Other CPU**")
    c1, c10 = (next(line for line in first.splitlines() if line.startswith(f"| {name}:")) for name in ("C1", "C10"))
    cells = [cell.strip() for cell in c1.strip("|").split("|")]
    assert cells[1:4] == ["2", "1.00× (0.50 n1_128to256_at28_q64_stride2 … 2.00)", "4.00×"]
    assert cells[4] == "2 of 3 (n1_128to256_at28_q64_stride2: short)"
    assert "at most 0.50 MiB beyond the result" in c10
    assert "commit fedcba9 with local changes" in other
    assert "| 1.25× |" in other


def test_processors_of_one_name_have_a_table_each(make_row: Callable[..., Row], tmp_path: Path) -> None:
    """Virtual machines hide the model, so that processors years apart share a name."""
    for family, seconds in (("6-207", 2e-3), ("6-167", 3e-3)):
        context = {"threads": 1, "device": {"cpu": "A CPU", "family": family}, "git": {"commit": "fedcba9876"}}
        rows.append(
            tmp_path / f"{family}.jsonl",
            [make_row(samples=(1e-3,), context=context), make_row("openvino", "two_step", (seconds,), context=context)],
        )
    text = readme.block(rows.read(sorted(tmp_path.iterdir())), SUITES)
    for family, ratio in (("6-167", "3.00×"), ("6-207", "2.00×")):
        assert ratio in text.split(f"**A CPU**, family {family}, 1 thread")[1].split("**A CPU**")[0]


def test_only_what_stands_between_the_marks_is_replaced(measured: list[Row]) -> None:
    old = f"# Title\n\n{readme.BEGIN}old\n{readme.END}\nrest\n"
    new = readme.updated(old, measured, SUITES)
    assert new.startswith(f"# Title\n\n{readme.BEGIN}\n**Some CPU**")
    assert new.endswith(f"|\n\n{readme.END}\nrest\n")
    assert readme.updated(new, measured, SUITES) == new
    for broken in ("none", f"{readme.END}{readme.BEGIN}", old + readme.BEGIN):
        with pytest.raises(ValueError, match="needs the marks"):
            readme.updated(broken, measured, SUITES)


def test_the_table_of_the_readme_is_that_of_the_committed_rows() -> None:
    """After adding rows: ``python -m bench report bench/results/*/*.jsonl --readme README.md``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.updated(text, rows.read(sorted((ROOT / "bench/results").glob("*/*.jsonl"))), SUITES) == text
