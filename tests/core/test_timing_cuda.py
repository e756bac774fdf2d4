"""Times on a CUDA device that is not there: graphs and events with a clock of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from basisconv_kernels.core import log, timing, timing_cuda, tuning
from basisconv_kernels.core.problem import Conv2dProblem

PROBLEM = Conv2dProblem(C=8, Q=4, K=12, N=1, H=6, W=7, device="cuda", dtype=torch.bfloat16)


def calls(cuda_clock, name, times, seen):
    """``times`` calls that note themselves, and count for the graph that is being captured."""

    def call() -> None:
        seen.append(name)
        if cuda_clock.capturing is not None:
            cuda_clock.capturing.calls += 1

    return [call] * times


def test_a_time_in_a_graph_is_that_of_one_call(cuda_clock):
    seen: list[str] = []
    both = {name: calls(cuda_clock, name, times, seen) for name, times in (("ours", 2), ("theirs", 5))}
    found = timing_cuda.compare(both, 0.0)
    assert set(found) == set(tuning.WAYS)
    assert [found["graph"][name].median for name in both] == pytest.approx([7e-3, 7e-3])
    assert {spread.samples for times in found.values() for spread in times.values()} == {timing.LEAST_ROUNDS}
    # Eager samples alternate, so that what slows the machine slows both.
    assert seen[-14:] == ["ours"] * 2 + ["theirs"] * 5 + ["ours"] * 2 + ["theirs"] * 5


def test_what_cannot_be_captured_has_eager_times_alone(cuda_clock, monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    cuda_clock.refuses = True
    found = timing_cuda.compare({"ours": calls(cuda_clock, "ours", 2, [])}, 0.0)
    assert set(found) == {"eager"}
    assert "ours cannot be captured in a CUDA graph: operation not permitted" in caplog.text


@pytest.mark.parametrize(("moved", "copies"), [(0, timing_cuda.MOST_COPIES), (2**24, 13), (2**40, 2)])
def test_the_number_of_copies_has_bounds(moved, copies):
    assert timing_cuda.copies(moved) == copies


@pytest.mark.parametrize("step", [tuning.FORWARD, tuning.TRAINING])
def test_entries_are_what_the_reader_expects(cuda_clock, step):
    modes = []

    def call() -> None:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    found = timing_cuda.entries("basis_conv2d", PROBLEM, step, {"reference": [call], "cuda": [call]}, 0.0)
    assert [entry["way"] for entry in found] == list(tuning.WAYS)
    assert all(tuning._is_entry(entry) and entry["step"] == step for entry in found)
    assert set(modes) == {(True, False) if step == tuning.TRAINING else (False, True)}
    assert found[0]["problem"] == replace(PROBLEM, device="cpu").to_json()
