"""Worker processes: what the parent learns when one is missing, dies or hangs, and a user's kernel as an engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d import basis_conv2d
from bench.harness import answers, engine_ours, engines, gate, payload, worker, workers
from bench.harness.case import Case
from bench.harness.engines import EngineSpec
from bench.harness.errors import EngineMissingError, UnsupportedError, WorkerDiedError
from bench.harness.protocol import Files

PROBLEM = Conv2dProblem(N=1, C=4, H=6, W=5, Q=3, K=7, padding=(1, 1, 1, 1), bias=True)


def kernel(input, basis_weight, coefficients, bias=None, **arguments):  # type: ignore[no-untyped-def]
    """What a user plugs in."""
    return basis_conv2d(input, basis_weight, coefficients, bias, **arguments, backend="reference")


@pytest.fixture
def cheap_engine(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine whose process loads in no time."""
    pytest.importorskip("onnxruntime")
    return "onnxruntime"


def test_a_dead_worker_tells_its_error_without_the_traceback(cheap_engine: str) -> None:
    with workers.WorkerProcess(cheap_engine, {"OMP_NUM_THREADS": "1"}) as process:
        with pytest.raises(WorkerDiedError) as caught:
            process.ask("make_coffee")
        assert str(caught.value) == (
            "onnxruntime: ended with 1: ValueError: worker: no request has the name 'make_coffee'"
        )
        with pytest.raises(WorkerDiedError):
            process.ask("release")


def test_a_hanging_worker_is_ended(cheap_engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_LIMIT_S", 0.0)
    process = workers.WorkerProcess(cheap_engine, {"OMP_NUM_THREADS": "1"})
    with pytest.raises(WorkerDiedError, match="no answer in 0 s"):
        process.ready()
    process.close()


def test_a_missing_engine_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = EngineSpec("absent", "nobody_has_this.engine:Engine", "nobody_has_this", "")
    monkeypatch.setattr(engines, "ENGINES", (absent,))
    said = io.StringIO()
    worker.serve("absent", io.StringIO(""), said)
    assert json.loads(said.getvalue()) == {"missing": "nobody_has_this is not installed"}
    assert issubclass(EngineMissingError, RuntimeError)


@pytest.mark.parametrize("kind", ["layer", "training"])
def test_a_user_kernel_is_an_engine(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ours.candidates, "load", lambda name: kernel)
    forms = ("fused", "two_step")
    made = payload.build(Case("x", kind, PROBLEM, forms), tmp_path)  # type: ignore[arg-type]
    engine = engine_ours.Candidate("kernels:kernel")
    served = worker.Worker(engine)
    (method,) = served.prepare(str(tmp_path))["methods"]
    assert (method["form"], method["layout"]) == ("fused", "channels_last")
    results = gate.load(served.output(0, str(tmp_path / "result"))["outputs"])
    assert len(results) == (5 if kind == "training" else 1)
    gate.check(results, made.answers["fused"], torch.float32, True)
    assert served.calibrate(0, 1e-4)["calls"] >= 1
    assert served.sample(0, 2, patience_s=0.0, best_probe=0.0)["seconds"] > 0
    served.release()
    assert served.methods == []


@pytest.mark.parametrize("kind", ["layer", "training"])
def test_gradients_are_switched_off_around_the_calls_not_within_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program does once is no part of what is timed; PyTorch's engines and ours are called alike."""
    seen: list[bool] = []

    def noting(input: torch.Tensor, *weights: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return kernel(input, *weights, **settings)

    monkeypatch.setattr(engine_ours.candidates, "load", lambda name: noting)
    payload.build(Case("x", kind, PROBLEM, ("fused", "two_step")), tmp_path)  # type: ignore[arg-type]
    served = worker.Worker(engine_ours.Candidate("kernels:kernel"))
    served.prepare(str(tmp_path))
    requests = (
        lambda: served.output(0, str(tmp_path / "result")),
        lambda: served.calibrate(0, 1e-4),
        lambda: served.sample(0, 2, patience_s=0.0, best_probe=0.0),
        lambda: served.memory(0),
    )
    for request in requests:
        seen.clear()
        request()
        assert set(seen) == {kind == "training"}
    assert torch.is_grad_enabled()
    (method,) = served.methods
    seen.clear()
    method.call()
    assert seen == [True]


def test_a_kernel_runs_no_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ours.candidates, "load", lambda name: kernel)
    payload.build(Case("x", "layer", PROBLEM, ("fused", "two_step")), tmp_path)
    torch.save(torch.nn.Identity(), tmp_path / "fused.pt")
    with pytest.raises(UnsupportedError, match="layers, not networks"):
        engine_ours.Candidate("kernels:kernel").prepare(Files(tmp_path))


def test_a_frozen_basis_has_no_gradient(tmp_path: Path) -> None:
    case = Case("x", "training", PROBLEM, ("fused", "two_step"), frozen=True)
    made = payload.build(case, tmp_path)
    right: answers.Answers = made.answers["fused"]
    assert [tuple(t.shape) for t in right.exact] == [(1, 7, 6, 5), (1, 4, 6, 5), (7, 3, 1, 1), (7,)]
