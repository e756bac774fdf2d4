"""The commands of ``basisconv``: their options and their words. What they do is done elsewhere.

Results go to stdout, progress and messages to stderr. Exit code 0: all went well; 1: the command failed, with one line
that says why; 2: it was called wrongly.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from basisconv_kernels.core.checks import ACTIVATIONS
from basisconv_kernels.demo import terminal

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    name="basisconv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# What a user's input, files or machine can cause; anything else is a bug of ours and shows its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str, typer.Option(metavar="MODULE:FUNCTION", help="A function without arguments that returns the network.")
]
Weights = Annotated[
    Path | None, typer.Option(help="Trained weights: .safetensors, or a torch.save file, read with weights_only.")
]
Input = Annotated[str, typer.Option("--input", metavar="N,C,H,W", help="Shape of the network's input.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from basisconv_kernels.core.version import __version__

        print(f"basisconv_kernels {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the whole traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Convolutions with shared filter bases: compress a network, look at it, time it, and see what runs where."""


class KeepDense(str, Enum):
    """When a layer stays dense."""

    auto = "auto"
    never = "never"


def run(arguments: list[str]) -> int:
    """Run a command line; the exit code."""
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    with warnings.catch_warnings():
        warnings.showwarning = terminal.warn
        try:
            app(args=arguments, prog_name="basisconv")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except USER_ERRORS as error:
            if show_traceback:
                raise
            terminal.say(f"basisconv: error: {terminal.one_line(error)}", "bold red")
            return 1
    return 0


def _model(name: str, weights: Path | None) -> nn.Module:
    from basisconv_kernels.compression.named import from_function

    if not all(name.partition(":")[::2]):
        raise typer.BadParameter(f"must be package.module:function, got {name!r}", param_hint="--model")
    if weights is None:
        terminal.say("basisconv: no --weights: the network keeps the weights that its function gives it")
    return from_function(name, weights)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the results and the networks.")] = Path("out/demo"),
    data: Annotated[str, typer.Option(help="fashion-mnist (in the package) or cifar10.")] = "fashion-mnist",
    network: Annotated[str, typer.Option(help="small-vgg, resnet20 or resnet56.")] = "small-vgg",
    weights: Weights = None,
    energy: Annotated[list[float] | None, typer.Option(help="Energy to keep, 0..1; once a level.")] = None,
    train_images: Annotated[int, typer.Option(min=1, help="Images to fine-tune on.")] = 6000,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds on few images: shows that all works.")] = False,
    as_json: Json = False,
) -> None:
    """Compress, fine-tune, save, reload and time a real network, and write a page about it.

    The network is dense first, then compressed at three levels; each is run as two ordinary convolutions and fused.
    Takes under four minutes on two cores.
    """
    from basisconv_kernels.diagnostics import EXTRAS, missing_modules

    missing = missing_modules(EXTRAS["report"])
    if missing:
        raise ImportError(f"demo: the page needs {' and '.join(missing)}: pip install 'basisconv_kernels[report]'")
    from basisconv_kernels.demo import models
    from basisconv_kernels.demo.run import LEVELS, Settings, run_demo
    from basisconv_kernels.demo.summary import print_summary

    terminal.one_of("--data", data, list(models.DATA))
    terminal.one_of("--network", network, list(models.NETWORKS))
    if any(not 0 < level <= 1 for level in energy or ()):
        raise typer.BadParameter(f"must lie in 0..1, got {energy}", param_hint="--energy")
    levels = tuple(sorted(set(energy or LEVELS), reverse=True))
    settings = Settings(out, data, network, weights, levels, train_images)
    results = run_demo(settings.shortened() if quick else settings)
    if as_json:
        terminal.print_json(results)
    else:
        print_summary(results)
        print(f"\n{out / 'index.html'}")
    if not results["verification"]["passed"]:
        raise RuntimeError("demo: a new process that loaded the saved files predicted otherwise; see results.json")


@app.command()
def compress(
    model: Model,
    input: Input,
    weights: Weights = None,
    method: Annotated[str, typer.Option(help="basis, or tucker: 1×1 → core → 1×1.")] = "basis",
    energy: Annotated[float | None, typer.Option(help="Rule: keep this share of the filters' energy, 0..1.")] = None,
    evbmf: Annotated[float | None, typer.Option(help="Rule of tucker: EVBMF, weakened by this share, 0..1.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Rule: this fraction of a layer's filters, 0..1.")] = None,
    basis_channels: Annotated[int | None, typer.Option(help="Rule: this many basis filters in every layer.")] = None,
    macs: Annotated[float | None, typer.Option(help="Rule: most multiply-accumulates; up to 1, a fraction.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Rule: most parameters; up to 1, a fraction.")] = None,
    latency: Annotated[float | None, typer.Option(help="Rule: most measured time, as a fraction of dense.")] = None,
    keep_dense: Annotated[
        KeepDense, typer.Option(help="auto: layers that would not gain stay dense.")
    ] = KeepDense.auto,
    min_channels: Annotated[int, typer.Option(min=1, help="Least number of basis filters.")] = 1,
    multiple_of: Annotated[int, typer.Option(min=1, help="Round their number up to a multiple.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Time every layer; keep dense what is no faster.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Convert these layers or modules alone; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave these layers or modules out; repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to save to, *.safetensors; without it nothing is saved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a network's convolutions to cheaper ones, save it and print what was done.

    Give exactly one rule. Fine-tune the result afterwards: truncation costs accuracy.
    """
    import torch

    from basisconv_kernels.compression.config import BasisConfig
    from basisconv_kernels.compression.files import save
    from basisconv_kernels.compression.model import compress as convert
    from basisconv_kernels.compression.tucker_config import TuckerConfig

    kinds: dict[str, Any] = {"basis": BasisConfig, "tucker": TuckerConfig}
    terminal.one_of("--method", method, list(kinds))
    known = {each.name for each in fields(kinds[method])}
    rules = {"energy": energy, "fraction": fraction, "basis_channels": basis_channels, "macs": macs,
             "parameters": parameters, "latency": latency, "evbmf": evbmf}  # fmt: skip
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1 or not given.keys() <= known:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in rules if name in known)
        raise typer.BadParameter(f"give exactly one of {names}", param_hint="the rule")
    shape = terminal.sizes(input, "--input", 4)
    settings = {"multiple_of": multiple_of, "measure": measure, "keep_dense": keep_dense.value}
    config = kinds[method](**given, **settings, **({"min_channels": min_channels} if method == "basis" else {}))
    example = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    network = _model(model, weights)
    small, report = convert(network, config, example_inputs=example, only=only or (), skip=skip or ())
    if out is not None:
        save(small, out)
    if as_json:
        terminal.print_json({**report.to_dict(), "file": None if out is None else str(out)})
        return
    print(report.to_table())
    if out is None:
        terminal.say("basisconv: no --out: nothing was saved")
    else:
        print(f"saved {out}, {out.stat().st_size:,} bytes")


@app.command()
def report(file: Annotated[Path, typer.Argument(help="What compress or save wrote.")], as_json: Json = False) -> None:
    """Print what a saved file says about its network: the recipe and a table of its layers. The file is verified."""
    from basisconv_kernels.compression.files import read_recipe
    from basisconv_kernels.demo.summary import recipe_rows

    recipe = read_recipe(file)
    if as_json:
        terminal.print_json(recipe)
        return
    elements = sum(math.prod(entry["shape"]) for entry in recipe["tensors"].values())
    print(f"{file}: format version {recipe['version']}, {recipe['bytes']:,} bytes, intact")
    print(f"{len(recipe['layers'])} layers described, {len(recipe['tensors'])} tensors, {elements:,} values\n")
    terminal.print_rows(recipe_rows(recipe))


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Measure the layers of this network.")
    ] = None,
    input: Annotated[str, typer.Option("--input", metavar="N,C,H,W", help="Its input.")] = "1,3,224,224",
    fraction: Annotated[float, typer.Option(help="Its layers get this fraction of their filters, 0..1.")] = 0.25,
    problem: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N=8,C=64,...", help="N C H W Q K R, also S stride padding dilation groups; op=... first."
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help="Memory format: both, channels_last or nchw.")] = "both",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda, the current GPU.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.001, help="To spend on each problem and format.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="File; default: this device's, in the cache folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print only.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the kernels against plain PyTorch on this device; automatic choice then passes over slower ones.

    Without a model or problems: the layers by which the package judges its own speed. On a processor times hold for the
    number of threads they were taken with; on a GPU training steps are timed too. Running processes keep their choices.
    """
    import torch

    from basisconv_kernels.compression import tune as tuner
    from basisconv_kernels.compression.config import BasisConfig
    from basisconv_kernels.compression.model import compress as convert
    from basisconv_kernels.core import tuning
    from basisconv_kernels.demo import summary
    from basisconv_kernels.demo.progress import Stages

    shape = terminal.sizes(input, "--input", 4)
    terminal.one_of("--layout", layout, tuner.LAYOUTS)
    problems = [tuner.parse_problem(text) for text in problem or ()]
    if model is not None:
        example = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        small, _ = convert(_model(model, None), BasisConfig(fraction=fraction), example_inputs=example)
        problems += tuner.model_problems(small, example)
    terminal.one_of("--device", device, ["cpu", "cuda"])
    problems = tuner.variants(problems or tuner.default_problems(), layout, terminal.dtype(dtype), device)
    if (described := tuning.described(device)) is None:
        raise RuntimeError("tune: this machine has no CUDA device")
    path = out or tuning.user_file(device)
    with Stages(1) as stages, stages.stage("measuring", f"{len(problems)} problems") as advance:
        entries = tuner.tune(problems, seconds, advance)
    busy = sum(entry["disturbed"] > tuning.BUSY for entry in entries)
    if busy:
        terminal.say(
            f"basisconv: the machine was busy during {busy} of {len(problems)} problems, which do not count: "
            "measure again",
            "yellow",
        )
    held = 0 if dry_run else tuning.write(entries, path, described)
    if as_json:
        terminal.print_json({**tuning.head(described), "entries": entries, "file": None if dry_run else str(path)})
        return
    terminal.print_rows(summary.tuned_rows(entries))
    if not dry_run:
        print(f"\n{path}: {held} problems")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is built, found and missing, and run every backend once against the reference."""
    from basisconv_kernels import diagnostics

    findings = diagnostics.doctor()
    if as_json:
        terminal.print_json([finding.to_dict() for finding in findings])
    else:
        styles = {"ok": "green", "missing": "yellow", "failed": "bold red"}
        rows = [(finding.state, finding.what, finding.detail) for finding in findings]
        terminal.print_rows(rows, [styles[finding.state] for finding in findings])
    failed = [finding.what for finding in findings if finding.state == "failed"]
    if failed:
        raise RuntimeError(f"doctor: does not work: {', '.join(failed)}")


@app.command("env")
def environment(as_json: Json = False) -> None:
    """Print versions, processor, threads and variables, to paste into a bug report."""
    from basisconv_kernels import diagnostics

    found = diagnostics.environment()
    if as_json:
        terminal.print_json(found)
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {terminal.flat(value)}")


@app.command()
def ops(as_json: Json = False) -> None:
    """Print which backend runs which op in which dtype, and what is on this machine."""
    from basisconv_kernels import diagnostics

    rows = diagnostics.ops_table()
    if as_json:
        terminal.print_json(rows)
        return
    dtypes = list(rows[0]["dtypes"])
    table = [("op", "backend", "device", *dtypes, "on this machine")]
    for row in rows:
        cells = ["no" if row["dtypes"][dtype] else "yes" for dtype in dtypes]
        table.append((row["op"], row["backend"], row["device"], *cells, row["absent"] or "yes"))
    terminal.print_rows(table)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="Name of the op, as in `basisconv ops`.")],
    input: Annotated[str, typer.Option("--input", metavar="N,C,H,W", help="Shape of the input.")],
    out_channels: Annotated[int, typer.Option(min=1, help="K, outputs.")],
    basis_channels: Annotated[int | None, typer.Option(min=1, help="Q, basis filters; rank_out of Tucker.")] = None,
    rank_in: Annotated[int | None, typer.Option(min=1, help="Of tucker_conv2d alone.")] = None,
    bank: Annotated[int | None, typer.Option(min=1, help="n of stacked_binary_conv2d; default: K.")] = None,
    splits: Annotated[int | None, typer.Option(min=1, help="Of stacked_binary_conv2d; default: 1.")] = None,
    signs: Annotated[bool, typer.Option("--signs", help="Of stacked_binary_conv2d: signs of the input.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Of binary_conv2d: packed signs come in.")] = False,
    bits_out: Annotated[bool, typer.Option("--bits-out", help="Of binary_conv2d: packed signs go out.")] = False,
    scales: Annotated[int | None, typer.Option(help="Of ternary_conv2d: 0, 1 or 2.")] = None,
    kernel: Annotated[str, typer.Option(metavar="R[,S]", help="Filter height and width.")] = "3",
    stride: Annotated[str, typer.Option(metavar="V[,H]", help="Vertical, horizontal.")] = "1",
    padding: Annotated[str, typer.Option(metavar="V[,H]", help="Vertical, horizontal, or same.")] = "0",
    dilation: Annotated[str, typer.Option(metavar="V[,H]", help="Vertical, horizontal.")] = "1",
    groups: Annotated[int, typer.Option(min=1, help="Channel groups.")] = 1,
    compact: Annotated[bool, typer.Option("--compact", help="Coefficients mix their own group only.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda; need not be there.")] = "cpu",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of the input.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="With a bias.")] = False,
    residual: Annotated[bool, typer.Option("--residual", help="With a residual.")] = False,
    activation: Annotated[str | None, typer.Option(help="relu or relu6.")] = None,
    precise: Annotated[bool, typer.Option("--precise", help="Without Winograd arithmetic.")] = False,
    backend: Annotated[str | None, typer.Option(help="Ask for this backend, as a call may.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a call would run on, why nothing else, and what it costs. Nothing is run."""
    from basisconv_kernels import diagnostics
    from basisconv_kernels.compression.problems import problem_of_options
    from basisconv_kernels.demo.summary import explanation_rows

    for option, value, known in (("--device", device, ["cpu", "cuda"]), ("--activation", activation, ACTIVATIONS)):
        terminal.one_of(option, value, known)
    sizes = (*terminal.sizes(input, "--input", 4), out_channels, *terminal.pair(kernel, "--kernel", 1))
    geometry = {
        "stride": terminal.pair(stride, "--stride", 1),
        "padding": padding if padding in ("same", "valid") else terminal.pair(padding, "--padding", 0),
        "dilation": terminal.pair(dilation, "--dilation", 1),
        "groups": groups,
    }
    traits = {"basis_channels": basis_channels, "rank_in": rank_in, "bank": bank, "splits": splits, "scales": scales}
    flags = {"compact": compact, "residual": residual, "precise": precise, "bias": bias, "signs": signs,
             "packed": packed, "bits_out": bits_out}  # fmt: skip
    shared = {"dtype": terminal.dtype(dtype), "device": device, "channels_last": channels_last,
              "activation": activation}  # fmt: skip
    diagnostics.op_module(op)  # an error where there is none
    problem = problem_of_options(op, sizes, {**geometry, **shared}, traits, flags)
    found = diagnostics.explain(op, problem, backend)
    if as_json:
        terminal.print_json(found)
    else:
        terminal.print_rows(explanation_rows(found))
    if found["chosen"] is None:
        asked = f"backend {found['asked']!r}" if found["asked"] else "no backend"
        raise RuntimeError(f"{op}: {asked} cannot run this" if found["asked"] else f"{op}: no backend can run this")
