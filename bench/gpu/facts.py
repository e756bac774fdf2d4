"""What every row carries: device, versions, commit, and a fingerprint of the sources that the result belongs to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("basisconv_kernels", "triton_kernels", "csrc", "tests", "bench", "setup.py")
ENDINGS = (".py", ".cpp", ".cu", ".h")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi", "cuobjdump")


def sources() -> str:
    """Twelve digits of all code: two runs with the same ones ran the same."""
    digest = hashlib.sha256()
    for part in SOURCES:
        path = ROOT / part
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in ENDINGS)
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout; None where git or its folder did not come along."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def tools() -> dict[str, str | None]:
    """{tool: where it lies, or None}."""
    return {name: shutil.which(name) for name in TOOLS}


def device_name(device: str) -> str:
    """The model of the device, ``cpu`` in a rehearsal.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if device == "cpu":
        return "cpu"
    if (missing := no_device()) is not None:
        raise RuntimeError(missing)
    import torch

    return torch.cuda.get_device_name(0)


def no_device() -> str | None:
    """Why nothing can run on a GPU here; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch is not importable: {error}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def context(device: str) -> dict[str, Any]:
    """Device, versions and commit, for every row of a run."""
    import torch

    about: dict[str, Any] = {"name": device_name(device)}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        about |= {
            "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
            "shared_bytes": getattr(p, "shared_memory_per_block_optin", None), "driver": _driver(),
        }  # fmt: skip
    return {
        "device": about,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "commit": commit(),
        "sources": sources(),
    }


def stamp(about: dict[str, Any], *, ours: bool) -> str:
    """What a result belongs to: device and versions, and the sources where our code decides it."""
    versions = about["versions"]
    words = [about["device"]["name"], f"torch {versions['torch']}", f"triton {versions['triton']}"]
    return " · ".join([*words, *([about["sources"]] if ours else [])])


def _driver() -> str | None:
    from basisconv_kernels.core import selfcheck

    return selfcheck.driver()


def answers(device: str) -> bool:
    """Whether CUDA still works in this process: after a fault it does not."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") + 1).sum().item() == 16)
    except RuntimeError:
        return False
