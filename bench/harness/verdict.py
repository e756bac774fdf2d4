"""Rows against targets: paired ratios, the predicted speed-up of a network, and whether a bar is met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.harness.case import Suite, Target
from bench.harness.engines import OURS
from bench.harness.rows import Row
from bench.harness.stats import Summary, geomean, paired_ratio, summarize

Verdict = Literal["stretch", "met", "short", "no data"]

SCRATCH_BYTES_A_THREAD = 2**20


@dataclass(frozen=True)
class Outcome:
    """How one target came out for one case, or (``case`` empty) for all its cases together.

    Attributes:
        target: the target.
        case: id, or empty.
        engine: ours, or the candidate.
        value: what was compared with the bar; None without data.
        spread: quartiles of the paired ratio, where it is one.
        verdict: ``stretch`` and ``met``: reached; ``short``: not; ``no data``: something is missing.
        note: the rival, and what was missing.
    """

    target: Target
    case: str
    engine: str
    value: float | None
    spread: Summary | None
    verdict: Verdict
    note: str


def judge(value: float | None, target: Target) -> Verdict:
    """Compare a value with the bars of a target."""
    if value is None:
        return "no data"
    if target.stretch is not None and value >= target.stretch:
        return "stretch"
    return "short" if target.must is not None and value < target.must else "met"


def timed(rows: Iterable[Row], case: str, engines: Sequence[str], form: str) -> list[Row]:
    """Rows with a time, of these engines and this form, fastest first."""
    found = [row for row in rows if row.case == case and row.engine in engines and row.form == form and row.samples]
    return sorted(found, key=lambda row: summarize(row.samples).median)


def is_ours(engine: str) -> bool:
    """Whether a row is judged rather than a rival: our engines and users' kernels."""
    return engine in OURS or engine.startswith("candidate:")


def subjects(rows: Iterable[Row]) -> list[tuple[str, tuple[str, ...]]]:
    """Who is judged: ours (its engines count as one, the faster is taken), and each candidate."""
    engines = {row.engine: None for row in rows if is_ours(row.engine)}
    found: list[tuple[str, tuple[str, ...]]] = []
    if any(engine in OURS for engine in engines):
        found.append(("ours", OURS))
    return found + [(engine, (engine,)) for engine in engines if engine not in OURS]


def ratio(rows: Sequence[Row], case: str, engines: Sequence[str], target: Target) -> tuple[Summary | None, str]:
    """The best rival's time over ours, paired by round, and a note; None where one of the two has no time."""
    ours = timed(rows, case, engines, "fused")
    rivals = timed(rows, case, target.rivals, target.against)
    present = {row.engine for row in rivals}
    absent = [name for name in target.rivals if name not in present]
    lacking = f"; without {', '.join(absent)}" if absent else ""
    if not ours:
        return None, "no time of our own"
    if not rivals:
        return None, f"no rival has a time{lacking}"
    if len(rivals[0].samples) != len(ours[0].samples):
        return None, "samples are not of one run"
    return paired_ratio(rivals[0].samples, ours[0].samples), f"{rivals[0].engine} {rivals[0].layout}{lacking}"


def rate(rows: Sequence[Row], case: str, engines: Sequence[str]) -> tuple[float | None, str]:
    """10⁹ multiply-accumulates a second of the work that a case stands for, and who did it."""
    ours = timed(rows, case, engines, "fused")
    if not ours or "flops" not in ours[0].work:
        return None, "no time of our own"
    return ours[0].work["flops"] / 2 / summarize(ours[0].samples).median / 1e9, ours[0].detail


def _selected(rows: Sequence[Row], suite: Suite, target: Target) -> list[str]:
    """Cases of the target that the rows speak about."""
    measured = {row.case for row in rows}
    return [case.id for case in suite.cases if (not target.tag or target.tag in case.tags) and case.id in measured]


def share_of_predicted(rows: Sequence[Row], case: str, target: Target) -> tuple[float | None, str]:
    """Measured speed-up of a network over the one that its layers predict.

    ::

        E         = the engine whose whole dense network is fastest
        measured  = time of E's dense network / time of ours
        predicted = Σ E's dense layers / (Σ our fused layers + Σ E's dense layers that stay dense)

    Sums are over convolutions and linear layers, each as often as it occurs; what stands between them is in the
    measured times only.
    """
    dense = timed(rows, case, target.rivals, "dense")
    ours = timed(rows, case, OURS, "fused")
    if not dense or not ours:
        return None, "needs a time of our network and of a dense one"
    best = dense[0].engine
    before = after = 0.0
    for part, count, converted in ours[0].parts:
        old = timed(rows, part, (best,), "dense")
        new = timed(rows, part, OURS, "fused") if converted else old
        if not old or not new:
            return None, f"layer {part} has no time"
        before += count * summarize(old[0].samples).median
        after += count * summarize(new[0].samples).median
    predicted = before / after
    measured = paired_ratio(dense[0].samples, ours[0].samples).median
    note = f"{measured:.2f}× measured, {predicted:.2f}× predicted, against {best} ({ours[0].engine})"
    return measured / predicted, note


def _memory(rows: Sequence[Row], case: str, engines: Sequence[str]) -> tuple[Verdict, float | None, str]:
    """Met: the extra memory could hold neither Z nor an im2col buffer. Stretch: at most 1 MiB a thread."""
    found = [r for r in rows if r.case == case and r.engine in engines and r.form == "fused" and r.memory]
    if not found:
        return "no data", None, "not measured"
    memory = found[0].memory
    extra = memory["extra_bytes"]
    note = f"{extra / 2**20:.2f} MiB; Z is {memory['maps_bytes'] / 2**20:.1f} MiB"
    if extra <= SCRATCH_BYTES_A_THREAD * found[0].context.get("threads", 1):
        return "stretch", extra, note
    return ("met" if extra < min(memory["maps_bytes"], memory["im2col_bytes"]) else "short"), extra, note


def outcomes(rows: Sequence[Row], suite: Suite) -> list[Outcome]:
    """Every target of a suite on the rows of one run of it."""
    rows = [row for row in rows if row.suite == suite.name]
    found: list[Outcome] = []
    for name, engines in subjects(rows):
        for target in suite.targets:
            found += _outcomes(rows, suite, target, name, engines)
    return found


def _outcomes(rows: Sequence[Row], suite: Suite, target: Target, name: str, engines: Sequence[str]) -> list[Outcome]:
    cases = _selected(rows, suite, target)
    if target.statistic == "memory":
        made = [(case, *_memory(rows, case, engines)) for case in cases]
        return [Outcome(target, case, name, value, None, verdict, note) for case, verdict, value, note in made]
    if target.statistic == "rate":
        rates = [(case, *rate(rows, case, engines)) for case in cases]
        return [Outcome(target, case, name, value, None, judge(value, target), note) for case, value, note in rates]
    if target.statistic == "share_of_predicted":
        if name != "ours":
            return []
        shares = [(case, *share_of_predicted(rows, case, target)) for case in cases]
        return [Outcome(target, case, name, value, None, judge(value, target), note) for case, value, note in shares]
    ratios = [(case, *ratio(rows, case, engines, target)) for case in cases]
    if target.statistic == "each":
        return [
            Outcome(target, case, name, s.median if s else None, s, judge(s.median if s else None, target), note)
            for case, s, note in ratios
        ]
    if not cases:
        return []
    lacking = [case for case, s, _ in ratios if s is None]
    wanted = sum(not target.tag or target.tag in case.tags for case in suite.cases)
    note = f"{len(cases) - len(lacking)} of {wanted} cases"
    if lacking:
        return [Outcome(target, "", name, None, None, "no data", f"{note}; no ratio for {', '.join(lacking)}")]
    mean = geomean([s.median for _, s, _ in ratios if s is not None])
    missing = sorted({note.partition("; ")[2] for _, _, note in ratios} - {""})
    return [Outcome(target, "", name, mean, None, judge(mean, target), "; ".join([note, *missing]))]
