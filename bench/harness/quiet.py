"""Whether a core had its full speed while something was timed.

On a shared machine the sibling thread of a core may belong to a stranger: while he computes, everything here takes up
to twice as long, and no counter of this system shows it. Engines do not suffer alike (who waits for memory loses less
than who keeps the core busy), so that pairing samples does not divide it out. A *probe* tells: a small matrix product
and a short loop of fixed size, the same code in every worker, right before and right after each sample. A sample is
*disturbed* if a probe took longer than ``SLOWER`` times the fastest probe of the run; samples are judged by their
probes alone, never by their times, and by the same rule for every engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

SLOWER = 1.12
SIDE = 160  # of the product: a tenth of a millisecond that keeps the multipliers busy and stays in the caches
STEPS = 6000  # of the loop: about as long, busy in all the rest of the core
PAUSE_S = 0.002
FIRST_LOOKS = 100


def make_probe() -> Callable[[], float]:
    """A function that does the fixed work once and returns its seconds."""
    square = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    result = np.empty_like(square)
    clock = time.perf_counter

    def probe() -> float:
        np.matmul(square, square, out=result)  # brings its operands back into the caches: what was timed emptied them
        start = clock()
        np.matmul(square, square, out=result)
        sum(range(STEPS))
        return clock() - start

    return probe


@dataclass
class Watch:
    """The probes of one process.

    Attributes:
        probe: returns the seconds that fixed work takes now.
        best: the fastest so far, of this process or as told from outside.
    """

    probe: Callable[[], float] = field(default_factory=make_probe)
    best: float = float("inf")

    def look(self) -> float:
        """Probe once."""
        taken = self.probe()
        self.best = min(self.best, taken)
        return taken

    def during(
        self, measure: Callable[[], float], patience_s: float, best: float = float("inf")
    ) -> tuple[float, float]:
        """Take a sample between two fast probes, waiting and trying again while the core is slow.

        Args:
            measure: takes the sample.
            patience_s: give up waiting after so long, and return what came last.
            best: the fastest probe that others have seen, seconds.

        Returns:
            tuple: (what ``measure`` returned, seconds of the slower of the probes around it).
        """
        if self.best == float("inf"):
            for _ in range(FIRST_LOOKS):
                self.look()
        self.best = min(self.best, best)
        give_up = time.perf_counter() + patience_s
        while True:
            before = self.look()
            late = time.perf_counter() >= give_up
            if before > SLOWER * self.best and not late:
                time.sleep(PAUSE_S)
                continue
            taken = measure()
            slower = max(before, self.look())
            if slower <= SLOWER * self.best or late or time.perf_counter() >= give_up:
                return taken, slower


def quietest(rounds: list[float], count: int) -> list[int]:
    """Which ``count`` rounds to keep, in order: those whose slowest probe was fastest.

    Args:
        rounds: seconds of the slowest probe in each round.
        count: how many to keep, at most.
    """
    return sorted(sorted(range(len(rounds)), key=lambda number: rounds[number])[:count])
