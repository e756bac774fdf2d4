"""What the commands ``doctor``, ``env``, ``ops`` and ``explain`` say: facts about this installation, as data.

Nothing here keeps a list of its own: ops are the modules of ``basisconv_kernels.ops``, backends and what they can run
come from their ``CANDIDATES``, variables from ``core.env``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from basisconv_kernels import ops as ops_package
from basisconv_kernels import testing
from basisconv_kernels.compression import problems
from basisconv_kernels.core import checks, env, extension, machine, registry, selfcheck, tuning
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem, dtype_name
from basisconv_kernels.core.version import __version__
from basisconv_kernels.layers.decompose import break_even
from basisconv_kernels.tiny_runs import TINY_RUNS

EXTRAS = {"cli": ("typer", "rich"), "report": ("matplotlib", "jinja2"), "triton": ("triton",)}
OTHERS = ("torch", "numpy", "safetensors", "torchvision")
PACKAGE = Path(__file__).resolve().parent
PASSED = "passed on this device"
DEVICES = {
    "cpu": "cpu",
    "cuda": "cuda",
    "cuda_one_pass": "cuda",
    "triton": "cuda",
}  # any other backend follows its tensors


def op_modules() -> dict[str, ModuleType]:
    """The modules of all ops, by name: those that hold the op of their own name."""
    names = sorted(found.name for found in pkgutil.iter_modules(ops_package.__path__))
    modules = {name: importlib.import_module(f"{ops_package.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if getattr(module, "OP", None) == name}


def op_module(name: str) -> ModuleType:
    """The module of an op; a ValueError with all names where there is none."""
    modules = op_modules()
    if name not in modules:
        raise ValueError(f"no op has the name {name!r}; there are {', '.join(modules)}")
    return modules[name]


# --- env --------------------------------------------------------------------------------------------------------------


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Everything that a bug report needs, as JSON values; None where something is absent."""
    facts = extension.facts()
    onednn = re.search(r"(?:oneDNN|MKL-DNN) v([\d.]+)", torch.__config__.show())
    distributions = sorted({*OTHERS, *(name for names in EXTRAS.values() for name in names)} - {"torch"})
    return {
        "basisconv_kernels": __version__,
        "native_library": facts or extension.load(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": cores(),
        "isa": machine.isa(),
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": onednn.group(1) if onednn else None,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "packages": {name: version_of(name) for name in distributions},
        "variables": env.as_set(),
    }


# --- ops --------------------------------------------------------------------------------------------------------------


def ops_table() -> list[dict[str, Any]]:
    """One row an op, backend and device.

    Each row has ``op``, ``backend``, ``device``, ``absent`` (why it is not on this machine, or None) and ``dtypes``:
    {dtype: reasons against}, empty where the backend can run it, whether or not it is on this machine.
    """
    rows = []
    for name, module in op_modules().items():
        for candidate in module.CANDIDATES:
            for device in [DEVICES[candidate.name]] if candidate.name in DEVICES else ["cpu", "cuda"]:
                absent = registry.absent(candidate.name)
                if absent is None and device == "cuda" and not torch.cuda.is_available():
                    absent = "no CUDA device"
                rows.append({
                    "op": name,
                    "backend": candidate.name,
                    "device": device,
                    "absent": absent,
                    "dtypes": {
                        dtype_name(dtype): list(candidate.supports(_ordinary(dtype, device)))
                        for dtype in checks.FLOAT_DTYPES
                    },
                })  # fmt: skip
    return rows


def _ordinary(dtype: torch.dtype, device: str) -> Conv2dProblem:
    """A plain 3×3 problem, open in batch and map size, against which a backend of any op names what it lacks."""
    return TuckerConv2dProblem(C=64, rank_in=16, Q=16, K=64, padding=(1, 1, 1, 1), dtype=dtype, device=device)


# --- explain ----------------------------------------------------------------------------------------------------------


EXPLAINED = ("basis_conv2d", "tucker_conv2d", *problems.BITS)  # whose problems the options of the command can state


def explain(op: str, problem: Any, asked: str | None) -> dict[str, Any]:
    """What a call would run on, why nothing else, and what it costs; nothing is run.

    Args:
        op: its name.
        problem: with its sizes.
        asked: a backend wished by name, or None.

    Returns:
        dict: JSON values; ``candidates`` are the reasons why each cannot run, ``slower`` why automatic choice passes
        over some, ``predicted`` what a model says of those not measured on a GPU, ``self_checks`` what is known of the
        variants that would run there, ``measured`` the entries of ``tables`` for these weights, at whatever batch and
        map size, ``training`` what a training step on a GPU takes, None elsewhere and with a wish.

    Raises:
        ValueError: an unknown op, or a problem that has no output.
    """
    candidates = op_module(op).CANDIDATES
    if op not in EXPLAINED:
        raise ValueError(
            f"explain describes calls of {', '.join(EXPLAINED)}, got {op!r}; run the call itself with "
            "BASISCONV_LOG=dispatch"
        )
    against = registry.reasons(candidates, problem)
    wished = asked or registry.wish()
    slower_than_plain = getattr(op_module(op), "slower_than_plain", functools.partial(tuning.slower, op))
    slower = {} if wished else slower_than_plain(problem)
    checks_made = _self_checks(candidates, problem, against)
    if wished is None:
        for name, verdict in checks_made.items():
            if verdict not in (PASSED, selfcheck.NOT_YET):
                against[name] = (verdict,)
    first = registry.first(candidates, against, wished, slower)
    chosen = first.name if first else None
    OH, OW = problem.output_size
    return {
        "op": op,
        "problem": str(problem),
        "output": [problem.N, problem.K, OH, OW],
        "asked": wished,
        "chosen": chosen,
        "isa": machine.isa() if chosen == "cpu" else None,
        "candidates": {c.name: list(against[c.name]) for c in candidates},
        "slower": slower,
        "predicted": _predicted(op, problem),
        "tables": [str(table.path) for table in tuning.tables(problem.device) if table.unused is None],
        "self_checks": checks_made,
        "measured": tuning.entries_for(op, problem),
        "training": _training(op, problem, candidates, against, slower, wished),
        "unknown_backend": wished if wished is not None and wished not in against else None,
        **_costs(problem),
    }


def _predicted(op: str, problem: Any) -> dict[str, str]:
    """{backend: its time over that of two library kernels, in words} where a model speaks and nothing was measured."""
    predictions = getattr(op_module(op), "predictions", None)
    known = {backend for entry in tuning.entries_for(op, problem) for backend in entry["ms"]}
    found = {} if predictions is None else predictions(problem)
    return {backend: str(prediction) for backend, prediction in found.items() if backend not in known}


def _training(
    op: str,
    problem: Any,
    candidates: Sequence[registry.Candidate],
    against: Mapping[str, Sequence[str]],
    slower: Mapping[str, str],
    wished: str | None,
) -> dict[str, Any] | None:
    """What an eager training step on a GPU runs on without a wish, and why not on the others; None elsewhere."""
    slower_in_training = getattr(op_module(op), "slower_in_training", None)
    if slower_in_training is None or problem.device != "cuda" or wished is not None:
        return None
    passed_over = slower_in_training(problem)
    first = registry.first(candidates, against, None, slower)
    name = first.name if first else None
    return {
        "chosen": tuning.PLAIN if name in passed_over else name,
        "slower": passed_over,
        "measured": tuning.entries_for(op, problem, tuning.TRAINING),
    }


def _costs(problem: Any) -> dict[str, Any]:
    """Operations and weights of a call and of the dense convolution that it replaces."""
    if not isinstance(problem, Conv2dProblem):
        OH, OW = problem.output_size
        weights = problem.K * problem.taps
        return {"macs_dense": problem.N * OH * OW * weights, "weights_dense": weights, **problems.cost(problem)}
    chain = isinstance(problem, TuckerConv2dProblem)  # two ranks: there is no single break-even
    Q_star = None if chain else break_even(problem.K, problem.taps, problem.groups if problem.compact else 1)
    fewer_weights = problem.weights() < problem.dense_weights()
    return {
        "macs_dense": problem.dense_macs(),
        "macs_basis": problem.macs(),
        "weights_dense": problem.dense_weights(),
        "weights_basis": problem.weights(),
        "break_even": Q_star,
        "pays": fewer_weights and (not chain or problem.macs() < problem.dense_macs()),
    }


def _self_checks(
    candidates: Sequence[registry.Candidate], problem: Conv2dProblem, against: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """{backend: PASSED, the reason against it, or that it was not checked yet} of those that could run on a GPU."""
    found = {}
    for candidate in candidates:
        check = None if against[candidate.name] else registry.check_of(candidate, problem)
        if check is not None:
            found[candidate.name] = selfcheck.known(check.variant) or PASSED
    return found


# --- doctor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``state`` is "ok", "missing" (nothing is wrong with that) or "failed"."""

    what: str
    state: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Plain strings."""
        return asdict(self)


def doctor() -> list[Finding]:
    """What is built, found and missing, and one tiny run of every backend and dtype against the reference."""
    return [*_installation(), *_backends(), *_tables(), *_assets(), *_extras()]


def _installation() -> list[Finding]:
    python = f"{platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    found = [Finding("python", "ok", python)]
    problem, facts = extension.load(), extension.facts()
    if problem is None:
        cpu = facts["cpu"]
        built = f"built by {facts['compiler']} for {', '.join(cpu['built'])}"
        found.append(Finding("native library", "ok", built))
        capped = " (capped by BASISCONV_CPU_ISA)" if cpu["in_use"] != cpu["processor"] else ""
        cuda = facts.get("cuda")
        built = (
            f"for {cuda['built']}, by nvcc {cuda['nvcc']}" if cuda else "not built: BASISCONV_BUILD=cuda builds them"
        )
        found.append(Finding("CUDA kernels", "ok" if cuda else "missing", built))
        found.append(
            Finding("instruction set", "ok", f"{cpu['in_use']}{capped}; this processor has {cpu['processor']}")
        )
    else:
        built_but_broken = any(PACKAGE.glob(f"{extension.LIBRARY_NAME}.*"))
        found.append(Finding("native library", "failed" if built_but_broken else "missing", problem))
    return found


def _backends() -> list[Finding]:
    found = []
    for op, module in op_modules().items():
        for candidate in module.CANDIDATES:
            absent = registry.absent(candidate.name)
            if absent:
                found.append(Finding(f"{op} on {candidate.name}", "missing", absent))
            elif op in TINY_RUNS:
                found.append(_tiny_run(op, candidate, TINY_RUNS[op]))
    return found


def _tiny_run(op: str, candidate: registry.Candidate, run: Callable[[str, torch.dtype, str], None]) -> Finding:
    what = f"{op} on {candidate.name}"
    device = "cuda" if DEVICES.get(candidate.name) == "cuda" else "cpu"
    dtypes = [d for d in checks.FLOAT_DTYPES if not candidate.supports(_ordinary(d, device))]
    if not dtypes:
        why = "; ".join(candidate.supports(_ordinary(torch.float32, device)))
        return Finding(what, "ok", f"no tiny run: {why}")
    for dtype in dtypes:
        try:
            run(candidate.name, dtype, device)
        except (testing.Mismatch, RuntimeError, ImportError, OSError) as error:
            return Finding(what, "failed", f"{dtype_name(dtype)}: {str(error).splitlines()[0]}")
    return Finding(what, "ok", f"tiny runs agree with the oracle: {', '.join(map(dtype_name, dtypes))}")


def _tables() -> list[Finding]:
    what, found = "tuned table", []
    for table in (*tuning.tables("cpu"), *tuning.tables("cuda")):
        if table.unused is not None:
            found.append(Finding(what, "missing", f"{table.path} is not used: {table.unused}; run `basisconv tune`"))
            continue
        slow = sum(bool(tuning.slower_in(entry)) for entry in table.entries if entry["disturbed"] <= tuning.BUSY)
        busy = sum(entry["disturbed"] > tuning.BUSY for entry in table.entries)
        verdict = f"a kernel is slower than plain PyTorch in {slow}" + (f", {busy} measured while busy" if busy else "")
        found.append(Finding(what, "ok", f"{table.path}: {len(table.entries)} problems; {verdict}"))
    for kind, device, options in (("cpu", "processor", ""), ("cuda", "GPU", " --device cuda --dtype bfloat16")):
        described = tuning.described(kind)
        if described is not None and not tuning.tables(kind):
            advice = f"none for this {device} ({tuning.file_name(described)}): run `basisconv tune{options}`"
            found.append(Finding(what, "missing", advice))
    return found


def _assets() -> list[Finding]:
    folder = PACKAGE / "assets"
    files = [path for path in folder.glob("*.*") if path.suffix in (".gz", ".safetensors")]
    size = sum(path.stat().st_size for path in files) / 1e6
    state = "ok" if any(path.suffix == ".safetensors" for path in files) and len(files) > 1 else "failed"
    found = [Finding("demo data", state, f"{len(files)} files, {size:.1f} MB, in the package")]
    data = env.data_folder()
    there = sorted(path.name for path in data.iterdir()) if data.is_dir() else []
    found.append(
        Finding("other data sets", "ok" if there else "missing",
                f"{data}: {', '.join(there[:5]) or 'not there; only --data cifar10 needs it'}")
    )  # fmt: skip
    return found


def _extras() -> list[Finding]:
    found = []
    for extra, names in EXTRAS.items():
        versions = {name: version_of(name) for name in names}
        if all(versions.values()):
            found.append(Finding(f"extra [{extra}]", "ok", ", ".join(f"{n} {v}" for n, v in versions.items())))
        else:
            lacking = ", ".join(name for name, version in versions.items() if version is None)
            advice = f"{lacking} not installed: pip install 'basisconv_kernels[{extra}]'"
            found.append(Finding(f"extra [{extra}]", "missing", advice))
    return found


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]
