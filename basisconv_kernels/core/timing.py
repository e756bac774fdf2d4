"""Times of functions taken in turn, so that a busy machine slows all of them alike, and the spread of such samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # only Unix counts what the filter below asks for
    resource = None  # type: ignore[assignment]

WARM_UPS = 3
LEAST_ROUNDS = 7
LEAST_CALM = 9  # samples without interruption that are enough to leave the others out
PATIENCE = 1.6  # times the seconds given, to wait for them
LEAST_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample, so that the clock and a cold cache hide less


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and least of samples."""

    median: float
    q1: float
    q3: float
    least: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        ordered = sorted(samples)
        q1, median, q3 = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        return cls(median, q1, q3, ordered[0], len(ordered))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, rounded to six digits."""
        return {name: value if isinstance(value, int) else _digits(value) for name, value in asdict(self).items()}


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


class Series(NamedTuple):
    """Times of one function, sample by sample; ``calm`` says where no core was taken away meanwhile."""

    values: list[float]
    calm: list[bool]

    def scaled(self, factor: float) -> Series:
        """Every value times a factor."""
        return Series([value * factor for value in self.values], self.calm)

    def spread(self) -> Spread:
        """Of the calm samples where there are enough of them, else of all."""
        calm = [value for value, quiet in zip(self.values, self.calm, strict=True) if quiet]
        return Spread.of(calm if len(calm) >= LEAST_CALM else self.values)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least_rounds: int = LEAST_ROUNDS,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Series]:
    """Seconds a call of each function, sample by sample, A B C A B C …: sample i of all is of the same round.

    A sample of a short call is the mean of several calls in a row. What slows the machine for a while slows all of
    them in those rounds, so ratios within a round hold where single times do not. A sample is calm if the operating
    system took no core away from this process meanwhile; on a busy machine measuring goes on for some time to get them.

    Args:
        calls: by name.
        seconds: to spend on all of them together; ``least_rounds`` are done in any case.
        progress: called after each round with the share done, 0..1.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(WARM_UPS):
            call()
        repeats[name] = max(1, math.ceil(LEAST_SAMPLE / max(min(_timed(call, 1)[0] for _ in range(3)), 1e-7)))
    taken = {name: Series([], []) for name in calls}
    start, rounds = time.perf_counter(), 0
    while True:
        spent = time.perf_counter() - start
        calm_enough = spent > PATIENCE * seconds or all(sum(s.calm) >= LEAST_CALM for s in taken.values())
        if spent >= seconds and rounds >= least_rounds and calm_enough:
            return taken
        if progress is not None:
            progress(min(spent / seconds, rounds / least_rounds, 1.0))
        for name, call in calls.items():
            value, calm = _timed(call, repeats[name])
            taken[name].values.append(value)
            taken[name].calm.append(calm)
        rounds += 1


def _timed(call: Callable[[], object], repeats: int) -> tuple[float, bool]:
    switches, start = _switches(), time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats, _switches() == switches


def _switches() -> int:
    """How often a thread of this process had to leave its core for another process; 0 where nobody counts that."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def speed_up(base: Series, other: Series) -> Spread:
    """How many times faster ``other`` is than ``base``: the spread of the ratios within the rounds."""
    pairs = list(zip(base.values, other.values, base.calm, other.calm, strict=True))
    calm = [slow / fast for slow, fast, first, second in pairs if first and second]
    return Spread.of(calm if len(calm) >= LEAST_CALM else [slow / fast for slow, fast, _, _ in pairs])


def disturbed(series: Iterable[Series]) -> float:
    """Share of samples that were not calm."""
    flags = [calm for one in series for calm in one.calm]
    return 1 - sum(flags) / len(flags) if flags else 0.0
