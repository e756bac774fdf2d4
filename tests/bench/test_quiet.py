"""Samples are taken at full speed, or counted as disturbed: judged by probes, never by their own times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.harness import quiet
from bench.harness.quiet import SLOWER, Watch, quietest

FULL = 1.0
HALF = 2.0


def watch(*probes: float) -> tuple[Watch, Iterator[float]]:
    rest = iter(probes)
    return Watch(probe=lambda: next(rest)), rest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "PAUSE_S", 0.0)
    monkeypatch.setattr(quiet, "FIRST_LOOKS", 0)


def test_a_sample_between_two_fast_probes_is_taken_once() -> None:
    eyes, rest = watch(FULL, FULL * 1.01)
    assert eyes.during(lambda: 7.0, patience_s=60) == (7.0, FULL * 1.01)
    assert list(rest) == []


def test_a_slow_core_is_waited_for_before_anything_is_timed() -> None:
    eyes, _ = watch(HALF, HALF, FULL, FULL)
    taken = []
    assert eyes.during(lambda: taken.append(0) or 7.0, patience_s=60, best=FULL) == (7.0, FULL)
    assert len(taken) == 1


def test_a_sample_whose_core_slowed_down_meanwhile_is_taken_again() -> None:
    eyes, rest = watch(FULL, HALF, FULL, FULL)
    samples = iter((9.0, 7.0))
    assert eyes.during(lambda: next(samples), patience_s=60) == (7.0, FULL)
    assert list(rest) == []


def test_without_patience_the_sample_stands_and_its_probe_tells() -> None:
    eyes, _ = watch(HALF, FULL)
    seconds, probe = eyes.during(lambda: 9.0, patience_s=0, best=FULL)
    assert (seconds, probe) == (9.0, HALF)
    assert probe > SLOWER * eyes.best


def test_the_quietest_rounds_are_kept_in_their_order() -> None:
    assert quietest([HALF, FULL, 1.5, 1.1, FULL], 3) == [1, 3, 4]
    assert quietest([HALF, FULL], 5) == [0, 1]


def test_the_probe_takes_time() -> None:
    assert 0 < quiet.make_probe()() < 10
