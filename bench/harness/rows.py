"""Rows: one line of JSON for what one engine did with one form of one case. The only format on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bench.harness.stats import Summary, summarize

SCHEMA = 1

Status = Literal["ok", "failed", "missing", "died"]
"""``ok`` checked and measured; ``failed`` wrong values, so no time; ``missing`` the engine is not installed or cannot
run this; ``died`` its process ended or hung."""


class RowFormatError(ValueError):
    """A line is no row of this schema; the message names file and line."""


@dataclass
class Row:
    """What one engine did with one form of one case.

    Attributes:
        suite, case, kind: which case.
        engine, form, layout, detail: who computed what; ``detail`` is e.g. the backend that our op chose.
        status, reason: see ``Status``; the reason is empty when ok.
        problem: shapes and flags in words and numbers.
        samples: seconds a call, one a round; each is the median over the calls of that round. Empty unless ok.
        calls: calls a sample.
        disturbed: samples during which the core did not have its full speed (see ``quiet``).
        error: of the correctness gate: ``worst`` (largest share of the allowed error, must be ≤ 1) and its parts.
        work: ``flops``, ``bytes`` and ``roofline_s`` of this form on this machine.
        memory: of ``memory`` cases: bytes.
        parts: of ``network`` cases: the layers, as ``[case, count, converted]``.
        context: see ``machine.context``.
        time: when the row was finished, UTC.
    """

    suite: str
    case: str
    kind: str
    engine: str
    form: str
    layout: str
    status: Status
    detail: str = ""
    reason: str = ""
    problem: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    calls: int = 0
    disturbed: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    parts: list[list[Any]] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    time: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows of different runs comparable."""
        return (self.suite, self.case, self.engine, self.form, self.layout, self.context.get("threads"))

    @property
    def seconds(self) -> Summary | None:
        """Summary of the samples; None where there is no time."""
        return summarize(self.samples) if self.samples else None

    @property
    def roofline_share(self) -> float | None:
        """Roofline time over measured time, 1 = as fast as the work model allows."""
        bound = self.work.get("roofline_s")
        return bound / summarize(self.samples).median if bound and self.samples else None

    def to_json(self) -> str:
        """One line; the summary is written beside the samples for readers that are not this program."""
        data = {"schema": SCHEMA, **asdict(self)}
        if self.samples:
            data["seconds"] = asdict(summarize(self.samples))
        return json.dumps(data, ensure_ascii=False)


def describe(problem: Any) -> dict[str, Any]:
    """A problem as JSON: its fields, dtype by name, and its readable form."""
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(problem).items()}
    data["dtype"] = str(problem.dtype).removeprefix("torch.")
    return {**data, "text": str(problem)}


_NAMES = {f.name for f in fields(Row)}
_REQUIRED = ("suite", "case", "kind", "engine", "form", "layout", "status")


def parse(line: str, where: str = "row") -> Row:
    """A row from its JSON.

    Raises:
        RowFormatError: not JSON, another schema, or a field missing.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowFormatError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise RowFormatError(f"{where}: needs schema {SCHEMA}, got {found}; measure again with this version")
    lacking = [name for name in _REQUIRED if name not in data]
    if lacking:
        raise RowFormatError(f"{where}: lacks {', '.join(lacking)}")
    return Row(**{name: value for name, value in data.items() if name in _NAMES})


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of some files, in order; a later row replaces an earlier one of the same key on the same processor."""
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                row = parse(line, f"{path}:{number}")
                device = row.context.get("device", {})
                key = (device.get("cpu"), device.get("family"), *row.key)
                found.pop(key, None)
                found[key] = row
    return list(found.values())


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, which is made with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)
