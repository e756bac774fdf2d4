"""Whether a GPU kernel may be chosen automatically: only where it was seen to compute the right results on this device.

A *variant* is one compiled path of a backend, named in words. A candidate of the registry states for a problem which
variant would run and how to check it (``Check``). A variant is trusted if a file says that it passed here, else it is
checked once, on first use, against the reference; the verdict goes into the user's file. A failure disables the variant
and says so. An explicit ``backend=`` asks nobody.

Two files are read a device, like the tables of ``core.tuning``: the one that the package carries for this kind of
device, whatever its driver, and the user's own, whose rows belong to a driver and to versions of the packages.
docs/dispatch.md describes them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from basisconv_kernels.core import env, log, machine
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.version import __version__

FORMAT, VERSION = "basisconv-selfcheck", 1
PACKAGED = Path(__file__).resolve().parents[1] / "assets" / "selfcheck"
NOT_YET = "not checked on this device yet; the first automatic choice does it"
CAPTURING = "not checked on this device yet, and a CUDA graph is being captured: call it once before"


@dataclass(frozen=True)
class Check:
    """What must pass before a variant is chosen automatically.

    Attributes:
        variant: its name, unique among all ops and backends, e.g. ``"basis_conv2d triton float16 Q≤32"``.
        run: compares it with the reference; raises where it is wrong or does not run.
    """

    variant: str
    run: Callable[[], None]


_lock = threading.RLock()  # one check at a time; a check may itself ask about variants
_here: dict[str, str | None] = {}  # verdicts of this process: variant → reason against, None when it passed


# --- the device -------------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What a verdict depends on beside the variant: the device, its driver, and who compiles and runs the kernel."""
    return {
        "device": machine.cuda_device(),
        "driver": driver(),
        "packages": {"basisconv_kernels": __version__, "torch": torch.__version__, "triton": _version("triton")},
    }


@functools.cache
def driver() -> str:
    """Version of the NVIDIA driver, as the kernel module states it, else of the CUDA that it offers."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        text = ""
    found = re.search(r"\s(\d+\.\d[\d.]*)\s", text)
    return found.group(1) if found else f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def capturing() -> bool:
    """Whether a CUDA graph is being captured, when nothing may be checked."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# --- verdicts ---------------------------------------------------------------------------------------------------------


def against(check: Check) -> str | None:
    """Why a variant must not be chosen automatically; None when it may. Runs its check if nobody did here.

    The check runs in a thread of its own, which has none of this one's modes: no autograd, autocast, tracing or wish.
    """
    with _lock:
        found = known(check.variant)
        if found != NOT_YET:
            _here[check.variant] = found
            return found
        if capturing():
            return CAPTURING
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        error = _in_a_thread(check.run, device)
        if isinstance(error, torch.OutOfMemoryError):
            return f"could not be checked on this device: {_first_line(error)}"
        why = None if error is None else f"failed its self-check on this device: {_first_line(error)}"
        _here[check.variant] = why
        if why is not None:
            log.once(f"{check.variant} {why}; it is not chosen automatically", logging.WARNING)
        _remember(check.variant, why)
        return why


def known(variant: str) -> str | None:
    """The verdict about a variant without running anything: None, the reason against it, or ``NOT_YET``."""
    if variant in _here:
        return _here[variant]
    for row in _rows():
        if row["variant"] == variant:
            return row["against"]
    return NOT_YET


def forget() -> None:
    """Drop the verdicts of this process and read the files again."""
    _here.clear()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def _in_a_thread(run: Callable[[], None], device: int | None) -> BaseException | None:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            run()
            if device is not None:
                torch.cuda.synchronize()
        except Exception as error:  # whatever is wrong with a kernel: it is not to be chosen
            raised.append(error)

    thread = threading.Thread(target=body, name="basisconv-selfcheck")
    thread.start()
    thread.join()
    return raised[0] if raised else None


# --- files ------------------------------------------------------------------------------------------------------------


def file_name(device: dict[str, Any]) -> str:
    """``nvidia-h200-9.0.json``."""
    words = re.findall(r"[a-z0-9.]+", f"{device['name']} {device['capability']}".lower())
    return f"{'-'.join(words)}.json"


def user_file() -> Path:
    """The user's file for the current device.

    Raises:
        RuntimeError: there is no folder for it; see ``env.cache_folder``.
    """
    return env.cache_folder() / "selfcheck" / file_name(facts()["device"])


def _rows() -> list[dict[str, Any]]:
    """The rows that hold here, the user's first."""
    now = facts()
    try:
        mine = [row for row in _read(user_file()) if all(row.get(key) == value for key, value in now.items())]
    except RuntimeError:
        mine = []
    kind = {"device": now["device"], "packages": now["packages"]}
    packaged = _read(PACKAGED / file_name(now["device"]))
    return [*mine, *(row for row in packaged if all(row.get(key) == value for key, value in kind.items()))]


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none, and a line in the log, where it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"its format is {content['format']!r} version {content['version']!r}")
        rows = content["rows"]
        if not all(isinstance(row["variant"], str) and isinstance(row["against"], str | None) for row in rows):
            raise ValueError("a row is damaged")
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.once(f"self-checks in {path} are not used: {error!r}", logging.WARNING)
        return []


def _remember(variant: str, why: str | None) -> None:
    now = facts()
    checked = datetime.now(timezone.utc).isoformat(timespec="seconds")
    new = {"variant": variant, "against": why, **now, "checked": checked}
    try:
        path = user_file()
        others = [row for row in _read(path) if any(row.get(k) != new[k] for k in ("variant", *now))]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "version": VERSION, "rows": [*others, new]}
        write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())
    except (OSError, RuntimeError) as error:
        log.once(f"the self-check of {variant} stays in this process: {error}", logging.WARNING)
