"""The results page of the docs, made of the recorded rows: tables, and plots beside it."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.experiments.experiment import Experiment
from bench.experiments.long import LONG
from bench.experiments.table import BY_NAME, TABLE
from bench.harness.paths import ROOT

RESULTS = Path(__file__).parent / "results"
ROWS, LATENCY = RESULTS / "cifar10.jsonl", RESULTS / "latency.jsonl"
PAGE, PLOTS = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
START, END = "<!-- rows -->", "<!-- end of rows -->"
MARKERS = "os^Dv<>Pp*Xhd"

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Summary:
    """One experiment over its seeds.

    Attributes:
        accuracy: mean of the test accuracies; ``spread``: largest less smallest.
        macs, parameters, learnable, bytes: how many times fewer than in the dense network.
        ms: {batch: (dense, this)} where a network of it was timed.
    """

    def __init__(self, experiment: Experiment, rows: Sequence[Row], latency: Sequence[Row]) -> None:
        self.experiment, self.rows = experiment, rows
        found = [row["test_accuracy"] for row in rows]
        self.accuracy, self.spread = statistics.mean(found), max(found) - min(found)
        self.start = statistics.mean(row["start_test_accuracy"] for row in rows)
        first = rows[0]
        self.macs, self.parameters, self.learnable, self.bytes = (
            first[key][0] / max(1, first[key][1]) for key in ("macs", "parameters", "learnable", "file_bytes")
        )
        self.file_bytes = first["file_bytes"][1]
        self.mac_count = first["macs"][1]
        self.ms = {
            row["batch"]: (row["ms"]["dense"], row["ms"][experiment.name])
            for row in latency
            if row["network"] == experiment.network and experiment.name in row["ms"]
        }

    @property
    def trained_on(self) -> str:
        """The devices that trained it; the GPU alone where one did."""
        found = {row["device"].get("accelerator") or row["device"]["cpu"] for row in self.rows}
        return ", ".join(sorted(found))

    @property
    def multiplies(self) -> bool:
        """Whether its MACs are multiplications; those of ±1 and ternary weights are additions or bits."""
        words = " ".join(stage["config"] for stage in self.rows[0].get("stages", ()))
        constrained = self.rows[0].get("layers_16_times_smaller", [0])[0]
        return not constrained and "binary_layer_bytes" not in self.rows[0] and "splits" not in words


def summaries(rows: Sequence[Row], latency: Sequence[Row]) -> list[Summary]:
    """Of all experiments that have rows, shortened ones left out, in the order of the table."""
    found = []
    for experiment in TABLE:
        own = [row for row in rows if row["experiment"] == experiment.name and not row["shortened"]]
        if own:
            found.append(Summary(experiment, sorted(own, key=lambda row: int(row["seed"])), latency))
    return found


def text(rows: Sequence[Row], latency: Sequence[Row]) -> str:
    """The generated part of the page."""
    known = summaries(rows, latency)
    by_name = {summary.experiment.name: summary for summary in known}
    lines = [
        "| experiment | seeds | accuracy, % | spread | against | trained on | MACs ÷ | parameters ÷ | learnable ÷ "
        "| file ÷ | ms at batch 1 | at 16 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(summary, by_name) for summary in known]
    lines += ["", "![accuracy against MACs](results/macs.svg) ![against bytes](results/bytes.svg)"]
    lines += ["![against time](results/time.svg)"] if latency else []
    lines += ["", "### What was asked", ""]
    lines += [f"- **{s.experiment.name}**: {s.experiment.question}. {_recipe(s)}" for s in known]
    lines += ["", "### Curves", "", "Validation accuracy after each epoch, of each seed; the best epoch is kept.", ""]
    lines += [curve for summary in known for curve in _curves(summary)]
    missing = [line for experiment in TABLE if (line := _missing(experiment, by_name.get(experiment.name)))]
    if missing:
        lines += ["", "### Not run", "", *missing]
    lines += ["", *_context(rows, latency)]
    return "\n".join(lines) + "\n"


def _line(summary: Summary, by_name: dict[str, Summary]) -> str:
    twin = by_name.get(summary.experiment.twin or "")
    reference = summary.start if twin is None else twin.accuracy
    named = "its start" if twin is None else twin.experiment.name
    alone = twin is None and (summary.experiment.start == "random" or summary.experiment.dense)
    against = "" if alone else f"{100 * (summary.accuracy - reference):+.2f} to {named}"
    times = [f"{summary.ms[b][0]:.2f} → {summary.ms[b][1]:.2f}" if b in summary.ms else "" for b in (1, 16)]
    spread = f"{100 * summary.spread:.2f}" if len(summary.rows) > 1 else "one seed"
    macs = f"{summary.macs:.2f}" + ("" if summary.multiplies else " (in part additions)")
    cells = [summary.experiment.name, str(len(summary.rows)), f"{100 * summary.accuracy:.2f}", spread, against]
    cells += [summary.trained_on, macs, f"{summary.parameters:.2f}", f"{summary.learnable:.2f}"]
    return f"| {' | '.join([*cells, f'{summary.bytes:.1f}', *times])} |"


def _missing(experiment: Experiment, found: Summary | None) -> str:
    """Which seeds of the table have no row; empty where all have one."""
    left = [seed for seed in experiment.seeds if found is None or seed not in {row["seed"] for row in found.rows}]
    seeds = f"seed{'s' if len(left) > 1 else ''} {', '.join(map(str, left))}"
    if found is None:
        return f"- **{experiment.name}**, {seeds}: {experiment.question}"
    return f"- {experiment.name}, {seeds}" if left else ""


def _recipe(summary: Summary) -> str:
    row = summary.rows[0]
    if "layerwise" in row:
        settings = ", ".join(f"{key} {value}" for key, value in row["layerwise"].items())
        kept = "; ".join(
            f"{r['layers_16_times_smaller'][0]} of {r['layers_16_times_smaller'][1]}" for r in summary.rows
        )
        stopped = {r["report"]["stopped"] for r in summary.rows} - {""}
        end = f" Stopped: {'; '.join(sorted(stopped))}." if stopped else ""
        return f"Layer-wise: {settings}. Layers 16 times smaller or more, by seed: {kept}.{end}"
    parts = [
        f"`{stage['config']}`, {stage['epochs']} × {stage['curve'][0]['steps']} steps at {stage['lr']:g}"
        + (" with Adam" if stage.get("optimizer") == "adam" else "")
        + (f", {100 * stage['distill']:.0f} % of the loss by the start's answers" if stage.get("distill") else "")
        for stage in row["stages"]
    ]
    end = f" {row['batch']} images a step." if row["batch"] != 128 else ""
    if "binary_layer_bytes" in row:
        numbers, bits = row["binary_layer_bytes"]
        end += f" Its binary layers take {bits:,} bytes in place of {numbers:,}: ÷ {numbers / bits:.0f}."
    starts = {row["start_test_accuracy"] for row in summary.rows}
    if len(starts) > 1 and row["start"] in BY_NAME:
        end += f" Its seeds begin with networks of {' and '.join(f'{100 * s:.2f}' for s in sorted(starts))} %."
    return "; then ".join(parts) + f", from {row['start']}.{end}"


def _curves(summary: Summary) -> list[str]:
    found = []
    for number in range(len(summary.rows[0].get("stages", ()))):
        curves = [[100 * epoch["validation"] for epoch in row["stages"][number]["curve"]] for row in summary.rows]
        before = [100 * row["stages"][number]["test_accuracy_before_training"] for row in summary.rows]
        words = "; ".join(
            f"{b:.1f} (test, untrained) → " + " → ".join(f"{value:.1f}" for value in curve)
            for b, curve in zip(before, curves, strict=True)
        )
        stage = f" stage {number + 1}" if len(summary.rows[0]["stages"]) > 1 else ""
        found.append(f"- {summary.experiment.name}{stage}: {words}")
    return found


def _context(rows: Sequence[Row], latency: Sequence[Row]) -> list[str]:
    devices = sorted({row["device"].get("accelerator") or row["device"]["cpu"] for row in rows})
    commits = sorted({(row["git"]["commit"] or "unknown")[:10] for row in rows})
    torches = sorted({row["versions"]["torch"] for row in rows})
    hours = sum(row["seconds"] for row in rows) / 3600
    lines = [
        f"{len(rows)} trainings, {hours:.1f} hours and what ran before some were resumed, {', '.join(devices)}, "
        f"{', '.join(torches)}, at commits {', '.join(commits)}. Accuracies are of the 8,000 test images that chose "
        "nothing."
    ]
    timed: dict[str, list[str]] = {}
    for row in latency:
        where = f"{row['device']['cpu']} (family {row['device']['family']}), {row['threads']} thread"
        where += f", {row['versions']['torch']}, at commit {(row['git']['commit'] or 'unknown')[:10]}"
        timed.setdefault(where, []).extend(_timed(name, row) for name in row["ms"] if name != "dense")
    lines += [f"\nTimes on {where}: {', '.join(dict.fromkeys(names))}." for where, names in timed.items()]
    return lines


def _timed(name: str, row: Row) -> str:
    """An experiment, and which network of it was timed unless that of seed 0."""
    origin = row.get("networks", {}).get(name, "seed 0")
    return name if origin == "seed 0" else f"{name} ({origin})"


def write(page: Path = PAGE, plots: Path = PLOTS) -> None:
    """Put the tables between the page's marks, and draw the plots."""
    rows, latency = read(ROWS), read(LATENCY)
    old = page.read_text(encoding="utf-8")
    head, _, rest = old.partition(START)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{START}\n\n{text(rows, latency)}\n{END}{tail}", encoding="utf-8")
    plots.mkdir(parents=True, exist_ok=True)
    known = summaries(rows, latency)
    _plot(plots / "macs.svg", "million MACs an image", [(s, s.mac_count / 1e6) for s in known if s.multiplies])
    _plot(plots / "bytes.svg", "kilobytes of the file", [(s, s.file_bytes / 1e3) for s in known])
    timed = [(s, x) for s in known if (x := _share_of_time(s, known)) is not None]
    if timed:
        _plot(plots / "time.svg", "time at batch 1 ÷ the dense network's", timed)


def _share_of_time(summary: Summary, known: Sequence[Summary]) -> float | None:
    """Of the dense network's at batch 1, taken beside it: not all were timed on one processor."""
    if not summary.experiment.dense:
        return summary.ms[1][1] / summary.ms[1][0] if 1 in summary.ms else None
    name = summary.experiment.name
    return 1.0 if any(1 in s.ms and name in (s.experiment.twin, s.experiment.start) for s in known) else None


def _plot(path: Path, label: str, points: Sequence[tuple[Summary, float]]) -> None:
    """Accuracy against ``label``: one panel for each network in which something is converted, dense ones in black."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    panels: dict[str, list[tuple[Summary, float]]] = {}
    for summary, x in points:
        long = summary.experiment in LONG
        panels.setdefault(summary.experiment.network + ("" if long else ", short"), []).append((summary, x))
    panels = {title: part for title, part in panels.items() if not all(summary.experiment.dense for summary, _ in part)}
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "font.size": 8}):
        figure = Figure(figsize=(1.0 + 2.7 * len(panels), 5.0), layout="constrained")
        for place, (title, part) in enumerate(panels.items(), 1):
            axes, markers = figure.add_subplot(1, len(panels), place), itertools.cycle(MARKERS)
            for summary, x in part:
                values = [100 * row["test_accuracy"] for row in summary.rows]
                color = {"color": "black", "mfc": "none"} if summary.experiment.dense else {}
                axes.plot(
                    [x] * len(values), values, next(markers), ms=6, alpha=0.7, label=summary.experiment.name, **color
                )
            axes.set(title=title, xlabel=label, xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2 if len(part) > 6 else 1)
        figure.axes[0].set_ylabel("test accuracy, %")
        figure.savefig(path, metadata={"Date": None})
