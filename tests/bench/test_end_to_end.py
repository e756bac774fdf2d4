"""One round of the smallest suite through the real command line, with the engines that are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.harness.engines import find
from bench.harness.paths import ROOT

pytest.importorskip("typer")
pytest.importorskip("rich")

KERNELS = """
import torch.nn.functional as F

def forgets_the_bias(
    input, basis_weight, coefficients, bias=None, *, stride, padding, dilation, groups, activation, residual, precise
):
    top, _, left, _ = padding
    maps = F.conv2d(input, basis_weight, None, stride, (top, left), dilation, groups)
    return F.conv2d(maps, coefficients[:, :, None, None])
"""
ENGINES = ("ours", "torch_eager", "onnxruntime", "openvino")


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m bench`` as a user with a module of kernels in his folder."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The finished process and its rows."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "kernels.py").write_text(KERNELS)
    arguments = ["run", "--suite", "smoke", "--rounds", "1", "--sample-ms", "1", "--out", "rows.jsonl", "--json"]
    for engine in ENGINES:
        arguments += ["--engine", engine]
    done = bench(folder, *arguments, "--candidate", "kernels:forgets_the_bias")
    assert (folder / "rows.jsonl").exists(), done.stderr
    return done, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_installed_engine_has_right_results_and_times(
    finished: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    _, rows = finished
    for engine in ENGINES:
        spec = find(engine)
        mine = [row for row in rows if row["engine"] == engine]
        if importlib.util.find_spec(spec.requires) is None:
            assert [row["status"] for row in mine] == ["missing"]
            continue
        assert {row["status"] for row in mine} == {"ok"}, mine
        assert {row["form"] for row in mine} == set(spec.forms) & {"fused", "two_step", "dense"}
        for row in mine:
            assert len(row["samples"]) == 1
            assert row["samples"][0] > 0
            assert 0 <= row["error"]["worst"] <= 1
            assert row["context"]["peaks"]["flops_per_s"]["float32"] > 0


def test_a_wrong_kernel_gets_no_time(
    finished: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    done, rows = finished
    (found,) = [row for row in rows if row["engine"] == "candidate:kernels:forgets_the_bias"]
    assert found["status"] == "failed"
    assert "times what is allowed" in found["reason"]
    assert found["samples"] == []
    assert "seconds" not in found
    assert found["error"]["worst"] > 1
    assert done.returncode == 1


def test_stdout_is_the_rows_and_progress_goes_to_stderr(
    finished: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    done, rows = finished
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert "smoke n2_8to12_at9_q5: done" in done.stderr
