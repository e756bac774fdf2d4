"""Rows of ``make gpu-bench`` as a table: microseconds, how many times faster than each baseline, and where we lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from bench.gpu.journal import PASSED, WRONG, Journal

BASELINES = ("two_step", "dense", "two_step_compiled", "dense_compiled")
WAYS = ("graph_cold", "graph_warm", "eager")


def subject(data: Mapping[str, Any]) -> str:
    """What a row is about, without its engine."""
    if "network" in data:
        return f"{data['network']}_n{data['batch']}"
    return str(data["layer"]) + (" frozen" if data.get("frozen") else " trained" if "frozen" in data else "")


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown, one line an engine of ours and a way of timing."""
    by_subject: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        data = row.get("data") or {}
        if row["status"] == PASSED and "engine" in data:
            by_subject[subject(data)][data["engine"]] = data
    lines = ["| what | engine | way | µs (quartiles) | × two_step | × dense |", "|---|---|---|---|---|---|"]
    losses = []
    for name, engines in by_subject.items():
        for engine, data in engines.items():
            for way in WAYS:
                if way not in data:
                    continue
                times = data[way]
                ratios = []
                for rival in BASELINES[:2]:
                    other = engines.get(rival, {}).get(way)
                    ratios.append(f"{other['median'] / times['median']:.2f}" if other and engine != rival else "")
                    if other and engine not in BASELINES and way == WAYS[0] and other["q3"] < times["q1"]:
                        losses.append(
                            f"- {name} {engine}: {times['median'] / other['median']:.2f}× the time of {rival}"
                        )
                spread = f"{times['median']:.2f} ({times['q1']:.2f}–{times['q3']:.2f})"
                lines.append(f"| {name} | {engine} | {way} | {spread} | {ratios[0]} | {ratios[1]} |")
    slower = ["", "Slower than a baseline, in a graph with a cold cache:", *(losses or ["- none that was measured"])]
    return "\n".join([*lines, *slower]) + "\n"


def summary(journal: Journal) -> tuple[str, bool]:
    """The table of the newest rows, what failed, and whether anything did or nothing was measured."""
    last = list(journal.last().values())
    wrong = [
        f"{row['status'].upper()} {row['key']}: {str(row.get('note'))[:300]}" for row in last if row["status"] in WRONG
    ]
    skipped = [f"skipped {row['key']}: {row.get('note')}" for row in last if row["status"] == "skipped"]
    measured = any(row["status"] == PASSED and row.get("data", {}).get("engine") for row in last)
    return "\n".join([table(last), *wrong, *skipped]) + "\n", bool(wrong) or not measured
