"""Rows survive the way to disk and back; anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness import rows
from bench.harness.rows import Row, RowFormatError

Make = Callable[..., Row]


def test_round_trip(make_row: Make, tmp_path: Path) -> None:
    problem = Conv2dProblem(C=3, Q=2, K=4, N=1, H=5, W=6, dtype=torch.bfloat16)
    given = [
        make_row(problem=rows.describe(problem), error={"worst": 0.5}, work={"roofline_s": 5e-4}, calls=7),
        make_row("openvino", "two_step", (), status="missing", reason="not installed"),
        make_row(case="resnet18_n1", parts=[["a", 2, True]], memory={"extra_bytes": 1}),
    ]
    path = tmp_path / "deep" / "rows.jsonl"
    rows.append(path, given[:1])
    rows.append(path, given[1:])
    assert rows.read([path]) == given
    assert given[0].roofline_share == 0.5
    assert given[1].roofline_share is None
    assert given[1].seconds is None


def test_a_line_is_plain_json_with_its_summary(make_row: Make) -> None:
    data = json.loads(make_row(samples=(1.0, 3.0, 2.0)).to_json())
    assert data["schema"] == rows.SCHEMA
    assert data["seconds"]["median"] == 2.0
    assert data["problem"] == {}


def test_a_later_row_of_the_same_key_replaces_the_earlier(make_row: Make, tmp_path: Path) -> None:
    old, new = make_row(samples=(1.0,)), make_row(samples=(2.0,))
    other_threads = replace(old, context={**old.context, "threads": 2})
    rows.append(tmp_path / "r.jsonl", [old, other_threads, new])
    assert rows.read([tmp_path / "r.jsonl"]) == [other_threads, new]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "file:1: not JSON"),
        ("[]", "file:1: needs schema 1, got list"),
        ('{"schema": 99}', "file:1: needs schema 1, got 99; measure again"),
        ('{"schema": 1, "suite": "C1"}', "file:1: lacks case, kind, engine, form, layout, status"),
    ],
)
def test_what_is_no_row_is_refused(line: str, message: str) -> None:
    with pytest.raises(RowFormatError, match=message):
        rows.parse(line, "file:1")
