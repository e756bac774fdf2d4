"""Tables of measured times: read, judged and written. docs/dispatch.md describes the files and the rule.

A table belongs to one processor and one pair of versions. Two are read, once a process: the one that the package
carries for this processor, if any, and the user's own, written by ``basisconv tune`` or on first use. A file that is
broken or of something else is not used, and one line in the log says why.

The rule: a backend is *slower* than plain PyTorch (the backend ``reference``) for weights and a geometry if its lower
quartile lies above the upper quartile of plain PyTorch at any batch and map size that was measured, with as many
threads as now, while the machine was calm. Automatic choice passes over it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from basisconv_kernels.core import env, log, machine
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.problem import OPEN
from basisconv_kernels.core.version import __version__

FORMAT, VERSION = "basisconv-tuned", 2
PLAIN = "reference"  # the backend that is plain PyTorch
SPREAD = ("median", "q1", "q3")  # of a backend's times in an entry: milliseconds a call
MOST_MS = 1e9  # no call takes longer
BUSY = 0.25  # an entry with a larger share of disturbed samples is not believed
PACKAGED = Path(__file__).resolve().parents[1] / "assets" / "tuned"

_measured_here: list[dict[str, Any]] = []  # on first use in this process; also where the file cannot be written


class _Unusable(ValueError):
    """Why a file is not used."""


@dataclass(frozen=True)
class Table:
    """One file: its entries, or why they are not used."""

    path: Path
    entries: tuple[dict[str, Any], ...] = ()
    unused: str | None = None


def file_name() -> str:
    """``intel-xeon-...-avx512.json``: of this processor and the instruction set that is in use."""
    words = re.findall(r"[a-z0-9.]+", machine.cpu_name().lower())
    return f"{'-'.join(words) or 'unknown-cpu'}-{machine.isa()}.json"


def user_file() -> Path:
    """The user's table for this processor.

    Raises:
        RuntimeError: there is no folder for it; see ``env.cache_folder``.
    """
    return env.cache_folder() / "tuned" / file_name()


def head() -> dict[str, Any]:
    """What a table states about itself; one that states anything else is not for this process."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": {"kind": "cpu", "cpu": machine.cpu_name(), "isa": machine.isa()},
        "packages": {"basisconv_kernels": __version__, "torch": _release(torch.__version__)},
    }


def _release(version: str) -> str:
    """``2.13.0+cpu`` → ``2.13``."""
    return ".".join(version.split("+")[0].split(".")[:2])


# --- reading ----------------------------------------------------------------------------------------------------------


def tables() -> list[Table]:
    """The files that exist for this processor, the package's first."""
    paths = [PACKAGED / file_name()]
    try:
        paths.append(user_file())
    except RuntimeError as error:
        log.once(f"no tuned table of the user: {error}", logging.WARNING)
    return [table for table in map(_read, paths) if table is not None]


def forget() -> None:
    """Read the files again, and drop what was measured on first use; choices already made for a call stay."""
    _measured_here.clear()
    _read_again()


def _read_again() -> None:
    _read.cache_clear()
    _index.cache_clear()


@functools.cache
def _read(path: Path) -> Table | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        return Table(path, tuple(_checked(content)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Unusable) else f"cannot be read: {error}"
    log.once(f"tuned table {path} is not used: {reason}; `basisconv tune` writes a new one", logging.WARNING)
    return Table(path, unused=reason)


def _checked(content: Any) -> Iterable[dict[str, Any]]:
    """The entries of a file's content; every type that is used later is checked here."""
    if not isinstance(content, dict):
        raise _Unusable("it is no JSON object")
    for key, expected in head().items():
        if content.get(key) != expected:
            raise _Unusable(f"its {key} is {str(content.get(key))[:200]}, here it is {expected}")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise _Unusable("it has no list of entries")
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            raise _Unusable(f"entry {number} is damaged")
    return entries


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("op"), str)
        and isinstance(entry.get("problem"), dict)
        and type(entry.get("threads")) is int
        and _is_number(entry.get("disturbed"))
        and isinstance(entry.get("ms"), dict)
        and all(isinstance(s, dict) and all(_is_number(s.get(k)) for k in SPREAD) for s in entry["ms"].values())
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MOST_MS


# --- judging ----------------------------------------------------------------------------------------------------------


def entries_for(op: str, problem: Any) -> list[dict[str, Any]]:
    """What was measured for these weights and this geometry, at whatever batch and map size and in calm.

    Args:
        op (str): its name.
        problem: has ``to_json`` and ``device``; what it says of the fields ``problem.OPEN`` does not matter.
    """
    if problem.device != "cpu":
        return []
    threads = torch.get_num_threads()
    found = _index(tuple(table.path for table in tables())).get(_weights_key(op, problem.to_json()), ())
    return [entry for entry in found if entry["threads"] == threads]


@functools.cache
def _index(paths: tuple[Path, ...]) -> dict[str, list[dict[str, Any]]]:
    """Calm entries of these files and of this process by what the choice sees; later ones replace earlier ones."""
    read = [table for table in map(_read, paths) if table is not None]
    everything = [*(entry for table in read for entry in table.entries), *_measured_here]
    calm = {_key(entry): entry for entry in everything if entry["disturbed"] <= BUSY}
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in calm.values():
        found.setdefault(_weights_key(entry["op"], entry["problem"]), []).append(entry)
    return found


def slower(op: str, problem: Any) -> dict[str, str]:
    """{backend: by how much, in words} of those that the tables say are slower than plain PyTorch; see the rule above.

    Args:
        op, problem: as for ``entries_for``.
    """
    worst: dict[str, tuple[float, str]] = {}
    for entry in entries_for(op, problem):
        for backend in slower_in(entry):
            ours, plain = (entry["ms"][name]["median"] for name in (backend, PLAIN))
            p = entry["problem"]
            size = f"N{p.get('N')} @{p.get('H')}×{p.get('W')}, {entry['threads']} threads"
            words = f"measured slower than plain PyTorch, {ours:.3f} ms against {plain:.3f} ms ({size})"
            worst[backend] = max(worst.get(backend, (0.0, "")), (ours / plain if plain else math.inf, words))
    return {backend: words for backend, (_, words) in worst.items()}


def slower_in(entry: dict[str, Any]) -> list[str]:
    """The backends that are slower than plain PyTorch in one entry: their quartiles lie above its own."""
    plain = entry["ms"].get(PLAIN)
    return [name for name, spread in entry["ms"].items() if plain and name != PLAIN and spread["q1"] > plain["q3"]]


def _weights_key(op: str, problem: dict[str, Any]) -> str:
    """What the choice sees of a problem: everything that holds for all batch and map sizes."""
    return json.dumps([op, {name: value for name, value in problem.items() if name not in OPEN}], sort_keys=True)


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["op"], entry["threads"], entry["problem"]], sort_keys=True)


# --- writing ----------------------------------------------------------------------------------------------------------


def remember(entries: list[dict[str, Any]]) -> None:
    """Use entries in this process from now on, and add them to the user's file if it can be written."""
    _measured_here.extend(entries)
    _read_again()
    try:
        write(entries, user_file())
    except (OSError, RuntimeError) as error:
        log.once(f"measured times stay in this process: {error}", logging.WARNING)


def write(entries: list[dict[str, Any]], path: Path) -> int:
    """Add entries to a file, in place of those of equal problems; a file that is not for this process is replaced.

    Returns:
        int: how many entries the file holds then.

    Raises:
        OSError: it could not be written; an old file is as it was.
    """
    _read_again()
    old = _read(path)
    merged = {_key(entry): entry for entry in [*(old.entries if old else ()), *entries]}
    measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
    table = {**head(), "measured": measured, "entries": list(merged.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(table, indent=1)}\n".encode())
    _read_again()
    return len(merged)
