"""Self-checks of GPU variants: run once, remembered by device, driver and packages, and heeded by automatic choice."""

from __future__ import annotations

import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from basisconv_kernels import BackendUnavailable, use_backend
from basisconv_kernels.core import log, registry, selfcheck
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.core.selfcheck import NOT_YET, Check

CUDA, CPU = SimpleNamespace(device="cuda"), SimpleNamespace(device="cpu")


class Kernel:
    """Stands in for a kernel's check: counts its runs, and raises what it is told to."""

    def __init__(self):
        self.runs, self.error, self.seen = 0, None, None

    def __call__(self):
        self.runs += 1
        self.seen = (registry.wish(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        if self.error is not None:
            raise self.error


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A made-up GPU: its facts may be changed; an empty cache folder and no packaged verdicts."""
    now = {"device": {"name": "NVIDIA Abacus 3", "capability": "9.0"}, "driver": "1.2.3", "packages": {"torch": "2.13"}}
    monkeypatch.setenv("BASISCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(selfcheck, "facts", lambda: now)
    monkeypatch.setattr(selfcheck, "_here", {})
    monkeypatch.setattr(log, "_said", set())
    return now


@pytest.fixture
def stub(machine, monkeypatch):
    made = Kernel()
    monkeypatch.setattr(registry, "absent", lambda name: None)
    monkeypatch.setattr(registry, "load", lambda target: lambda problem: Check("abacus sums", made))
    return made


FAST = Candidate("fast", "math:sqrt", lambda problem: (), check="stub:check")
PLAIN = Candidate("plain", "math:floor", lambda problem: ())


def choose(problem=CUDA, asked=None):
    return registry.select("op", (FAST, PLAIN), problem, asked).name


def test_a_variant_is_checked_once_and_then_chosen(stub):
    assert selfcheck.known("abacus sums") == NOT_YET
    assert [choose(), choose()] == ["fast", "fast"]
    assert stub.runs == 1
    assert selfcheck.known("abacus sums") is None


def test_a_failure_disables_it_and_says_so(stub, caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    stub.error = AssertionError("got 4, expected 5\nand more")
    assert [choose(), choose()] == ["plain", "plain"]
    assert stub.runs == 1
    why = "failed its self-check on this device: AssertionError: got 4, expected 5"
    assert selfcheck.known("abacus sums") == why
    assert [record.getMessage() for record in caplog.records] == [
        f"abacus sums {why}; it is not chosen automatically",
        f"op [{CUDA}] → plain (not fast: {why})",
    ]


def test_an_explicit_wish_and_a_cpu_ask_nobody(stub):
    stub.error = AssertionError("wrong")
    assert choose(asked="fast") == "fast"
    assert choose(CPU) == "fast"
    assert stub.runs == 0


def test_where_nothing_else_can_run_a_failure_is_an_error_with_its_reason(stub):
    stub.error = RuntimeError("no kernel image")
    with pytest.raises(BackendUnavailable, match="fast: failed its self-check on this device: RuntimeError: no kernel"):
        registry.select("op", (FAST,), CUDA, None)


@pytest.mark.parametrize("error", [None, AssertionError("wrong")], ids=["passed", "failed"])
def test_verdicts_are_remembered_on_disk(stub, error):
    stub.error = error
    first = choose()
    selfcheck.forget()  # as another process would begin
    assert choose() == first
    assert stub.runs == 1
    (row,) = json.loads(selfcheck.user_file().read_text())["rows"]
    assert row["variant"] == "abacus sums"
    assert (row["against"] is None) == (error is None)


@pytest.mark.parametrize(
    "changed",
    [
        {"driver": "1.2.4"},
        {"packages": {"torch": "2.14"}},
        {"device": {"name": "NVIDIA Abacus 4", "capability": "9.0"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_device_driver_or_version_is_checked_anew(stub, machine, changed):
    choose()
    before = dict(machine)
    for facts, runs in ((changed, 2), (before, 2)):  # and the old verdict is still there afterwards
        machine.update(facts)
        selfcheck.forget()
        choose()
        assert stub.runs == runs


def test_a_packaged_pass_holds_for_any_driver(stub, machine):
    selfcheck.PACKAGED.mkdir()
    row = {"variant": "abacus sums", "against": None, **machine, "driver": "0.0.1"}
    content = {"format": selfcheck.FORMAT, "version": selfcheck.VERSION, "rows": [row]}
    (selfcheck.PACKAGED / "nvidia-abacus-3-9.0.json").write_text(json.dumps(content))
    assert choose() == "fast"
    assert stub.runs == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "x"}', '{"format": "basisconv-selfcheck", "version": 1, "rows": [3]}']
)
def test_a_damaged_file_is_passed_over_and_written_anew(stub, text):
    selfcheck.user_file().parent.mkdir(parents=True)
    selfcheck.user_file().write_text(text)
    assert choose() == "fast"
    assert stub.runs == 1
    assert len(json.loads(selfcheck.user_file().read_text())["rows"]) == 1


def test_a_folder_that_cannot_be_written_costs_one_check_a_process(stub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BASISCONV_CACHE", str(tmp_path / "file"))
    assert [choose(), choose()] == ["fast", "fast"]
    assert stub.runs == 1


def test_lack_of_memory_is_no_verdict(stub):
    stub.error = torch.OutOfMemoryError("none left")
    assert choose() == "plain"
    stub.error = None
    assert choose() == "fast"


def test_nothing_is_checked_while_a_graph_is_captured(stub, monkeypatch):
    monkeypatch.setattr(selfcheck, "capturing", lambda: True)
    assert choose() == "plain"
    monkeypatch.setattr(selfcheck, "capturing", lambda: False)
    assert choose() == "fast"
    assert stub.runs == 1


def test_the_check_sees_no_mode_of_the_caller(stub):
    with use_backend(None), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert choose() == "fast"
    assert stub.seen == (None, True, False)


def test_two_threads_check_once(stub):
    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stub.runs == 1
