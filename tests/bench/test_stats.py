"""Medians, quartiles, paired ratios."""

from __future__ import annotations

import statistics

import pytest

from bench.harness.stats import geomean, paired_ratio, summarize


def test_summary_agrees_with_the_standard_library() -> None:
    samples = [5.0, 1.0, 4.0, 2.5, 9.0, 3.0]
    found = summarize(samples)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    assert (found.q1, found.median, found.q3, found.least, found.count) == (q1, median, q3, 1.0, 6)


def test_one_sample_is_its_own_summary() -> None:
    found = summarize([2.0])
    assert (found.q1, found.median, found.q3) == (2.0, 2.0, 2.0)


def test_drift_that_hits_a_whole_round_divides_out() -> None:
    drift = [1.0, 3.0, 0.5, 2.0]
    found = paired_ratio([2.0 * d for d in drift], [1.0 * d for d in drift])
    assert (found.q1, found.median, found.q3) == (2.0, 2.0, 2.0)


def test_samples_of_different_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="same rounds, got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one sample"):
        summarize([])
    with pytest.raises(ValueError, match="at least one value"):
        geomean([])


def test_geomean() -> None:
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)


def test_overlap_of_quartiles() -> None:
    assert summarize([1.0, 2.0, 3.0]).overlaps(summarize([2.0, 3.0, 4.0]))
    assert not summarize([1.0, 2.0, 3.0]).overlaps(summarize([5.0, 6.0, 7.0]))
