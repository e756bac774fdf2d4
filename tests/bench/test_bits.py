"""Binary, stacked and ternary cases: every engine's numbers pass the gate, wrong ones do not, work and rates add up."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import binary_conv2d, stacked_binary_conv2d, suites, ternary_conv2d
from bench.harness import bits, engines, gate, payload
from bench.harness.case import Suite, Target
from bench.harness.engine_bits import TorchInt8
from bench.harness.engine_ours import Candidate, Ours
from bench.harness.engine_torch import Eager
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Files
from bench.harness.tables import bars, outcome_value
from bench.harness.verdict import outcomes

SMALL = {"N": 2, "C": 36, "K": 36, "H": 6, "W": 7}


def small(suite, index=0):
    """A case of a suite, at a size for tests."""
    case = suite.cases[index]
    sizes = {**SMALL, "n": 9} if hasattr(case.problem, "n") else SMALL
    return replace(case, problem=replace(case.problem, **sizes))


CASES = {suite.name: small(suite) for module in (binary_conv2d, stacked_binary_conv2d, ternary_conv2d)
         for suite in module.suites()}  # fmt: skip


def judged(case, made, method):
    results = [torch.from_numpy(np.asarray(array)) for array in method.output()]
    return gate.check(results, made.answers[method.form], torch.float32, method.form == "fused")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_engine_of_ours_and_of_pytorch_passes_the_gate(case, tmp_path):
    made = payload.build(case, tmp_path)
    methods = Ours().prepare(Files(tmp_path))
    methods += Eager().prepare(Files(tmp_path)) if "dense" in case.forms else []
    methods += TorchInt8().prepare(Files(tmp_path)) if "int8" in case.forms else []
    assert {m.form for m in methods} == set(case.forms) - {"binary"}
    for method in methods:
        method.call()
        assert judged(case, made, method)["worst"] <= 1


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
def test_onnxruntime_on_codes(tmp_path, monkeypatch):
    from bench.harness.engine_int8 import OnnxRuntimeInt8

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = payload.build(CASES["C6"], tmp_path)
    (method,) = OnnxRuntimeInt8().prepare(Files(tmp_path))
    assert judged(CASES["C6"], made, method)["worst"] <= 1


@pytest.mark.parametrize("name", ["C5", "C6", "C9"])
def test_one_wrong_element_is_found(name, tmp_path):
    case = CASES[name]
    made = payload.build(case, tmp_path)
    (method,) = Ours().prepare(Files(tmp_path))
    (found,) = method.output()
    found[1, 2, 3, 4] = -found[1, 2, 3, 4] if name == "C5" else found[1, 2, 3, 4] + 1
    with pytest.raises(gate.WrongResultError):
        gate.check([torch.from_numpy(found)], made.answers["fused"], torch.float32, True)


def test_other_kernels_say_what_they_do_not_run(tmp_path):
    payload.build(CASES["C5"], tmp_path)
    candidate = Candidate("torch:nonzero")
    with pytest.raises(UnsupportedError, match="this case is of another op"):
        candidate.prepare(Files(tmp_path))
    with pytest.raises(UnsupportedError, match="no int8 form"):
        TorchInt8().prepare(Files(tmp_path))
    about = json.loads((tmp_path / "payload.json").read_text())
    assert (about["forms"], about["padding"]) == (["fused", "dense"], 1)


def test_work_counts_every_pair_for_every_form():
    case = CASES["C6"]
    pairs = 2 * 36 * 6 * 7 * 36 * 9
    assert {bits.work_of(case, form)["flops"] for form in case.forms} == {2 * pairs}
    assert bits.work_of(CASES["C5"], "fused")["bytes"] == (2 * 36 * 6 * 7 * 2 + 36 * 36 * 9) // 8


def test_rates_are_judged_in_their_unit(make_row):
    target = Target("rate", "rate", 800.0, 1000.0, "wide")
    suite = Suite("C5", "", binary_conv2d.suites()[0].cases, ("ours",), (target,))
    row = make_row(suite="C5", case="n1_128to128_at28", samples=(1e-3, 1.1e-3, 1e-3), work={"flops": 1.8e9})
    narrow = make_row(suite="C5", case="n1_64to64_at56", work={"flops": 1.8e9})
    (found,) = outcomes([row, narrow], suite)
    assert (found.verdict, outcome_value(found)) == ("met", "900 GMAC/s")
    assert bars(target) == ("800 GMAC/s", "1000 GMAC/s")


def test_larq_is_missing_by_name_unless_a_python_is_named(monkeypatch):
    monkeypatch.delenv("BASISCONV_LARQ_PYTHON", raising=False)
    spec = engines.find("larq")
    assert spec.installed() == (importlib.util.find_spec("larq_compute_engine") is not None)
    monkeypatch.setenv("BASISCONV_LARQ_PYTHON", "another/python")
    assert (spec.python, spec.installed()) == ("another/python", True)


def test_suites_are_in_the_order_of_their_numbers():
    names = list(suites.suites())
    assert names[:11] == [f"C{number}" for number in range(1, 12)]
    assert set(names[11:]) == {"smoke", "ternary", "tucker"}
