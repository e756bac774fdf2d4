"""Rows as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.case import Suite
from bench.harness.engines import BASELINES
from bench.harness.rows import Row
from bench.harness.stats import paired_ratio, summarize
from bench.harness.tables import bars, outcome_value, percent, reference_row, times
from bench.harness.verdict import Outcome, is_ours, outcomes


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""

    def clean(cell: str) -> str:
        return cell.replace("|", "\\|").replace("\n", " ")

    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(map(clean, line)) + " |" for line in (head, rule, *lines))


def _about(context: dict[str, Any]) -> str:
    device, git = context.get("device", {}), context.get("git", {})
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in context.get("versions", {}).items())
    dirty = " with local changes" if git.get("dirty") else ""
    native = context.get("native", {})
    lines = [
        f"- CPU: {device.get('cpu')} ({device.get('family')}), {device.get('cores')} cores, "
        f"{' '.join(device.get('isa', []))}",
        f"- Threads a call: {context.get('threads')}; load average at the start {context.get('load_average')}",
        f"- Versions: {versions}",
        f"- Commit: {git.get('commit') or 'none'}{dirty}",
        f"- Native library: {native.get('absent') or native}",
        f"- Environment: {' '.join(f'{k}={v}' for k, v in context.get('environment', {}).items())}",
    ]
    peaks = context.get("peaks", {})
    if peaks:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks["flops_per_s"].items())
        lines.append(f"- Measured ceilings: {rates}; copy {peaks['bytes_per_s'] / 1e9:.1f} GB/s")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], reference: Row | None) -> str:
    """Best layout of one engine and form: milliseconds and how many times ours it takes."""
    best = min((row for row in rows if row.samples), key=lambda row: summarize(row.samples).median, default=None)
    if best is None:
        return rows[0].status if rows else "–"
    cell = f"{summarize(best.samples).median * 1e3:.3f}"
    if reference is not None and best is not reference and len(best.samples) == len(reference.samples):
        cell += f" ({paired_ratio(best.samples, reference.samples).median:.2f}×)"
    return cell


def _times_table(rows: Sequence[Row]) -> str:
    """A line a case: ours, then every engine's two-step and dense."""
    engines = [name for name in dict.fromkeys(row.engine for row in rows) if not is_ours(name)]
    own = [name for name in dict.fromkeys(row.engine for row in rows) if is_ours(name)]
    forms = [form for form in ("two_step", "dense") if any(row.form == form for row in rows)]
    head = ["case", *own, "roofline", *(f"{name} {form.replace('_', '-')}" for form in forms for name in engines)]
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        reference = reference_row(here)
        line = [case]
        line += [_cell([r for r in here if r.engine == name and r.form in ("fused", "")], reference) for name in own]
        line.append(percent(reference.roofline_share) if reference is not None else "–")
        line += [
            _cell([r for r in here if r.engine == name and r.form in (form, "")], reference)
            for form in forms
            for name in engines
        ]
        lines.append(line)
    return table(head, lines)


def _memory_table(rows: Sequence[Row]) -> str:
    def mib(number: float) -> str:
        return f"{number / 2**20:.2f}"

    head = ["case", "engine", "form", "layout", "extra MiB", "result MiB", "Z MiB", "im2col MiB"]
    lines = []
    for row in rows:
        m = row.memory
        sizes = [mib(m[f"{name}_bytes"]) for name in ("extra", "output", "maps", "im2col")] if m else [row.status] * 4
        lines.append([row.case, row.engine, row.form, row.layout, *sizes])
    return table(head, lines)


def _outcomes_table(found: Sequence[Outcome]) -> str:
    head = ["target", "case", "engine", "reached", "must", "stretch", "verdict", "note"]
    lines = [
        [o.target.name, o.case or "all", o.engine, outcome_value(o), *bars(o.target),
         f"**{o.verdict}**" if o.verdict == "short" else o.verdict, o.note]
        for o in found
    ]  # fmt: skip
    return table(head, lines)


def _against_dense(rows: Sequence[Row]) -> str:
    """Our speed-up over the fastest dense form of all engines, a line a case; empty where there is none."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        reference = reference_row(here)
        dense = [r for r in here if r.form == "dense" and r.engine in BASELINES and r.samples]
        if reference is None or not dense:
            continue
        best = min(dense, key=lambda row: summarize(row.samples).median)
        theory = best.work["flops"] / reference.work["flops"] if best.work and reference.work else None
        ratio = times(paired_ratio(best.samples, reference.samples))
        lines.append([case, f"{best.engine} {best.layout}", ratio, f"{theory:.2f}×" if theory else "–"])
    return table(["case", "fastest dense", "its time ÷ ours", "ratio of operations"], lines) if lines else ""


def _details(rows: Sequence[Row]) -> str:
    """Which of our backends ran."""
    found = dict.fromkeys((row.engine, row.detail) for row in rows if row.detail and is_ours(row.engine))
    return "; ".join(f"{engine}: {detail}" for engine, detail in found)


def _trouble(rows: Sequence[Row]) -> str:
    """What has no time, and why."""
    reasons = {(r.engine, r.status, r.reason): r for r in rows if r.status != "ok"}
    return "\n".join(f"- {engine}: {status}: {reason}" for engine, status, reason in reasons)


def _suite(rows: Sequence[Row], suite: Suite | None, name: str) -> str:
    parts = [f"## {name}" + (f": {suite.title}" if suite else "")]
    if any(row.memory for row in rows):
        parts.append(_memory_table(rows))
    else:
        parts.append("Milliseconds a call, best layout, median over the rounds; in brackets how many times ours.")
        parts.append(_times_table(rows))
        dense = _against_dense(rows)
        parts += [dense] if dense else []
    details = _details(rows)
    parts += [details] if details else []
    found = outcomes(rows, suite) if suite else []
    parts += [_outcomes_table(found)] if found else []
    trouble = _trouble(rows)
    parts += [f"Without a time:\n\n{trouble}"] if trouble else []
    return "\n\n".join(parts)


def markdown(rows: Sequence[Row], suites: dict[str, Suite], plots: Sequence[Path] = ()) -> str:
    """The report of some rows of one device; one section a suite and number of threads."""
    parts = ["# Benchmarks"]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.context.get("threads", 1)), []).append(row)
    last = None
    for (name, threads), here in groups.items():
        about = _about(here[-1].context)
        if about != last:
            parts.append(about)
            last = about
        parts.append(_suite(here, suites.get(name), f"{name}, {threads} thread{'s' if threads > 1 else ''}"))
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    return "\n\n".join(parts) + "\n"
