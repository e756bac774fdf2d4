"""What the GPU commands do with a device and its tools, on a device and tools that are not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import check, facts, probe, timing
from bench.gpu.journal import Unavailable


def counted(cuda_clock: SimpleNamespace) -> Callable[[int], timing.Call]:
    def make(i: int) -> timing.Call:
        def call() -> int:
            if cuda_clock.capturing is not None:
                cuda_clock.capturing.calls += 1
            return i

        return call

    return make


def test_a_time_is_that_of_one_call(cuda_clock):
    found = timing.CudaMeter(samples=5, cold_bytes=1000).measure(counted(cuda_clock), 100)
    assert found["copies"] == 10
    for way in ("graph_cold", "graph_warm"):
        assert (found[way]["median"], found[way]["samples"]) == (7.0, 5)
    assert [graph.calls for graph in cuda_clock.captured] == [10, timing.WARM_CALLS]


@pytest.mark.parametrize(("moved", "copies"), [(1, timing.MOST_COPIES), (2**40, 2)])
def test_the_number_of_copies_has_bounds(cuda_clock, moved, copies):
    assert timing.CudaMeter(samples=2).measure(counted(cuda_clock), moved)["copies"] == copies


def test_what_cannot_be_captured_is_timed_eagerly(cuda_clock):
    cuda_clock.refuses = True
    found = timing.CudaMeter(samples=2, cold_bytes=10).measure(counted(cuda_clock), 10)
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
