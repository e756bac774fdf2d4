"""Rows of binary layers of the GPU commands, rehearsed on the CPU."""

from __future__ import annotations

import json

import pytest

from basisconv_kernels import PackedTensor
from bench.gpu import bits, report
from tests.bench.test_gpu_runs import ABOUT


@pytest.mark.parametrize("engine", bits.ENGINES)
def test_a_row_of_a_binary_layer_is_checked_and_timed(engine):
    from bench.gpu.timing import CpuMeter

    data = bits.measure(bits.BinaryLayer(32, 40, 6, 2), engine, "cpu", CpuMeter())
    assert data["eager"]["median"] > 0
    assert report.subject(json.loads(json.dumps(data))) == "binary_32to40_at6_n2"
    keys = [step.key for step in bits.steps(ABOUT, "cuda", None)]
    assert f"binary_512to512_at7_n32 {engine}" in keys
    assert f"binary_128to128_at28_n128 {engine}" in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("engine", "why"), [("dense", "relative error"), ("packed_to_bf16", "off by more")])
def test_a_wrong_binary_layer_gets_no_time(monkeypatch, engine, why):
    from bench.gpu.timing import CpuMeter

    right = bits.Prepared.function
    monkeypatch.setattr(bits.Prepared, "function", lambda self, engine: lambda x: right(self, engine)(x) * 1.05)
    with pytest.raises(AssertionError, match=why):
        bits.measure(bits.BinaryLayer(32, 40, 6, 2), engine, "cpu", CpuMeter())


def test_wrong_bits_get_no_time(monkeypatch):
    prepared = bits.Prepared(bits.BinaryLayer(32, 40, 6, 2), "cpu")
    right = prepared.function("packed_to_packed")
    monkeypatch.setattr(prepared, "function", lambda engine: lambda x: PackedTensor(right(x).words ^ 1, 40))
    with pytest.raises(AssertionError, match="wrong bits"):
        prepared.check("packed_to_packed")
