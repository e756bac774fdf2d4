"""Facts that every row carries: the device, the versions, the commit, the settings of the workers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import basisconv_kernels
from basisconv_kernels.core import env, extension
from bench.harness.paths import RESULTS, ROOT

# The flags that decide which kernels an engine can choose; x86 names, then Arm's.
ISA_FLAGS = (
    "avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512_vpopcntdq",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip

ENGINE_DISTRIBUTIONS = ("torch", "numpy", "onnx", "onnxruntime", "openvino")


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def device() -> dict[str, Any]:
    """CPU model, cores this process may use, instruction sets, memory."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": f"{info.get('cpu family', '?')}-{info.get('model', '?')}",
        "machine": platform.machine(),
        "cores": cores,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python, our package, every engine (None: not installed), oneDNN inside torch."""
    onednn = re.search(r"(?:oneDNN|MKL-DNN) v([\d.]+)", torch.__config__.show())
    return {
        "python": platform.python_version(),
        "basisconv_kernels": basisconv_kernels.__version__,
        **{name: _version(name) for name in ENGINE_DISTRIBUTIONS},
        "onednn_in_torch": onednn.group(1) if onednn else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """The commit and whether the tree differs from it; None outside a repository and before the first commit."""
    status = _git("status", "--porcelain", "--", ".", ":!bench/results")  # where the rows themselves are written
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def native() -> dict[str, Any]:
    """What the native library says about itself, or why it is absent."""
    absent = extension.load()
    return {"absent": absent} if absent else extension.facts()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def context(threads: int, worker_environment: dict[str, str]) -> dict[str, Any]:
    """Everything about a run that is the same for all its rows."""
    return {
        "device": device(),
        "versions": versions(),
        "git": commit(),
        "native": native(),
        "threads": threads,
        "environment": {**worker_environment, **env.as_set()},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def slug(cpu: str) -> str:
    """A folder name of a CPU's model: ``AMD EPYC 9B14 96-Core Processor`` → ``amd-epyc-9b14-96-core-processor``."""
    plain = re.sub(r"\((r|tm|c)\)", " ", cpu.lower())
    plain = re.sub(r"@.*", " ", plain)
    return "-".join(re.findall(r"[a-z0-9.]+", plain)) or "unknown-cpu"


def results_folder(about: dict[str, Any] | None = None) -> Path:
    """``bench/results/<device>`` of this machine, or of the device block of a row."""
    about = about or device()
    name = slug(about["cpu"])
    # Virtual machines often hide the model ("Intel Xeon Processor"): then family and model number tell them apart.
    return RESULTS / (name if re.search(r"\d", name) else f"{name}-{about['family']}")
