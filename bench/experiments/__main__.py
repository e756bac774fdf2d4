"""``python -m bench.experiments``: what is tried, and trying it."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.experiments import latency, report, schedule
from bench.experiments.experiment import Experiment
from bench.experiments.long import LONG
from bench.experiments.run import run as run_one
from bench.experiments.run import run_resident
from bench.experiments.table import BY_NAME, TABLE

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command("list")
def list_all() -> None:
    """The experiments, and which seeds have a row."""
    found = report.read(report.ROWS)
    for experiment in TABLE:
        seeds = sorted(row["seed"] for row in found if row["experiment"] == experiment.name)
        state = f"seeds {', '.join(map(str, seeds))}" if seeds else "not run"
        print(f"{experiment.name:<28} tier {experiment.tier}  {state:<16} {experiment.question}")


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Of experiments; default: all of tier 1.")] = None,
    weights: Annotated[Path, typer.Option(help="Folder of the published CIFAR ResNet checkpoints.")] = Path("."),
    folder: Annotated[Path, typer.Option(help="Checkpoints; a run that was killed goes on from it.")] = Path("out"),
    seeds: Annotated[str, typer.Option(help="Separated by commas; default: those of the table.")] = "",
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    shorten: Annotated[int, typer.Option(help="Steps an epoch, for a trial; its rows say so.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Rows are appended to it; those it holds are not run again.")
    ] = report.ROWS,
) -> None:
    """Run experiments one after the other; each appends a row a seed."""
    if threads:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    for experiment in _named(names) if names else [e for e in TABLE if e.tier == 1]:
        for seed in map(int, seeds.split(",")) if seeds else experiment.seeds:
            if (experiment.name, seed) in _held(output):
                continue
            _add(run_one(experiment, seed, weights, folder, shorten or None, device), output)


@app.command()
def parallel(
    names: Annotated[
        list[str] | None, typer.Argument(help="NAME or NAME:SEED,SEED, the first begin first; default: all long ones.")
    ] = None,
    weights: Annotated[Path, typer.Option(help="Folder of the published CIFAR ResNet checkpoints.")] = Path("."),
    folder: Annotated[Path, typer.Option(help="Where the networks go.")] = Path("out"),
    seeds: Annotated[str, typer.Option(help="Separated by commas; default: those of the table.")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial.")] = "cuda",
    workers: Annotated[int, typer.Option(help="Processes that share the device.")] = 10,
    seconds: Annotated[float, typer.Option(help="After these, trainings at work are killed and give no row.")] = 1e9,
    shorten: Annotated[int, typer.Option(help="Steps an epoch, for a trial; its rows say so.")] = 0,
    commit: Annotated[str, typer.Option(help="Of this unchanged tree, where it is no repository.")] = "",
    output: Annotated[
        Path, typer.Option(help="Rows are appended to it; those it holds are not run again.")
    ] = report.ROWS,
) -> None:
    """Run experiments side by side on one device, images and steps resident on it, within a given time."""
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    held = _held(output)
    jobs = [job for job in _jobs(names, seeds) if job.key not in held]

    def finished(job: schedule.Job, row: dict[str, Any]) -> None:
        if commit:
            row["git"] = {"commit": commit, "dirty": False}
        _add(row, output)

    work = functools.partial(run_resident, weights, folder, shorten or None, device)
    outcome = schedule.run(jobs, work, workers=workers, seconds=seconds, finished=finished)
    for job, words in outcome.failed.items():
        print(f"FAILED {job.name} seed {job.seed}: {words}", flush=True)
    for job in outcome.left:
        print(f"not done: {job.name} seed {job.seed}", flush=True)


def _jobs(names: list[str] | None, seeds: str) -> list[schedule.Job]:
    """In the order to begin with: that of the names; without names every experiment's first seed before any second."""
    jobs: dict[schedule.Job, None] = {}  # each once
    for entry in names or [experiment.name for experiment in LONG]:
        name, _, own = entry.partition(":")
        (experiment,) = _named([name])
        after = None if experiment.start in ("published", "random") else (experiment.start, 0)
        wanted = [int(seed) for seed in (own or seeds).split(",") if seed] or experiment.seeds
        jobs |= {schedule.Job(name, seed, after): None for seed in wanted}
    if names:
        return list(jobs)
    # What others wait for begins first, then what takes longest: large networks, and layers one by one.
    first = {job.after for job in jobs} | {(e.name, s) for e in LONG if e.tier > 1 or e.layerwise for s in e.seeds}
    return sorted(jobs, key=lambda job: (job.key not in first, job.seed))


def _named(names: list[str]) -> list[Experiment]:
    unknown = set(names) - set(BY_NAME)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


def _held(output: Path) -> set[tuple[str, int]]:
    """(experiment, seed) of the rows of a file."""
    return {(row["experiment"], row["seed"]) for row in report.read(output)}


def _add(row: dict[str, Any], output: Path) -> None:
    with output.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{row['experiment']} seed {row['seed']}: {100 * row['start_test_accuracy']:.2f} % → "
        f"{100 * row['test_accuracy']:.2f} %, MACs ÷ {row['macs'][0] / row['macs'][1]:.2f}, {row['seconds']:.0f} s",
        flush=True,
    )


@app.command("time")
def measure_times(
    folder: Annotated[Path, typer.Option(help="Where run put the networks.")] = Path("out"),
    weights: Annotated[Path, typer.Option(help="Folder of the published CIFAR ResNet checkpoints.")] = Path("."),
    seconds: Annotated[float, typer.Option(help="For each network.")] = 2.0,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    output: Annotated[Path, typer.Option(help="Times of other networks stay in it.")] = report.LATENCY,
) -> None:
    """Time the networks found beside the dense ones; keep the machine idle meanwhile."""
    torch.set_num_threads(threads)
    found = latency.measure(folder, weights, seconds)
    rows = latency.merged(report.read(output), found)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    output.write_text("".join(lines), encoding="utf-8")
    timed = {name for row in found for name in row["ms"]}
    left = [e.name for e in TABLE if not e.dense and e.name not in timed]
    print("without a network at hand:", ", ".join(left) or "none", file=sys.stderr)
    for row in found:
        print(row["network"], "batch", row["batch"], f"{row['disturbed']:.0%} disturbed", row["ms"])


@app.command("report")
def write_report() -> None:
    """Make the results page of the docs anew from the rows."""
    report.write()


if __name__ == "__main__":
    app()
