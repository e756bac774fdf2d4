"""Tables of measured times: which file is used, which is ignored and why, and the rule that judges them."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from basisconv_kernels.core import log, tuning
from basisconv_kernels.core.problem import OPEN, Conv2dProblem

OP = "basis_conv2d"
PROBLEM = Conv2dProblem(C=8, Q=4, K=12, N=1, H=6, W=7, padding=(1, 1, 1, 1))

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    monkeypatch.setattr(log, "_said", set())


def spread(median: float, width: float = 0.1) -> dict[str, float]:
    return {"median": median, "q1": median * (1 - width), "q3": median * (1 + width)}


def an_entry(problem: Conv2dProblem = PROBLEM, *, cpu: float = 1.0, plain: float = 2.0, width: float = 0.1, **more):
    ms = {"cpu": spread(cpu, width), "reference": spread(plain, width)}
    entry = {"op": OP, "problem": problem.to_json(), "threads": torch.get_num_threads(), "ms": ms, "disturbed": 0.0}
    return {**entry, **more}


SLOW = {"cpu": 3.0, "plain": 2.0}


def slower(problem: Conv2dProblem = PROBLEM) -> list[str]:
    return list(tuning.slower(OP, problem))


def put(*entries: dict, path: Path | None = None) -> Path:
    path = path or tuning.user_file()
    tuning.write(list(entries), path)
    return path


def test_without_a_file_nothing_is_slower(caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    assert tuning.tables() == []
    assert slower() == []
    assert caplog.records == []


def test_the_file_lies_in_the_cache_folder_under_the_name_of_the_processor(cache):
    assert tuning.user_file() == cache / "tuned" / tuning.file_name()
    assert tuning.file_name() == tuning.file_name().lower()
    assert os.sep not in tuning.file_name()


@pytest.mark.parametrize(("cpu", "verdict"), [(1.0, []), (1.9, []), (2.1, []), (3.0, ["cpu"])])
def test_slower_means_that_the_quartiles_lie_apart(cpu, verdict):
    put(an_entry(cpu=cpu))
    assert slower() == verdict


def test_the_verdict_is_stated_with_its_numbers():
    put(an_entry(**SLOW))
    assert tuning.slower(OP, PROBLEM)["cpu"] == (
        f"measured slower than plain PyTorch, 3.000 ms against 2.000 ms (N1 @6×7, {torch.get_num_threads()} threads)"
    )


def test_one_slow_size_is_enough_and_the_worst_is_named():
    """The choice holds for all batch and map sizes, so it must not be slower at any that was measured."""
    put(
        an_entry(replace(PROBLEM, N=8)),
        an_entry(replace(PROBLEM, H=20), **SLOW),
        an_entry(replace(PROBLEM, W=30), cpu=9.0, plain=2.0),
    )
    assert "9.000 ms against 2.000 ms (N1 @6×30" in tuning.slower(OP, PROBLEM)["cpu"]
    assert len(tuning.entries_for(OP, PROBLEM)) == 3


CHANGED = {
    "C": {"C": 16}, "Q": {"Q": 2}, "K": {"K": 13}, "R": {"R": 5}, "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 1, 0, 0)}, "dilation": {"dilation": (1, 2)}, "groups": {"groups": 2},
    "compact": {"groups": 2, "compact": True}, "dtype": {"dtype": torch.bfloat16},
    "layout": {"channels_last": True}, "precise": {"precise": True}, "device": {"device": "cuda"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_another_problem_is_not_judged(change):
    put(an_entry(**SLOW))
    assert slower(replace(PROBLEM, **change)) == []


def test_batch_map_and_epilogue_make_no_other_problem():
    put(an_entry(**SLOW))
    change = {"N": 0, "H": 0, "W": 0, "bias": True, "residual": True, "activation": "relu"}
    assert set(change) == set(OPEN)
    assert slower(replace(PROBLEM, **change)) == ["cpu"]


def test_another_op_and_another_number_of_threads_are_not_judged(threads):
    put(an_entry(**SLOW))
    assert tuning.slower("another_op", PROBLEM) == {}
    threads(torch.get_num_threads() + 1)
    assert slower() == []


def test_a_busy_entry_does_not_count_nor_hide_a_calm_one():
    put(an_entry(**SLOW, disturbed=0.9))
    assert slower() == []
    put(an_entry(**SLOW), path=tuning.PACKAGED / tuning.file_name())
    assert slower() == ["cpu"]


def test_without_plain_pytorch_there_is_no_verdict():
    put(an_entry(ms={"cpu": spread(9.0)}))
    assert slower() == []


def test_the_users_table_comes_before_that_of_the_package():
    packaged = tuning.PACKAGED / tuning.file_name()
    put(an_entry(**SLOW), an_entry(replace(PROBLEM, C=16), **SLOW), path=packaged)
    put(an_entry())
    assert [table.path for table in tuning.tables()] == [packaged, tuning.user_file()]
    assert slower() == []
    assert slower(replace(PROBLEM, C=16)) == ["cpu"]


def test_writing_adds_and_replaces():
    path = put(an_entry())
    assert tuning.write([an_entry(replace(PROBLEM, N=2))], path) == 2
    assert tuning.write([an_entry(**SLOW)], path) == 2
    assert slower() == ["cpu"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def damaged(**change):
    content = {**tuning.head(), "entries": [an_entry(**SLOW)]}
    for key, value in change.items():
        content[key] = value(copy.deepcopy(content[key])) if callable(value) else value
    return json.dumps(content)


def in_entry(**change):
    return damaged(entries=lambda entries: [{**entries[0], **change}])


BAD = {
    "empty": lambda: "",
    "half": lambda: damaged()[:100],
    "no object": lambda: "[1]",
    "deep": lambda: "[" * 100_000,
    "another format": lambda: damaged(format="tuned"),
    "a newer version": lambda: damaged(version=99),
    "another processor": lambda: damaged(device=lambda device: {**device, "cpu": "Z80"}),
    "another instruction set": lambda: damaged(device=lambda device: {**device, "isa": "sse"}),
    "another PyTorch": lambda: damaged(packages=lambda packages: {**packages, "torch": "1.0"}),
    "another package": lambda: damaged(packages=lambda packages: {**packages, "basisconv_kernels": "0.0.1"}),
    "no entries": lambda: damaged(entries=None),
    "an entry of another type": lambda: damaged(entries=[7]),
    "an entry without op": lambda: in_entry(op=None),
    "an entry without problem": lambda: in_entry(problem=None),
    "threads as text": lambda: in_entry(threads="2"),
    "times as a list": lambda: in_entry(ms=[1, 2]),
    "a time as text": lambda: in_entry(ms={"cpu": {"median": "1", "q1": 1, "q3": 1}}),
    "a time that is true": lambda: in_entry(ms={"cpu": {"median": True, "q1": 1, "q3": 1}}),
    "a time that is no number": lambda: in_entry(ms={"cpu": {"median": float("nan"), "q1": 1, "q3": 1}}),
    "an endless time": lambda: in_entry(ms={"cpu": {"median": float("inf"), "q1": 1, "q3": 1}}),
    "a time beyond floats": lambda: in_entry(ms={"cpu": {"median": 10**400, "q1": 1, "q3": 1}}),
    "a quartile missing": lambda: in_entry(ms={"cpu": {"median": 1}}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_broken_or_foreign_file_is_ignored_with_one_line(content, caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    path = tuning.user_file()
    path.parent.mkdir(parents=True)
    path.write_text(content(), "utf-8")
    for _ in range(2):
        assert slower() == []
    (table,) = tuning.tables()
    assert table.unused
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"tuned table {path} is not used: ")
    assert tuning.write([an_entry(**SLOW)], path) == 1  # written anew
    assert slower() == ["cpu"]


def test_an_intact_file_of_this_process_is_used():
    """What the damaged ones above started from."""
    path = tuning.user_file()
    path.parent.mkdir(parents=True)
    path.write_text(damaged(), "utf-8")
    assert slower() == ["cpu"]


@pytest.mark.parametrize("content", [b"\xff\xfe", "folder"], ids=["no text", "a folder"])
def test_what_cannot_be_read_is_ignored(content):
    path = tuning.user_file()
    if content == "folder":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert slower() == []
    assert "cannot be read" in tuning.tables()[0].unused


def test_a_user_without_a_home_has_no_table(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    for name in ("BASISCONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for _ in range(2):
        assert slower() == []
    assert [record.getMessage() for record in caplog.records] == [
        "no tuned table of the user: Could not determine home directory."
    ]
    tuning.remember([an_entry(**SLOW)])
    assert slower() == ["cpu"]


def test_what_was_measured_here_is_remembered_where_the_file_cannot_be_written(cache, caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    tuning.remember([an_entry(**SLOW)])
    assert slower() == ["cpu"]
    assert any(record.getMessage().startswith("measured times stay in this process") for record in caplog.records)
    tuning.forget()
    assert slower() == []


def test_the_file_is_read_once(monkeypatch):
    put(an_entry())
    assert slower() == []
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("read again"))
    assert slower() == []


def test_the_release_of_pytorch_is_compared_without_patch_and_build():
    assert tuning._release("2.13.0+cpu") == tuning._release("2.13.1") == "2.13"
    assert tuning._release("2.14.0a0+git1234") == "2.14"
