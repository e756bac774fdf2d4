"""Measured times of ``tucker_conv2d``: entries, the choice that obeys them, first use, and ``basisconv tune``."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from basisconv_kernels.compression import tune
from basisconv_kernels.core import registry, tuning
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
from basisconv_kernels.ops import tucker_conv2d as op
from basisconv_kernels.ops import tucker_conv2d_tuning

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
]
PROBLEM = TuckerConv2dProblem(N=2, C=8, H=6, W=7, rank_in=3, Q=4, K=12, padding=(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(op, "_plans", {})


def tensors(dtype=torch.float32):
    shapes = ((2, 8, 6, 7), (8, 3), (4, 3, 3, 3), (12, 4))
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def chosen():
    return op._plan((*tensors(), None, None), (1, 1, 1, None, False, None)).backend


def say_slower():
    ms = {name: {"median": t, "q1": t, "q3": t} for name, t in (("cpu", 2.0), ("reference", 1.0))}
    entry = {"op": op.OP, "problem": PROBLEM.to_json(), "threads": torch.get_num_threads(), "ms": ms}
    tuning.write([{**entry, "fastest": "reference", "disturbed": 0.0}], tuning.user_file())


def test_an_entry_is_what_the_reader_expects():
    entry = tucker_conv2d_tuning.measure(PROBLEM, 0.01)
    assert set(entry["ms"]) == {"cpu", "reference"}
    assert tuning._is_entry(json.loads(json.dumps(entry)))
    assert entry["problem"] == PROBLEM.to_json()


def test_a_table_keeps_calls_off_a_slower_form():
    assert chosen() == "cpu"
    say_slower()
    op._plans.clear()
    assert chosen() == "reference"
    assert tuning.slower(op.OP, PROBLEM)
    assert not tuning.slower("basis_conv2d", PROBLEM)


def test_first_use_measures_weights_once_and_obeys(monkeypatch):
    monkeypatch.setenv("BASISCONV_TUNE", "first-use")
    monkeypatch.setattr(tucker_conv2d_tuning, "FIRST_USE_SECONDS", 0.01)
    for _ in range(2):
        op.tucker_conv2d(*tensors(), padding=1)
    (entry,) = json.loads(tuning.user_file().read_text("utf-8"))["entries"]
    assert entry["problem"] == PROBLEM.to_json()
    op.tucker_conv2d(*tensors(torch.float64), padding=1)
    op.tucker_conv2d(*tensors(), padding=1, stride=2, backend="cpu")
    assert len(json.loads(tuning.user_file().read_text("utf-8"))["entries"]) == 1


def test_problems_of_text_and_of_a_network():
    text = "N=2,C=8,H=6,W=7,rank_in=3,Q=4,K=12,R=3,padding=1"
    layer = TuckerConv2d(8, 12, 3, rank_in=3, rank_out=4, padding=1)
    (of_layer,) = tune.model_problems(nn.Sequential(layer), torch.zeros(2, 8, 6, 7))
    assert tune.parse_problem(text) == of_layer
    (entry,) = tune.tune([of_layer], 0.01)
    assert entry["op"] == "tucker_conv2d"
    with pytest.raises(ValueError, match="has no groups"):
        tune.parse_problem(f"{text},groups=2")
