"""Rows as SVG plots: how many times longer than ours each engine takes, with the spread over the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness.rows import Row
from bench.harness.stats import Summary, paired_ratio, summarize
from bench.harness.tables import reference_row
from bench.harness.verdict import is_ours

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
MARKERS = "os^Dv<>"


def _ratios(rows: Sequence[Row], form: str) -> dict[str, list[tuple[int, Summary]]]:
    """By engine: (number of the case, ratio to ours) of its best layout."""
    found: dict[str, list[tuple[int, Summary]]] = {}
    for number, case in enumerate(dict.fromkeys(row.case for row in rows)):
        here = [row for row in rows if row.case == case and row.samples]
        reference = reference_row(here)
        if reference is None:
            continue
        for engine in dict.fromkeys(row.engine for row in here if not is_ours(row.engine)):
            mine = [row for row in here if row.engine == engine and row.form == form]
            mine = [row for row in mine if len(row.samples) == len(reference.samples)]
            if mine:
                best = min(mine, key=lambda row: summarize(row.samples).median)
                found.setdefault(engine, []).append((number, paired_ratio(best.samples, reference.samples)))
    return found


def draw(rows: Sequence[Row], name: str, folder: Path) -> list[Path]:
    """One SVG a form that has ratios; needs matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "basisconv"  # the same rows give the same file
    mpl.rcParams["svg.fonttype"] = "none"
    judged = dict.fromkeys(row.case for row in rows if row.samples and is_ours(row.engine))
    rows = [row for row in rows if row.case in judged]
    cases = list(dict.fromkeys(row.case for row in rows))
    written = []
    for form in ("two_step", "dense"):
        ratios = _ratios(rows, form)
        if not ratios:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.4 * len(cases)), layout="constrained")
        for number, (engine, points) in enumerate(ratios.items()):
            shift = (number - (len(ratios) - 1) / 2) * 0.7 / max(1, len(ratios))
            medians = [summary.median for _, summary in points]
            spread = [[s.median - s.q1 for _, s in points], [s.q3 - s.median for _, s in points]]
            axes.errorbar(
                medians, [case + shift for case, _ in points], xerr=spread, label=engine, linestyle="none",
                marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], capsize=2, markersize=5,
            )  # fmt: skip
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("time of the engine ÷ time of ours\nright of the line ours is faster; bars are quartiles")
        axes.set_title(f"{name}: {form.replace('_', '-')} in each engine against the fused call", loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path = folder / f"{name.lower().replace(' ', '-')}-{form}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written
