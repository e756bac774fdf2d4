"""The one file that a run leaves: its folder, packed; and taking up an earlier one, or the rows that are kept of it."""

from __future__ import annotations

import json
import os
import tarfile
import time
from pathlib import Path

from bench.gpu import facts, keep
from bench.gpu.journal import PASSED, Journal
from bench.gpu.report import BASELINES

EVERY = 20.0  # seconds between two packings while a run goes on
LARGEST = 8 * 2**20  # bytes of one file that is packed; longer logs are cut at their head


class Archive:
    """``<out>/<name>.tar.gz`` of a folder. It is replaced as a whole, so a run that is ended keeps the one before."""

    def __init__(self, folder: Path, out: Path, name: str):
        self.folder, self.path = folder, out / f"{name}.tar.gz"
        self._packed = 0.0

    def now_and_then(self) -> None:
        """Pack it if that was not done for a while."""
        if time.time() - self._packed >= EVERY:
            self.pack()

    def pack(self) -> Path:
        """Pack it now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with tarfile.open(beside, "w:gz") as packed:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    self._add(packed, path)
        beside.replace(self.path)
        self._packed = time.time()
        return self.path

    def _add(self, packed: tarfile.TarFile, path: Path) -> None:
        about = tarfile.TarInfo(path.relative_to(self.folder).as_posix())
        with path.open("rb") as file:
            size = path.stat().st_size  # a log may grow meanwhile
            file.seek(max(0, size - LARGEST))
            about.size, about.mtime = min(size, LARGEST), int(path.stat().st_mtime)
            packed.addfile(about, file)


def take_up(archive: Path, folder: Path) -> int:
    """Put the journals of an earlier archive into the folder of a run, before what is there; how many lines came.

    A folder like ``bench/results/nvidia-h200`` does too: what passed there, and does not hang on our sources or was
    measured with these very ones, is not measured again by the same versions on such a device.

    Raises:
        ValueError: it is no archive of such a run.
    """
    if archive.is_dir():
        return _take_up_kept(archive / f"{folder.name}.json", Journal(folder / f"{folder.name}.jsonl"))
    lines = 0
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed.getmembers():
                if not member.isfile() or not member.name.endswith(".jsonl") or "/" in member.name:
                    continue
                source = packed.extractfile(member)
                earlier = source.read() if source else b""
                target = folder / member.name
                now = target.read_bytes() if target.exists() else b""
                if earlier.strip() and not now.startswith(earlier):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(earlier.rstrip(b"\n") + b"\n" + now)
                    lines += len(list(Journal(target).lines())) - now.count(b"\n")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{archive} is no archive of an earlier run: {error}") from None
    return lines


def _take_up_kept(path: Path, journal: Journal) -> int:
    try:
        content = keep.read(path)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no rows of a GPU: {error}") from None
    known = journal.done()
    taken = 0
    for row in content["rows"]:
        if row["status"] != PASSED or "engine" not in row:
            continue
        about = {name: content[name] for name in ("device", "versions")} | {"sources": row["sources"]}
        stamp = facts.stamp(about, ours=row["engine"] not in BASELINES)
        if (row["key"], stamp) in known:
            continue
        data = {name: value for name, value in row.items() if name not in ("key", "status", "sources", "note")}
        line = {"key": row["key"], "status": PASSED, "stamp": stamp, "note": row.get("note", ""), "data": data}
        journal.write({**line, "at": 0.0, "context": about})
        taken += 1
    return taken
