"""The binary benchmark: it refuses wrong results, judges by the bars of the instruction set, and gives whole rows."""

from __future__ import annotations

import json

import pytest

from basisconv_kernels import binary_conv2d as right
from basisconv_kernels.core import timing
from bench import binary_conv2d as bench

TINY = bench.Shape(1, 33, 5)


def test_a_row_is_whole_and_json():
    row = json.loads(json.dumps(bench.measure(TINY, 0.01)))
    assert set(row["gmac_per_s"]) >= {"packed → packed", "float → float", "dense float32"}
    assert all(rate["median"] > 0 for rate in row["gmac_per_s"].values())
    assert row["case"] == "n1_33to33_at5"


def test_no_time_of_a_wrong_result(monkeypatch):
    def wrong(input, weight, **settings):
        found = right(input, weight, **settings)
        return found if settings.get("backend") == "reference" or settings.get("output") == "packed" else found + 1

    monkeypatch.setattr(bench, "binary_conv2d", wrong)
    with pytest.raises(ValueError, match=r"^bench: packed → float on n1_33to33_at5 differs from the reference"):
        bench.calls(TINY)


def test_work_counts_every_pair():
    assert bench.Shape(2, 8, 5).macs == 2 * 8 * 8 * 9 * 25


@pytest.mark.parametrize(
    ("isa", "rate", "verdicts"),
    [
        ("avx2", 351.0, ["C8 met: 351 of 350 GMAC/s", "C6 short: 2.40 of 2.5 × int8"]),
        ("avx512_vpopcntdq", 700.0, ["C5 short: 700 of 800 GMAC/s", "C5 met: 14.0 of 13 × float32",
                                     "C6 short: 2.40 of 2.5 × int8"]),
        ("avx512_bf16", 700.0, ["C5 short: 700 of 800 GMAC/s", "C5 met: 14.0 of 13 × float32",
                                "C6 short: 2.40 of 2.5 × int8"]),
        ("base", 10.0, ["C6 short: 2.40 of 2.5 × int8"]),
    ],
)  # fmt: skip
def test_bars_belong_to_an_instruction_set(isa, rate, verdicts):
    assert bench.judge(isa, {"packed → packed": timing.Spread.of([rate])}, 14.0, 2.4) == verdicts
