"""``python -m bench.experiments``: what is tried, and trying it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.experiments import latency, report
from bench.experiments.run import run as run_one
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
    unknown = set(names or ()) - set(BY_NAME)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BY_NAME)}")
    if threads:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    for experiment in [BY_NAME[name] for name in names] if names else [e for e in TABLE if e.tier == 1]:
        for seed in map(int, seeds.split(",")) if seeds else experiment.seeds:
            if any(row["experiment"] == experiment.name and row["seed"] == seed for row in report.read(output)):
                continue
            found = run_one(experiment, seed, weights, folder, shorten or None, device)
            with output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found, ensure_ascii=False) + "\n")
            print(
                f"{experiment.name} seed {seed}: {100 * found['start_test_accuracy']:.2f} % → "
                f"{100 * found['test_accuracy']:.2f} %, MACs ÷ {found['macs'][0] / found['macs'][1]:.2f}, "
                f"{found['seconds']:.0f} s",
                flush=True,
            )


@app.command("time")
def measure_times(
    folder: Annotated[Path, typer.Option(help="Where run put the networks.")] = Path("out"),
    seconds: Annotated[float, typer.Option(help="For each network.")] = 2.0,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    output: Annotated[Path, typer.Option(help="Written anew.")] = report.LATENCY,
) -> None:
    """Time the networks found beside the dense ones; keep the machine idle meanwhile."""
    torch.set_num_threads(threads)
    found = latency.measure(folder, seconds)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    output.write_text("".join(lines), encoding="utf-8")
    for row in found:
        print(row["network"], "batch", row["batch"], row["ms"])


@app.command("report")
def write_report() -> None:
    """Make the results page of the docs anew from the rows."""
    report.write()


if __name__ == "__main__":
    app()
