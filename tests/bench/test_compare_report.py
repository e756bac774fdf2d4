"""``compare`` and ``report`` on synthetic rows, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.harness import rows
from bench.harness.rows import Row

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from bench.__main__ import app

Make = Callable[..., Row]


@pytest.fixture
def files(make_row: Make, tmp_path: Path) -> tuple[str, str]:
    """An old and a new run: the machine got 10 % slower, ours 2× faster, one engine is gone."""
    old = [
        make_row(samples=(2.0e-3, 2.1e-3), work={"flops": 1000, "roofline_s": 1e-3}),
        make_row("openvino", "two_step", (1.0e-3, 1.0e-3)),
        make_row("openvino", "dense", (4.0e-3, 4.0e-3), work={"flops": 4000, "roofline_s": 1e-3}),
        make_row("onnxruntime", "two_step", (1.0e-3, 1.0e-3)),
    ]
    new = [
        make_row(samples=(1.0e-3, 1.1e-3), work={"flops": 1000, "roofline_s": 1e-3}),
        make_row("openvino", "two_step", (1.1e-3, 1.1e-3)),
        make_row("openvino", "dense", (4.4e-3, 4.4e-3), work={"flops": 4000, "roofline_s": 1e-3}),
        make_row("onnxruntime", "", (), layout="", status="missing", reason="onnxruntime is not installed"),
        make_row("torch_eager", "two_step", (), status="failed", reason="largest error 1"),
    ]
    paths = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    rows.append(paths[0], old)
    rows.append(paths[1], new)
    return str(paths[0]), str(paths[1])


def invoke(*arguments: str, code: int = 0) -> str:
    """Standard output of the command line."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout


def test_compare(files: tuple[str, str]) -> None:
    text = invoke("compare", *files)
    assert "1.95×" in text
    assert "faster" in text
    assert "no time any more: C1 n1_64to64_at56_q16 onnxruntime two_step: not in the new run" in text
    assert "other engines changed by 0.91×" in text
    data: dict[str, Any] = json.loads(invoke("compare", *files, "--json"))
    assert data["drift"] == pytest.approx(1 / 1.1)
    assert len(data["rows"]) == 3


def test_compare_fails_when_ours_got_slower(files: tuple[str, str]) -> None:
    old, new = files
    invoke("compare", old, new, "--fail-below", "0.95")
    invoke("compare", new, old, "--fail-below", "0.95", code=1)


def test_report_names_everything_that_has_no_time(files: tuple[str, str]) -> None:
    text = invoke("report", files[1])
    assert "# Benchmarks" in text
    assert "CPU: Some CPU" in text
    assert "| n1_64to64_at56_q16 |" in text
    assert "onnxruntime: missing: onnxruntime is not installed" in text
    assert "torch_eager: failed: largest error 1" in text
    assert "**short**" in text
    assert "4.20×" in text  # dense over ours, by round: 4.4 and 4.0
    assert "4.00×" in text  # ratio of operations


def test_report_writes_plots(files: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    invoke("report", files[1], "--out", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["c1-t1-dense.svg", "c1-t1-two_step.svg", "report.md"]
    assert "![c1-t1-dense](c1-t1-dense.svg)" in (folder / "report.md").read_text()
    first = (folder / "c1-t1-dense.svg").read_bytes()
    invoke("report", files[1], "--out", str(folder))
    assert (folder / "c1-t1-dense.svg").read_bytes() == first


def test_wrong_usage_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    invoke("report", str(broken), code=2)
    invoke("report", str(tmp_path / "absent.jsonl"), code=2)
    invoke("run", "--suite", "C99", code=2)
    invoke("run", "--suite", "smoke", "--engine", "nobody", code=2)
    invoke("run", "--suite", "smoke", "--case", "nothing_like_it", code=2)


def test_list() -> None:
    assert "n1_64to64_at112_q8" in invoke("list", "--suite", "C2")
    data = json.loads(invoke("list", "--json"))
    names = [*(f"C{number}" for number in range(1, 12)), "smoke", "ternary", "tucker"]
    assert [suite["name"] for suite in data["suites"]] == names
