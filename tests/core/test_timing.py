"""Samples taken in turn, and what is said of them."""

from __future__ import annotations

import itertools

import pytest

from basisconv_kernels.core import timing
from basisconv_kernels.core.timing import Series, Spread, interleave, speed_up


def test_spread_interpolates_quartiles():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0])
    assert (spread.median, spread.q1, spread.q3, spread.least, spread.samples) == (2.5, 1.75, 3.25, 1.0, 4)


def test_interleave_takes_turns():
    calls = {"a": 0, "b": 0}
    order = []

    def call_of(name):
        def call():
            calls[name] += 1
            order.append(name)

        return call

    taken = interleave({name: call_of(name) for name in calls}, 0.0, least_rounds=4)
    assert [len(series.values) for series in taken.values()] == [len(taken["a"].values)] * 2
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns[-8:] == ["a", "b"] * 4


def test_interrupted_samples_are_left_out_where_enough_remain():
    calm = [True] * timing.LEAST_CALM + [False] * 5
    series = Series([1.0] * timing.LEAST_CALM + [9.0] * 5, calm)
    assert series.spread().q3 == 1.0
    few = Series([1.0] * 3 + [9.0] * 5, [True] * 3 + [False] * 5)
    assert few.spread().median == 9.0
    assert speed_up(series, Series([0.5] * len(calm), [True] * len(calm))).median == 2.0
    assert timing.disturbed([series]) == pytest.approx(5 / (timing.LEAST_CALM + 5))
