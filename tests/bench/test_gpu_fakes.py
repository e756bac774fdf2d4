"""What the GPU commands do with a device and its tools, on a device and tools that are not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import check, facts, probe, timing
from bench.gpu.journal import Unavailable


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA's graphs and events with a clock of their own: every call that runs takes ``us`` microseconds of it."""
    state = SimpleNamespace(now=0.0, us=7.0, capturing=None, captured=[], refuses=False)

    class Graph:
        def __init__(self) -> None:
            self.calls = 0
            state.captured.append(self)

        def replay(self) -> None:
            state.now += self.calls * state.us

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = state.now

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    @contextlib.contextmanager
    def capture(graph: Graph):
        if state.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        state.capturing = graph
        yield
        state.capturing = None

    for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": capture, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def counted(clock: SimpleNamespace) -> Callable[[int], timing.Call]:
    def make(i: int) -> timing.Call:
        def call() -> int:
            if clock.capturing is not None:
                clock.capturing.calls += 1
            return i

        return call

    return make


def test_a_time_is_that_of_one_call(clock):
    found = timing.CudaMeter(samples=5, cold_bytes=1000).measure(counted(clock), 100)
    assert found["copies"] == 10
    for way in ("graph_cold", "graph_warm"):
        assert (found[way]["median"], found[way]["samples"]) == (7.0, 5)
    assert [graph.calls for graph in clock.captured] == [10, timing.WARM_CALLS]


@pytest.mark.parametrize(("moved", "copies"), [(1, timing.MOST_COPIES), (2**40, 2)])
def test_the_number_of_copies_has_bounds(clock, moved, copies):
    assert timing.CudaMeter(samples=2).measure(counted(clock), moved)["copies"] == copies


def test_what_cannot_be_captured_is_timed_eagerly(clock):
    clock.refuses = True
    found = timing.CudaMeter(samples=2, cold_bytes=10).measure(counted(clock), 10)
    assert found["graph"] == "cannot be captured: operation not permitted when stream is capturing"
    assert "graph_cold" not in found
    assert found["eager"]["median"] > 0


def test_eager_times_wait_at_the_end_of_a_sample():
    waits = []
    spread = timing.eager_spread([lambda: time.sleep(1e-3)], 15, lambda: waits.append(1), calls_a_sample=2)
    assert spread.median >= 1000
    assert len(waits) == 4
    assert spread.samples == 3


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A compute-sanitizer that is a shell script."""
    path = folder / "compute-sanitizer"
    path.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/asked"\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setattr(facts, "tools", lambda: {"compute-sanitizer": str(path)})


def test_the_sanitizer_says_what_it_found(tmp_path, monkeypatch):
    tool(tmp_path, monkeypatch, 'echo "========= ERROR SUMMARY: 0 errors"')
    assert check._sanitize("memcheck", "cuda") == {"said": "========= ERROR SUMMARY: 0 errors"}
    asked = (tmp_path / "asked").read_text()
    assert "--tool memcheck --kernel-regex kns=conv2d --error-exitcode 99" in asked
    assert asked.endswith("-m bench.gpu.small cuda\n")
    tool(tmp_path, monkeypatch, 'echo "Invalid __shared__ read"; exit 99')
    with pytest.raises(RuntimeError, match=r"racecheck ended with 99: Invalid __shared__ read"):
        check._sanitize("racecheck", "cuda")


def test_a_sanitizer_without_that_filter_runs_without_it(tmp_path, monkeypatch):
    tool(tmp_path, monkeypatch, 'case "$*" in *kernel-regex*) exit 1;; *) echo "ERROR SUMMARY: 0 errors";; esac')
    assert check._sanitize("initcheck", "cuda") == {"said": "ERROR SUMMARY: 0 errors"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "Device not supported"; exit 1', "compute-sanitizer does not work here: Device not supported"),
        ('echo "cuda: no CUDA device"; exit 3', "cuda: no CUDA device"),
    ],
)
def test_a_sanitizer_that_does_not_work_is_a_reason_and_no_failure(tmp_path, monkeypatch, body, reason):
    tool(tmp_path, monkeypatch, body)
    with pytest.raises(Unavailable, match=reason):
        check._sanitize("memcheck", "cuda")


def test_without_a_sanitizer(monkeypatch):
    monkeypatch.setattr(facts, "tools", lambda: {"compute-sanitizer": None})
    with pytest.raises(Unavailable, match="compute-sanitizer is not on the path"):
        check._sanitize("memcheck", "cuda")


def test_the_probe_gives_what_its_program_prints(tmp_path, monkeypatch):
    made = tmp_path / "probe"
    made.write_text(
        '#!/bin/sh\n[ "$1" = cache ] && echo "{\\"l2_bytes\\": 5}" && exit 0\necho "no such thing"; exit 2\n'
    )
    made.chmod(0o755)
    monkeypatch.setattr(probe, "program", lambda: made)
    assert probe.measured("cache") == {"l2_bytes": 5}
    with pytest.raises(RuntimeError, match="probe boxes ended with 2: no such thing"):
        probe.measured("boxes")


def test_a_library_that_cannot_be_built_is_a_reason(monkeypatch):
    def run(command, **_):
        built = "setup.py" in command
        return SimpleNamespace(returncode=1 if built else 0, stdout='["not built", {}, null]', stderr="no nvcc\n")

    monkeypatch.setattr(check.subprocess, "run", run)
    with pytest.raises(Unavailable, match=r"carried library: not built; building one: .*no nvcc"):
        check.library()
