"""Medians, quartiles and ratios of samples that were taken in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median, quartiles and least of ``count`` samples."""

    median: float
    q1: float
    q3: float
    least: float
    count: int

    def overlaps(self, other: Summary) -> bool:
        """Whether the interquartile ranges touch: then the difference may be noise."""
        return self.q1 <= other.q3 and other.q1 <= self.q3


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the neighbours in an ascending sequence."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Iterable[float]) -> Summary:
    """Summary of at least one sample.

    Raises:
        ValueError: no samples.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("summarize: needs at least one sample, got none")
    return Summary(
        median=quantile(ordered, 0.5),
        q1=quantile(ordered, 0.25),
        q3=quantile(ordered, 0.75),
        least=ordered[0],
        count=len(ordered),
    )


def paired_ratio(rival: Sequence[float], ours: Sequence[float]) -> Summary:
    """Summary of ``rival[i]/ours[i]``: above 1, ours is faster.

    Sample i of both was taken in the same round: what slowed the machine for that round slowed both, and divides out.

    Raises:
        ValueError: the sequences differ in length: they are not of one run.
    """
    if len(rival) != len(ours):
        raise ValueError(f"paired_ratio: needs samples of the same rounds, got {len(rival)} and {len(ours)}")
    return summarize(a / b for a, b in zip(rival, ours, strict=True))


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive values.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("geomean: needs at least one value, got none")
    return math.exp(sum(math.log(value) for value in values) / len(values))
