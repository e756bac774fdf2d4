"""``python -m bench``: results on stdout, progress on stderr.

Exit codes: 0 everything that could run was right; 1 a correctness gate failed, an engine died, or (``--strict``,
``--fail-below``) a bar was missed; 2 wrong usage.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import suites as all_suites
from bench.harness import compare as comparing
from bench.harness import engines, machine, readme, report, roofline, rows, tables
from bench.harness.case import Case, Suite
from bench.harness.errors import UnknownNameError
from bench.harness.rows import Row
from bench.harness.runner import Options, Runner
from bench.harness.verdict import Outcome, is_ours, outcomes
from bench.harness.workers import Pool

app = typer.Typer(
    help="Benchmarks of basisconv_kernels: every engine in its own process, in turn, after a correctness gate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WIDE = 200  # columns of a table that does not go to a terminal

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _out() -> Console:
    """Results. rich itself honours NO_COLOR."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _progress() -> Console:
    return Console(stderr=True)


def _usage(error: Exception) -> typer.Exit:
    _progress().print(Text(str(error)), soft_wrap=True)
    return typer.Exit(2)


def _suites(names: Sequence[str]) -> list[Suite]:
    if any(name.lower() == "all" for name in names):
        return [suite for suite in all_suites.suites().values() if suite.name != "smoke"]
    return [all_suites.find(name) for name in names]


def _cases(suite: Suite, wanted: Sequence[str]) -> list[Case]:
    """Cases whose id contains one of the words, and the layers of the networks among them."""
    chosen = {case.id for case in suite.cases if not wanted or any(word in case.id for word in wanted)}
    chosen |= {part.case for case in suite.cases if case.id in chosen for part in case.parts}
    return [case for case in suite.cases if case.id in chosen]


# --- list -------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    as_json: Json = False,
    suite: Annotated[list[str] | None, typer.Option(help="Only these suites.")] = None,
) -> None:
    """Suites, cases, targets and engines."""
    try:
        found = _suites(suite or [*all_suites.suites()])
    except UnknownNameError as error:
        raise _usage(error) from None
    installed = {spec.name: spec.installed() for spec in engines.ENGINES}
    if as_json:
        data = {
            "suites": [
                {
                    "name": s.name,
                    "title": s.title,
                    "engines": s.engines,
                    "cases": [
                        {"id": c.id, "kind": c.kind, "forms": c.forms, "problem": str(c.problem or "")} for c in s.cases
                    ],
                    "targets": [asdict(t) for t in s.targets],
                }
                for s in found
            ],
            "engines": [
                {"name": e.name, "describes": e.describes, "installed": installed[e.name]} for e in engines.ENGINES
            ],
        }
        print(json.dumps(data, ensure_ascii=False, indent=2))
        return
    out = _out()
    for s in found:
        table = Table(title=Text(f"{s.name}: {s.title}"), title_justify="left")
        for name in ("case", "kind", "problem", "forms"):
            table.add_column(name)
        for c in s.cases:
            what = c.problem or (f"{c.linear[1]}→{c.linear[2]}" if c.linear else f"{c.network}, batch {c.batch}")
            table.add_row(c.id, c.kind, Text(str(what)), " ".join(c.forms))
        out.print(table)
        for target in s.targets:
            must, stretch = tables.bars(target)
            known = f"  {target.name}: must {must}, stretch {stretch}"
            out.print(Text(known if target.must else f"  {target.name}"))
    table = Table(title=Text("Engines"), title_justify="left")
    for name in ("engine", "installed", "what"):
        table.add_column(name)
    for spec in engines.ENGINES:
        table.add_row(spec.name, "yes" if installed[spec.name] else "missing", spec.describes)
    out.print(table)


# --- run --------------------------------------------------------------------------------------------------------------


def _engines_of(suite: Suite, only: Sequence[str], candidates: Sequence[str]) -> list[str]:
    chosen = [name for name in suite.engines if not only or name in only]
    chosen += [name for name in only if name not in suite.engines]
    chosen += [f"candidate:{target}" for target in candidates]
    for name in chosen:
        engines.find(name)
    return chosen


def _measure(
    suite: Suite, cases: Sequence[Case], names: Sequence[str], options: Options, progress: Console, targets: list[Path]
) -> list[Row]:
    """All rows of a suite, written to ``targets`` case by case: a run that is cut short keeps what it measured."""
    environment = engines.timing_environment(options.threads)
    context = machine.context(options.threads, environment)
    done: list[Row] = []
    with progress.status("measuring what this machine can do"):
        peaks = roofline.measure_apart(options.threads, environment)
        context["peaks"] = asdict(peaks)
        early = [] if all(case.kind == "memory" for case in cases) else names
    with progress.status("starting the engines") as status, Pool(environment, early) as pool:
        runner = Runner(suite, names, pool, peaks, context, options, lambda text: status.update(Text(text)))
        for case in cases:
            made = runner.run(case)
            for row in made:
                if row.status != "ok":
                    said = f"{suite.name} {case.id} {row.engine} {row.form}: {row.status}: {row.reason}"
                    progress.print(Text(said), soft_wrap=True)
            progress.print(Text(f"{suite.name} {case.id}: done"), soft_wrap=True)
            done += made
            for path in targets:
                rows.append(path, made)
    return done


@app.command()
def run(
    suite: Annotated[list[str], typer.Option(help="Names of suites, see ``list``, or all.")] = ["C1"],  # noqa: B006 - typer copies it
    case: Annotated[list[str] | None, typer.Option(help="Only cases whose id contains this.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only these engines.")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="package.module:function with the signature of basis_conv2d, measured as one more engine."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each engine, taken in turn.")] = 15,
    sample_ms: Annotated[float, typer.Option(min=0.1, help="Aimed length of a sample.")] = 20.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds a sample may wait for the core's full speed.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Append the rows to this JSONL file.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Append the rows to bench/results/<device>/.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a must is not reached.")] = False,
    as_json: Json = False,
) -> None:
    """Check, measure and judge."""
    options = Options(rounds, sample_ms / 1e3, threads, patience)
    try:
        chosen = [(s, _cases(s, case or []), _engines_of(s, engine or [], candidate or [])) for s in _suites(suite)]
    except UnknownNameError as error:
        raise _usage(error) from None
    if not any(cases for _, cases, _ in chosen):
        raise _usage(UnknownNameError(f"bench: no case has {case} in its id; see python -m bench list"))
    progress = _progress()
    everything: list[Row] = []
    judged: list[Outcome] = []
    for s, cases, names in chosen:
        if not cases:
            continue
        targets = [out] if out else []
        targets += [machine.results_folder() / f"{s.name.lower()}-t{threads}.jsonl"] if save else []
        found = _measure(s, cases, names, options, progress, targets)
        verdicts = outcomes(found, s)
        everything += found
        judged += verdicts
        if not as_json:
            _out().print(tables.suite_view(found, verdicts, s))
    if as_json:
        for row in everything:
            print(row.to_json())
    wrong = any(row.status in ("failed", "died") for row in everything)
    missed = strict and any(outcome.verdict in ("short", "no data") for outcome in judged)
    raise typer.Exit(1 if wrong or missed else 0)


# --- compare and report -----------------------------------------------------------------------------------------------


def _read(paths: Sequence[Path]) -> list[Row]:
    try:
        return rows.read(paths)
    except (OSError, rows.RowFormatError) as error:
        raise _usage(error) from None


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="JSONL of the earlier run.")],
    new: Annotated[Path, typer.Argument(help="JSONL of the later run.")],
    fail_below: Annotated[
        float | None, typer.Option(help="Exit with 1 if a row of ours is slower than this ratio, drift divided out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Old over new time of every row that both runs have."""
    found = comparing.compare(_read([old]), _read([new]))
    progress = _progress()
    for warning in found.warnings:
        progress.print(Text(f"warning: {warning}"), soft_wrap=True)
    drift = found.drift or 1.0
    if as_json:
        data: dict[str, Any] = {"drift": found.drift, "lost": found.lost, "warnings": found.warnings}
        data["rows"] = [{"key": list(new.key), "ratio": comparing.speedup((old, new))} for old, new in found.pairs]
        print(json.dumps(data, ensure_ascii=False))
    else:
        printer = _out()
        printer.print(tables.compare_table(found.pairs))
        for line in found.lost:
            printer.print(Text(f"no time any more: {line}"))
        if found.drift is not None:
            printer.print(Text(f"other engines changed by {found.drift:.2f}×: that much is the machine"))
    slow = [p for p in found.pairs if is_ours(p[1].engine) and comparing.speedup(p) / drift < (fail_below or 0)]
    raise typer.Exit(1 if slow else 0)


@app.command("report")
def report_(
    files: Annotated[list[Path], typer.Argument(help="JSONL files.")],
    out: Annotated[Path | None, typer.Option(help="Write report.md and SVG plots into this folder.")] = None,
    readme_: Annotated[
        Path | None, typer.Option("--readme", help="Make the table between the marks of this document anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A Markdown document on stdout, or with plots in a folder."""
    found = _read(files)
    suites = all_suites.suites()
    if readme_ is not None:
        try:
            readme_.write_text(readme.updated(readme_.read_text(encoding="utf-8"), found, suites), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _usage(error) from None
        return
    if as_json:
        by_suite = {name: outcomes(found, s) for name, s in suites.items() if any(r.suite == name for r in found)}
        print(json.dumps({name: [asdict(o) for o in got] for name, got in by_suite.items()}, ensure_ascii=False))
        return
    plots: list[Path] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plots = _plots(found, out)
    text = report.markdown(found, suites, plots)
    if out is None:
        print(text, end="")
        return
    (out / "report.md").write_text(text, encoding="utf-8")
    _progress().print(Text(f"written: {', '.join(os.fspath(path) for path in (out / 'report.md', *plots))}"))


def _plots(found: Sequence[Row], folder: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        _progress().print(Text("no plots: matplotlib is not installed (pip install basisconv_kernels[report])"))
        return []
    from bench.harness import plots

    made = []
    for name, threads in dict.fromkeys((row.suite, row.context.get("threads", 1)) for row in found):
        mine = [row for row in found if (row.suite, row.context.get("threads", 1)) == (name, threads)]
        made += plots.draw(mine, f"{name} t{threads}", folder)
    return made


if __name__ == "__main__":
    app()
