"""Two runs side by side: what got faster, what slower, and how much of it was the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.rows import Row
from bench.harness.stats import summarize
from bench.harness.verdict import is_ours


@dataclass(frozen=True)
class Comparison:
    """Rows that both runs have, and what is only in one.

    Attributes:
        pairs: (old, new), both with times.
        lost: keys with a time before and none now, with the reason.
        warnings: differences of device, versions or threads that make the ratios less meaningful.
        drift: median of old/new over other engines: how much the machine itself changed; None without such rows.
    """

    pairs: list[tuple[Row, Row]]
    lost: list[str]
    warnings: list[str]
    drift: float | None


def _warnings(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    found = []
    if not old or not new:
        return ["one of the files has no rows"]
    before, after = old[-1].context, new[-1].context
    for name, get in (
        ("CPU", lambda c: c.get("device", {}).get("cpu")),
        ("instruction sets", lambda c: c.get("device", {}).get("isa")),
        ("threads", lambda c: c.get("threads")),
        ("versions", lambda c: {k: v for k, v in c.get("versions", {}).items() if k != "basisconv_kernels"}),
    ):
        if get(before) != get(after):
            found.append(f"{name} differ: {get(before)} and {get(after)}")
    return found


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Match rows by suite, case, engine, form, layout and threads."""
    by_key = {row.key: row for row in new}
    pairs: list[tuple[Row, Row]] = []
    lost: list[str] = []
    for row in old:
        now = by_key.get(row.key)
        if not row.samples:
            continue
        if now is not None and now.samples:
            pairs.append((row, now))
        elif now is not None:
            lost.append(f"{row.suite} {row.case} {row.engine} {row.form}: {now.status}: {now.reason}")
        else:
            lost.append(f"{row.suite} {row.case} {row.engine} {row.form}: not in the new run")
    others = [speedup(pair) for pair in pairs if not is_ours(pair[0].engine)]
    return Comparison(pairs, lost, _warnings(old, new), summarize(others).median if others else None)


def speedup(pair: tuple[Row, Row]) -> float:
    """Old median over new median."""
    return summarize(pair[0].samples).median / summarize(pair[1].samples).median
