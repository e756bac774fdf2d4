"""Rows and verdicts as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.harness.case import Suite, Target
from bench.harness.engines import OURS
from bench.harness.rows import Row
from bench.harness.stats import Summary, paired_ratio, summarize
from bench.harness.verdict import Outcome, is_ours

STYLES = {"stretch": "bold green", "met": "green", "short": "bold red", "no data": "yellow"}


def milliseconds(summary: Summary) -> str:
    """``0.412 (0.408–0.420)``: median and quartiles."""
    return f"{summary.median * 1e3:.3f} ({summary.q1 * 1e3:.3f}–{summary.q3 * 1e3:.3f})"


def times(summary: Summary) -> str:
    """``1.48× (1.46–1.50)``."""
    return f"{summary.median:.2f}× ({summary.q1:.2f}–{summary.q3:.2f})"


def percent(share: float | None) -> str:
    """A share, or a dash."""
    return "–" if share is None else f"{share * 100:.0f} %"


def reference_row(rows: Sequence[Row]) -> Row | None:
    """The row that ratios of a case refer to: our fastest, else a candidate's."""
    ours = [row for row in rows if is_ours(row.engine) and row.samples]
    own = [row for row in ours if not row.engine.startswith("candidate:")] or ours
    return min(own, key=lambda row: summarize(row.samples).median, default=None)


def _sort_key(row: Row) -> tuple[bool, float, str]:
    return (not row.samples, summarize(row.samples).median if row.samples else 0.0, row.engine)


def _speed(row: Row) -> str:
    flops = row.work.get("flops")
    return f"{flops / summarize(row.samples).median / 1e9:.1f}" if flops and row.samples else "–"


def _result(row: Row) -> str:
    if row.samples:
        disturbed = f", {row.disturbed} of {len(row.samples)} disturbed" if row.disturbed else ""
        return milliseconds(summarize(row.samples)) + disturbed
    if row.memory:
        return f"+{row.memory['extra_bytes'] / 2**20:.2f} MiB"
    return f"{row.status}: {row.reason}"


def _speaks_of(outcome: Outcome, row: Row, rows: Sequence[Row]) -> bool:
    """Whether an outcome of this case judges this row: the fastest one of ours, or of the candidate."""
    engines = OURS if outcome.engine == "ours" else (outcome.engine,)
    mine = [r for r in rows if r.engine in engines and r.form == "fused"]
    return bool(mine) and row is min(mine, key=_sort_key)


def case_table(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Table:
    """All rows of one case, fastest first, slow ones like the others."""
    first = rows[0]
    title = f"{first.suite} {first.case}" + (f"  [{first.problem['text']}]" if first.problem else "")
    table = Table(title=Text(title), title_justify="left")
    for name in ("engine", "form", "layout"):
        table.add_column(name)
    table.add_column("ms a call (quartiles)")
    for name in ("÷ ours", "GFLOP/s", "roofline", "error/allowed"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    reference = reference_row(rows)
    for row in sorted(rows, key=_sort_key):
        ratio = "–"
        if reference is not None and row is not reference and len(row.samples) == len(reference.samples):
            ratio = times(paired_ratio(row.samples, reference.samples))
        judged = [o for o in outcomes if o.case == row.case and _speaks_of(o, row, rows)]
        verdict = Text(", ").join(Text(o.verdict, STYLES[o.verdict]) for o in judged)
        result = Text(_result(row), "bold red" if row.status in ("failed", "died") else "")
        worst = f"{row.error['worst']:.2g}" if "worst" in row.error else "–"
        engine = f"{row.engine} [{row.detail}]" if row.detail and is_ours(row.engine) else row.engine
        table.add_row(
            Text(engine), row.form, row.layout, result, ratio, _speed(row), percent(row.roofline_share), worst, verdict
        )
    return table


def outcome_value(outcome: Outcome) -> str:
    """The judged number in the unit of its statistic."""
    if outcome.value is None:
        return "–"
    if outcome.target.statistic == "memory":
        return f"{outcome.value / 2**20:.2f} MiB"
    if outcome.target.statistic == "rate":
        return f"{outcome.value:.0f} GMAC/s"
    return times(outcome.spread) if outcome.spread else f"{outcome.value:.2f}×"


def bars(target: Target) -> tuple[str, str]:
    """Must and stretch of a target in its unit; a dash where there is none."""
    unit = " GMAC/s" if target.statistic == "rate" else "×"
    must, stretch = ("–" if value is None else f"{value:g}{unit}" for value in (target.must, target.stretch))
    return must, stretch


def outcome_table(outcomes: Sequence[Outcome], suite: Suite) -> Table:
    """Every target with what was reached."""
    table = Table(title=Text(f"{suite.name}: {suite.title}"), title_justify="left")
    for name in ("target", "case", "engine"):
        table.add_column(name)
    for name in ("reached", "must", "stretch"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("note")
    for o in outcomes:
        table.add_row(
            o.target.name, o.case or "all", o.engine, outcome_value(o), *bars(o.target),
            Text(o.verdict, STYLES[o.verdict]), Text(o.note),
        )  # fmt: skip
    return table


def suite_view(rows: Sequence[Row], outcomes: Sequence[Outcome], suite: Suite) -> Group:
    """One table a case, then the targets."""
    cases = dict.fromkeys(row.case for row in rows)
    parts = [case_table([row for row in rows if row.case == case], outcomes) for case in cases]
    if outcomes:
        parts.append(outcome_table(outcomes, suite))
    return Group(*parts)


def compare_table(pairs: Sequence[tuple[Row, Row]]) -> Table:
    """Old and new time of each row, and whether the quartiles touch."""
    table = Table(title=Text("old / new: above 1, new is faster"), title_justify="left")
    for name in ("suite", "case", "engine", "form", "layout"):
        table.add_column(name)
    for name in ("old ms", "new ms", "old / new"):
        table.add_column(name, justify="right")
    table.add_column("")
    for old, new in pairs:
        before, after = summarize(old.samples), summarize(new.samples)
        ratio = before.median / after.median
        note = "within the spread" if before.overlaps(after) else ("faster" if ratio > 1 else "slower")
        style = {"faster": "green", "slower": "bold red"}.get(note, "")
        table.add_row(
            new.suite, new.case, new.engine, new.form, new.layout, f"{before.median * 1e3:.3f}",
            f"{after.median * 1e3:.3f}", f"{ratio:.2f}×", Text(note, style),
        )  # fmt: skip
    return table
