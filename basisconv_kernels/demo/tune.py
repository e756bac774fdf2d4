"""``basisconv tune``: the native kernels against two ordinary convolutions on this device, as a table and a file.

The file is JSON, one a device, ``tuned/<device>.json`` in the package's cache folder unless another is named::

    {"format": "basisconv-tuned", "version": 1,
     "device": {"cpu", "isa", "threads"}, "packages": {"basisconv_kernels", "torch"}, "measured": <UTC>,
     "entries": [{"op": "basis_conv2d", "problem": {"N", "C", "H", "W", "Q", "K", "R", "S", "stride", "padding",
                  "dilation", "groups", "compact", "dtype", "channels_last", "bias", "residual", "activation",
                  "precise"},
                  "ms": {<backend>: {"median", "q1", "q3", "least", "samples"}}, "fastest": <backend>,
                  "disturbed": 0..1}]}

``disturbed`` is the share of samples during which the operating system took a core away: above ``BUSY``, measure again.

A second run adds to a file of the same device, threads and packages, and replaces entries of equal problems; a file of
another device, version or package is written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels import diagnostics, testing
from basisconv_kernels.compression.survey import evaluating, watching
from basisconv_kernels.core import env, registry
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.demo import measure
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.ops.basis_conv2d import CANDIDATES, OP, basis_conv2d
from basisconv_kernels.ops.basis_conv2d_native import basis_conv2d_pack

FORMAT, VERSION = "basisconv-tuned", 1
BUSY = 0.25
SIZES = ("N", "C", "H", "W", "Q", "K", "R", "S")


def cache_file() -> Path:
    """Where the table of this device lies by default: in ``XDG_CACHE_HOME``, else ``~/.cache``."""
    cache = env._get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "basisconv" / "tuned"
    slug = "-".join(re.findall(r"[a-z0-9.]+", diagnostics.cpu_name().lower())) or "unknown-cpu"
    return folder / f"{slug}-{diagnostics.isa()}.json"


def default_problems() -> list[Conv2dProblem]:
    """The layers by which the package judges its own speed, with a bias."""
    return [replace(case.problem, bias=True) for case in testing.PERFORMANCE_CASES]


def parse_problem(text: str) -> Conv2dProblem:
    """``N=8,C=64,H=56,W=56,Q=16,K=64,R=3,padding=1`` → a problem; S is R, stride, dilation and groups 1, padding 0.

    Raises:
        ValueError: another form, an unknown or a missing key.
    """
    pairs = [part.partition("=") for part in re.split(r"[,\s]+", text.strip()) if part]
    values = {}
    for key, equals, number in pairs:
        if key not in (*SIZES, "stride", "padding", "dilation", "groups") or not equals or not number.isdecimal():
            raise ValueError(
                f"tune: a problem reads N=8,C=64,H=56,W=56,Q=16,K=64,R=3,padding=1, got {text!r} at {key!r}"
            )
        values[key] = int(number)
    values.setdefault("S", values.get("R", 0))
    lacking = [key for key in SIZES if not values.get(key)]
    if lacking:
        raise ValueError(f"tune: the problem {text!r} lacks {', '.join(lacking)}")

    def pair(key: str, default: int) -> Pair:
        return (values.get(key, default),) * 2

    around: Quad = (values.get("padding", 0),) * 4
    sizes: dict[str, Any] = {key: values[key] for key in SIZES}
    problem = Conv2dProblem(
        **sizes, stride=pair("stride", 1), dilation=pair("dilation", 1), padding=around,
        groups=values.get("groups", 1), bias=True, channels_last=True,
    )  # fmt: skip
    if problem.C % problem.groups or problem.Q % problem.groups or min(*problem.stride, *problem.dilation) < 1:
        raise ValueError(f"tune: C and Q must be divisible by groups, stride and dilation at least 1, got {text!r}")
    _ = problem.output_size  # a ValueError where the map is smaller than the kernel
    return problem


def model_problems(model: nn.Module, example: Tensor) -> list[Conv2dProblem]:
    """The problems of the ``BasisConv2d`` layers of a network on these images, each once.

    Raises:
        ValueError: the network has no such layer.
    """
    found: dict[Conv2dProblem, None] = {}

    def watcher_for(layer: BasisConv2d) -> Callable[[Tensor, Tensor], None]:
        return lambda input, output: found.setdefault(_problem_of(layer, input))

    layers: dict[nn.Module, Callable[[Tensor, Tensor], None]] = {
        module: watcher_for(module) for module in model.modules() if isinstance(module, BasisConv2d)
    }
    if not layers:
        raise ValueError(
            "tune: the network has no BasisConv2d; give a rule that converts layers, such as --energy 0.63"
        )
    with evaluating(model), watching(layers):
        model(example)
    return list(found)


def _problem_of(layer: BasisConv2d, input: Tensor) -> Conv2dProblem:
    Q, _, R, S = layer.basis_weight.shape
    K, mixed = layer.coefficients.shape
    N, C, H, W = input.shape
    return Conv2dProblem(
        N=N, C=C, H=H, W=W, Q=Q, K=K, R=R, S=S, stride=layer.stride, padding=layer.pad_amounts,
        dilation=layer.dilation, groups=layer.groups, compact=mixed != Q, dtype=input.dtype, device=input.device.type,
        channels_last=True, bias=layer.bias is not None, activation=layer.activation, precise=layer.precise,
    )  # fmt: skip


def measure_problem(problem: Conv2dProblem, seconds: float) -> dict[str, Any]:
    """One entry of the file: every backend that can run the problem here, in turn, with packed weights."""
    names = [name for name, against in registry.reasons(CANDIDATES, problem).items() if not against]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device, problem.dtype)

    p = problem
    layout = torch.channels_last if p.channels_last else torch.contiguous_format
    input = random(p.N, p.C, p.H, p.W).contiguous(memory_format=layout)
    basis, mixing = random(p.Q, p.C // p.groups, p.R, p.S) / p.taps**0.5, random(p.K, p.mixed)
    bias = random(p.K) if p.bias else None
    shape: dict[str, Any] = {"stride": p.stride, "dilation": p.dilation, "groups": p.groups, "precise": p.precise}
    packed = basis_conv2d_pack(basis, mixing, **shape)

    def call_of(backend: str) -> Callable[[], object]:
        settings: dict[str, Any] = {**shape, "padding": p.padding, "activation": p.activation}
        return lambda: basis_conv2d(input, basis, mixing, bias, **settings, packed=packed, backend=backend)

    with torch.inference_mode():
        taken = measure.interleave({name: call_of(name) for name in names}, seconds)
    spreads = {name: series.scaled(1e3).spread() for name, series in taken.items()}
    return {
        "op": OP,
        "problem": _as_json(problem),
        "ms": {name: spread.to_dict() for name, spread in spreads.items()},
        "fastest": min(spreads, key=lambda name: spreads[name].median),
        "disturbed": round(measure.disturbed(taken.values()), 4),
    }


def _as_json(problem: Conv2dProblem) -> dict[str, Any]:
    values = {**asdict(problem), "dtype": diagnostics.dtype_name(problem.dtype)}
    values.pop("device")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def tune(
    problems: Sequence[Conv2dProblem], seconds: float, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Measure problems; what the file holds.

    Args:
        problems: on the CPU.
        seconds: for each problem.
        progress: called before each problem with the share done, 0..1.
    """
    entries = []
    for done, problem in enumerate(problems):
        if progress is not None:
            progress(done / len(problems))
        entries.append(measure_problem(problem, seconds))
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": {"cpu": diagnostics.cpu_name(), "isa": diagnostics.isa(), "threads": torch.get_num_threads()},
        "packages": {"basisconv_kernels": diagnostics.package_version(), "torch": torch.__version__},
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "entries": entries,
    }


def write(table: dict[str, Any], path: Path) -> int:
    """Write a table, with the entries of other problems that are in the file already; how many it holds then."""
    entries = {_key(entry): entry for entry in [*_earlier(table, path), *table["entries"]]}
    merged = {**table, "entries": list(entries.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    return len(entries)


def _earlier(table: dict[str, Any], path: Path) -> Iterable[dict[str, Any]]:
    """Entries of the file if it was written for the same device, threads and packages."""
    if not path.is_file():
        return []
    try:
        old = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return []
    same = isinstance(old, dict) and all(
        old.get(key) == table[key] for key in ("format", "version", "device", "packages")
    )
    return old["entries"] if same and isinstance(old.get("entries"), list) else []


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["op"], entry["problem"]], sort_keys=True)
