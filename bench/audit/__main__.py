"""``python -m bench.audit``: whole networks of torchvision and timm against what the package promises of them."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from basisconv_kernels.core.version import __version__
from bench.audit import checks, methods, networks, page
from bench.harness import machine

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
# Sides of the images: for the kernels' geometries, for everything else, and for what adds up maps of all resolutions.
LARGE, SMALL, HALVED = 224, 80, 96
Job = tuple[tuple[str, ...], Callable[[], checks.Row]]


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Networks; default: all.")] = None,
    part: Annotated[str, typer.Option(help="basis, methods or all.")] = "all",
    method: Annotated[list[str] | None, typer.Option(help="Only these of the methods.")] = None,
    output: Annotated[Path, typer.Option(help="Rows are appended to it.")] = Path("out/audit.jsonl"),
) -> None:
    """Run the checks; each appends a row. Exit code 1 if one failed."""
    for given, known in ((names, networks.NAMES), ([part], ("basis", "methods", "all")), (method, methods.CONFIGS)):
        if unknown := set(given or ()) - set(known):
            raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for key, check in jobs(
            names or list(networks.NAMES), part, method or list(methods.CONFIGS), Path(folder) / "it"
        ):
            row = row_of(key, check)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{' '.join(key)}: {row['status']} {row.get('note', '')}", flush=True)
            failed |= row["status"] == "failed"
    raise typer.Exit(int(failed))


@app.command()
def report() -> None:
    """Make the tables of the page from the rows that are kept beside this file."""
    head, _, rest = page.PAGE.read_text(encoding="utf-8").partition(page.START)
    made = page.text(page.read(page.ROWS))
    page.PAGE.write_text(f"{head}{page.START}\n\n{made}\n{page.END}{rest.partition(page.END)[2]}", encoding="utf-8")


def jobs(names: list[str], part: str, wanted: list[str], path: Path) -> list[Job]:
    """(key, check) of everything that was asked for; ``path`` is where model files may be written."""
    found: list[Job] = []
    for name in names:
        if part != "methods":
            found.append((("full rank", name), functools.partial(_full_rank, name)))
            found.append((("quarter", name), lambda n=name: checks.quarter(*_small(n), path)))
        if part != "basis":
            for each in wanted:
                found.append((("method", name, each), lambda n=name, m=each: methods.check(m, *_small(n), path)))
    return found


def _full_rank(name: str) -> checks.Row:
    return checks.full_rank(networks.build(name, LARGE), networks.images(LARGE))


def _small(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(the network, the same once more to load a file into, images)."""
    size = HALVED if name in networks.HALVED_FIVE_TIMES else SMALL
    return networks.build(name, size), networks.build(name, size), networks.images(size)


def row_of(key: tuple[str, ...], check: Callable[[], checks.Row]) -> dict[str, Any]:
    """The row of a check: passed with its numbers, or skipped, refused or failed with the reason."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"key": key, "about": about()}
    try:
        row |= {"status": "passed", "data": check()}
    except networks.Unavailable as reason:
        row |= {"status": "skipped", "note": str(reason)}
    except Exception as error:  # whatever comes is a finding, and the other checks shall run
        refused = key[0] == "method" and isinstance(error, ValueError)  # so the package refuses what it cannot do
        row |= {"status": "refused" if refused else "failed", "note": f"{type(error).__name__}: {error}"}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def about() -> dict[str, str]:
    """The versions, the processor and the instructions in use: what a row depends on."""
    native = machine.native()
    found = {"cpu": machine.device()["cpu"], "native": native.get("absent") or native["cpu"]["in_use"]}
    found |= {"basisconv_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("torchvision", "timm"):
        with contextlib.suppress(networks.Unavailable):
            found[name] = networks.package(name).__version__
    return found


if __name__ == "__main__":
    app()
