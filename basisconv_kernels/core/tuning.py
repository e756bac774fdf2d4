"""Tables of measured times: read, judged and written. docs/dispatch.md describes the files and the rule.

A table belongs to one device, a processor or a GPU, and one pair of versions. Two are read, once a process: the one
that the package carries for this device, if any, and the user's own, written by ``basisconv tune`` or on first use. A
file that is broken or of something else is not used, and one line in the log says why.

The rule: a backend is *slower* than plain PyTorch (the backend ``reference``) for weights and a geometry if its lower
quartile lies above the upper quartile of plain PyTorch at any batch and map size that was measured, while the machine
was calm: on a processor with as many threads as now, on a GPU in a captured graph or in eager calls. Automatic choice
passes over it. A forward pass and a training step, forward and backward, are judged each by its own entries.
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

FORWARD, TRAINING = "forward", "training"  # what an entry timed, its "step"; FORWARD where it says nothing
WAYS = ("graph", "eager")  # how calls followed each other on a GPU, its "way"

_measured_here: dict[str, list[dict[str, Any]]] = {}  # by device: on first use, or where the file cannot be written


class _Unusable(ValueError):
    """Why a file is not used."""


@dataclass(frozen=True)
class Table:
    """One file: its entries, or why they are not used."""

    path: Path
    entries: tuple[dict[str, Any], ...] = ()
    unused: str | None = None


def described(kind: str = "cpu") -> dict[str, str] | None:
    """What a table says of the device that it belongs to; None where this machine has none of the kind.

    Args:
        kind (str): ``"cpu"`` or ``"cuda"``, as in ``problem.device``.
    """
    if kind == "cpu":
        return _processor()
    found = machine.cuda_device() if kind == "cuda" else None
    return None if found is None else {"kind": "cuda", **found}


def _processor() -> dict[str, str]:
    return {"kind": "cpu", "cpu": machine.cpu_name(), "isa": machine.isa()}


def file_name(device: dict[str, str] | None = None) -> str:
    """``intel-xeon-...-avx512.json``, ``nvidia-h200-9.0.json``: of what ``described`` gives, or this processor."""
    device = device or _processor()
    name, variant = ("cpu", "isa") if device["kind"] == "cpu" else ("name", "capability")
    words = re.findall(r"[a-z0-9.]+", device[name].lower())
    return f"{'-'.join(words) or 'unknown'}-{device[variant]}.json"


def user_file(kind: str = "cpu") -> Path:
    """The user's table for this processor or GPU.

    Raises:
        RuntimeError: there is no folder for it, see ``env.cache_folder``; or no device of the kind.
    """
    device = described(kind)
    if device is None:
        raise RuntimeError(f"this machine has no device of the kind {kind!r}")
    return env.cache_folder() / "tuned" / file_name(device)


def head(device: dict[str, str] | None = None, torch_version: str = torch.__version__) -> dict[str, Any]:
    """What a table of a device, or of this processor, states; one that states anything else is not for this process."""
    device = device or _processor()
    packages = {"basisconv_kernels": __version__, "torch": _release(torch_version)}
    return {"format": FORMAT, "version": VERSION, "device": device, "packages": packages}


def _release(version: str) -> str:
    """``2.13.0+cpu`` → ``2.13``."""
    return ".".join(version.split("+")[0].split(".")[:2])


# --- reading ----------------------------------------------------------------------------------------------------------


def tables(kind: str = "cpu") -> list[Table]:
    """The files that exist for this processor or GPU, the package's first."""
    device = described(kind)
    if device is None:
        return []
    paths = [PACKAGED / file_name(device)]
    try:
        paths.append(user_file(kind))
    except RuntimeError as error:
        log.once(f"no tuned table of the user: {error}", logging.WARNING)
    return [table for table in (read(path, device) for path in paths) if table is not None]


def forget() -> None:
    """Read the files again, and drop what was measured on first use; choices already made for a call stay."""
    _measured_here.clear()
    _read_again()


def _read_again() -> None:
    _read.cache_clear()
    _index.cache_clear()
    _read_for_gpus.cache_clear()


def read(path: Path, device: dict[str, str]) -> Table | None:
    """The table of a device in a file, read once a process; None where there is no file."""
    return _read(path, tuple(device.items()))


@functools.cache
def _read(path: Path, device: tuple[tuple[str, str], ...]) -> Table | None:
    try:
        expected = head(dict(device))
        content = json.loads(path.read_text("utf-8"))
        if path.parent == PACKAGED and expected["device"]["kind"] == "cuda" and isinstance(content, dict):
            expected["packages"] = _any_torch(expected["packages"], content)
        return Table(path, tuple(_checked(content, expected)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Unusable) else f"cannot be read: {error}"
    log.once(f"tuned table {path} is not used: {reason}; `basisconv tune` writes a new one", logging.WARNING)
    return Table(path, unused=reason)


def _any_torch(expected: dict[str, str], content: dict[str, Any]) -> dict[str, Any]:
    """The package's table of a GPU holds for every release of PyTorch: what takes its place is a model."""
    stated = content.get("packages")
    return {**expected, "torch": stated.get("torch") if isinstance(stated, dict) else None}


def _checked(content: Any, stated: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The entries of a file's content; every type that is used later is checked here."""
    if not isinstance(content, dict):
        raise _Unusable("it is no JSON object")
    for key, expected in stated.items():
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
        and entry.get("step", FORWARD) in (FORWARD, TRAINING)
        and entry.get("way") in (None, *WAYS)
        and _is_number(entry.get("disturbed"))
        and isinstance(entry.get("ms"), dict)
        and all(isinstance(s, dict) and all(_is_number(s.get(k)) for k in SPREAD) for s in entry["ms"].values())
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MOST_MS


# --- judging ----------------------------------------------------------------------------------------------------------


def entries_for(op: str, problem: Any, step: str = FORWARD) -> list[dict[str, Any]]:
    """What was measured for these weights and this geometry, at whatever batch and map size and in calm.

    Args:
        op (str): its name.
        problem: has ``to_json`` and ``device``; what it says of the fields ``problem.OPEN`` does not matter.
        step (str): ``FORWARD`` or ``TRAINING``.
    """
    device = described(problem.device)
    if device is None:
        return []
    kind = tuple(device.items())
    index = _index(kind, tuple(table.path for table in tables(problem.device)))
    found = index.get(_weights_key(op, problem.to_json()), ())
    threads = torch.get_num_threads()
    on_cpu = problem.device == "cpu"
    return [e for e in found if e.get("step", FORWARD) == step and (e["threads"] == threads or not on_cpu)]


def measured_on_gpus(op: str, step: str = FORWARD) -> list[dict[str, Any]]:
    """All calm entries of an op for the current GPU; where it has none, of the tables that the package has for others.

    What a model may be corrected by: how two kernels compare depends on the device less than each of them does.
    """
    device, found = described("cuda"), []
    if device is not None:
        index = _index(tuple(device.items()), tuple(table.path for table in tables("cuda")))
        found = [entry for entries in index.values() for entry in entries]
    if not any(entry["op"] == op and entry.get("step", FORWARD) == step for entry in found):
        found = [entry for table in _packaged_for_gpus() for entry in table.entries if entry["disturbed"] <= BUSY]
    return [entry for entry in found if entry["op"] == op and entry.get("step", FORWARD) == step]


def _packaged_for_gpus() -> tuple[Table, ...]:
    return _read_for_gpus(PACKAGED)


@functools.cache
def _read_for_gpus(folder: Path) -> tuple[Table, ...]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            device = json.loads(path.read_text("utf-8"))["device"]
            if device["kind"] == "cuda":
                found.append(read(path, {key: str(value) for key, value in device.items()}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # said when that device looks for its table
    return tuple(table for table in found if table is not None)


@functools.cache
def _index(device: tuple[tuple[str, str], ...], paths: tuple[Path, ...]) -> dict[str, list[dict[str, Any]]]:
    """Calm entries of these files and of this process by what the choice sees; later ones replace earlier ones."""
    held = [table for table in (_read(path, device) for path in paths) if table is not None]
    everything = [*(e for table in held for e in table.entries), *_measured_here.get(file_name(dict(device)), ())]
    calm = {_key(entry): entry for entry in everything if entry["disturbed"] <= BUSY}
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in calm.values():
        found.setdefault(_weights_key(entry["op"], entry["problem"]), []).append(entry)
    return found


def slower(op: str, problem: Any, step: str = FORWARD, ways: tuple[str, ...] = WAYS) -> dict[str, str]:
    """{backend: by how much, in words} of those that the tables say are slower than plain PyTorch; see the rule above.

    Args:
        op, problem, step: as for ``entries_for``.
        ways: in which calls follow each other on a GPU; a backend must be slower in one of them.
    """
    worst: dict[str, tuple[float, str]] = {}
    for entry in entries_for(op, problem, step):
        if entry.get("way") not in (None, *ways):
            continue
        for backend in slower_in(entry):
            ours, plain = (entry["ms"][name]["median"] for name in (backend, PLAIN))
            words = f"measured slower than plain PyTorch, {ours:.3f} ms against {plain:.3f} ms ({circumstances(entry)})"
            worst[backend] = max(worst.get(backend, (0.0, "")), (ours / plain if plain else math.inf, words))
    return {backend: words for backend, (_, words) in worst.items()}


def circumstances(entry: dict[str, Any]) -> str:
    """``N1 @6×7, 2 threads``; ``N32 @7×7, in a graph``: at what size and how an entry was measured."""
    p = entry["problem"]
    words = {None: f"{entry['threads']} threads", "graph": "in a graph", "eager": "eager"}[entry.get("way")]
    training = ", training" if entry.get("step", FORWARD) == TRAINING else ""
    return f"N{p.get('N')} @{p.get('H')}×{p.get('W')}, {words}{training}"


def slower_in(entry: dict[str, Any]) -> list[str]:
    """The backends that are slower than plain PyTorch in one entry: their quartiles lie above its own."""
    plain = entry["ms"].get(PLAIN)
    return [name for name, spread in entry["ms"].items() if plain and name != PLAIN and spread["q1"] > plain["q3"]]


def _weights_key(op: str, problem: dict[str, Any]) -> str:
    """What the choice sees of a problem: everything that holds for all batch and map sizes."""
    return json.dumps([op, {name: value for name, value in problem.items() if name not in OPEN}], sort_keys=True)


def _key(entry: dict[str, Any]) -> str:
    circumstance = [entry["threads"], entry.get("step", FORWARD), entry.get("way")]
    return json.dumps([entry["op"], circumstance, entry["problem"]], sort_keys=True)


# --- writing ----------------------------------------------------------------------------------------------------------


def remember(entries: list[dict[str, Any]], kind: str = "cpu") -> None:
    """Use entries of the current device in this process from now on, and add them to the user's file if possible."""
    device = described(kind)
    if device is None:
        raise RuntimeError(f"this machine has no device of the kind {kind!r}")
    _measured_here.setdefault(file_name(device), []).extend(entries)
    _read_again()
    try:
        write(entries, user_file(kind), device)
    except (OSError, RuntimeError) as error:
        log.once(f"measured times stay in this process: {error}", logging.WARNING)


def write(entries: list[dict[str, Any]], path: Path, device: dict[str, str] | None = None) -> int:
    """Add entries to a file, in place of those of equal problems; a file that is not for this process is replaced.

    Args:
        entries: measured on one device.
        path: of the file.
        device: what ``described`` says of that device; None for this processor.

    Returns:
        int: how many entries the file holds then.

    Raises:
        OSError: it could not be written; an old file is as it was.
    """
    device = device or _processor()
    _read_again()
    old = read(path, device)
    merged = {_key(entry): entry for entry in [*(old.entries if old else ()), *entries]}
    measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
    table = {**head(device), "measured": measured, "entries": list(merged.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(table, indent=1)}\n".encode())
    _read_again()
    return len(merged)
