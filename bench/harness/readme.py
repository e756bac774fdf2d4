"""The README's table of results: one line a suite, out of the rows under ``bench/results``, slow cases included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness.case import Suite
from bench.harness.engines import BASELINES, OURS
from bench.harness.report import table
from bench.harness.rows import Row
from bench.harness.stats import geomean, paired_ratio
from bench.harness.verdict import Outcome, outcomes, ratio, timed

BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
HEAD = ("suite", "cases", "× two-step, mean (least … most)", "× dense, mean (least … most)", "bars")


def _spread(values: dict[str, float]) -> str:
    """``1.42× (0.98 … 1.71)``; the slowest case by name where it loses."""
    if not values:
        return "–"
    slowest = min(values, key=lambda case: values[case])
    name = f" {slowest}" if values[slowest] < 1 else ""
    ends = f"{values[slowest]:.2f}{name} … {max(values.values()):.2f}"
    return f"{geomean(list(values.values())):.2f}× ({ends})" if len(values) > 1 else f"{values[slowest]:.2f}×{name}"


def _over_two_step(rows: Sequence[Row], suite: Suite, cases: Sequence[str]) -> dict[str, float]:
    """The best rival's two-step over ours, by case; rivals are those of the suite's first target."""
    target = suite.targets[0]
    if target.against != "two_step" or not target.rivals:
        return {}
    found = {case: ratio(rows, case, OURS, target)[0] for case in cases}
    return {case: summary.median for case, summary in found.items() if summary is not None}


def _over_dense(rows: Sequence[Row], cases: Sequence[str]) -> dict[str, float]:
    """The best engine's dense form over ours, by case."""
    found = {}
    for case in cases:
        ours, dense = timed(rows, case, OURS, "fused"), timed(rows, case, BASELINES, "dense")
        if ours and dense and len(ours[0].samples) == len(dense[0].samples):
            found[case] = paired_ratio(dense[0].samples, ours[0].samples).median
    return found


def _bars(found: Sequence[Outcome]) -> str:
    """How many bars were reached, and by name those that were not."""
    judged = [o for o in found if o.target.must is not None or o.target.statistic == "memory"]
    short = [o for o in judged if o.verdict not in ("met", "stretch")]
    names = ", ".join(dict.fromkeys(f"{o.case or 'mean'}: {o.verdict}" for o in short))
    return f"{len(judged) - len(short)} of {len(judged)}" + (f" ({names})" if short else "")


def _line(rows: Sequence[Row], suite: Suite) -> list[str]:
    judged = [o for o in outcomes(rows, suite) if o.engine == "ours"]
    measured = {row.case for row in rows if row.engine in OURS and row.kind not in ("linear",)}
    networks = {case.id for case in suite.cases if case.kind == "network"}
    cases = [case.id for case in suite.cases if case.id in measured and (not networks or case.id in networks)]
    if any(row.memory for row in rows):
        most = max(row.memory["extra_bytes"] for row in rows if row.memory and row.engine in OURS)
        middle = [f"at most {most / 2**20:.2f} MiB beyond the result", ""]
    else:
        middle = [_spread(_over_two_step(rows, suite, cases)), _spread(_over_dense(rows, cases))]
    return [f"{suite.name}: {suite.title}", str(len(cases)), *middle, _bars(judged)]


def _about(context: dict[str, Any]) -> str:
    device, git, versions = context.get("device", {}), context.get("git", {}), context.get("versions", {})
    engines = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino") if versions.get(name)]
    family = device.get("family")
    threads, in_use = context.get("threads", 1), context.get("native", {}).get("cpu", {}).get("in_use")
    parts = [
        f"**{device.get('cpu')}**" + (f", family {family}" if family else "") + (f", {in_use}" if in_use else ""),
        f"{threads} thread{'s' if threads > 1 else ''}",
        *engines,
        f"commit {str(git.get('commit'))[:7]}" + (" with local changes" if git.get("dirty") else ""),
    ]
    return ", ".join(parts)


def block(rows: Sequence[Row], suites: dict[str, Suite]) -> str:
    """What stands between the marks of the README: a table a processor; one name may stand for several of them."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row.suite in suites and suites[row.suite].targets:
            device = row.context["device"]
            key = (device.get("cpu", ""), device.get("family", ""), row.context.get("threads", 1))
            groups.setdefault(key, []).append(row)
    parts = []
    for here in groups.values():
        measured = [suite for suite in suites.values() if any(row.suite == suite.name for row in here)]
        lines = [_line([row for row in here if row.suite == suite.name], suite) for suite in measured]
        parts.append(f"{_about(here[-1].context)}\n\n{table(HEAD, lines)}")
    return "\n\n".join(parts) + "\n" if parts else "No rows are committed for this version yet.\n"


def split(text: str) -> tuple[str, str, str]:
    """The README before, between and behind the marks.

    Raises:
        ValueError: it has not exactly one of each, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    between, end, behind = rest.partition(END)
    if not begin or not end or BEGIN in behind or END in behind:
        raise ValueError(f"the document needs the marks {BEGIN.strip()} and {END.strip()}, once each")
    return before + BEGIN, between, END + behind


def updated(text: str, rows: Sequence[Row], suites: dict[str, Suite]) -> str:
    """The README with its table made anew."""
    before, _, behind = split(text)
    return f"{before}\n{block(rows, suites)}\n{behind}"
