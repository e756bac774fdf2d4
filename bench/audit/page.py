"""Rows of the audit as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.audit.methods import CONFIGS
from bench.audit.networks import NAMES
from bench.harness.paths import ROOT

ROWS = Path(__file__).with_name("rows.jsonl")
PAGE = ROOT / "docs" / "audit.md"
START, END = "<!-- rows -->", "<!-- end of rows -->"
MB = 1e6


def read(path: Path) -> list[dict[str, Any]]:
    """The newest row of every check."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list({tuple(row["key"]): row for row in map(json.loads, lines)}.values())


def text(rows: Iterable[dict[str, Any]]) -> str:
    """All tables, the reasons of the layers that were kept, what did not pass, and where it ran."""
    by_key = {tuple(row["key"]): row for row in rows}
    networks = [name for name in NAMES if any(key[1] == name for key in by_key)]
    parts = [_full_rank(by_key, networks), _quarter(by_key, networks), _methods(by_key, networks), _reasons(by_key)]
    other = [f"- {' '.join(key)}: {row['status']}, {row['note']}" for key, row in by_key.items() if "note" in row]
    places = Counter(", ".join(f"{name} {value}" for name, value in row["about"].items()) for row in by_key.values())
    parts += [
        ["Not passed:", "", *(other or ["- none"])],
        [f"- {n} checks with {place}" for place, n in places.items()],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _data(by_key: dict[Any, Any], *key: str) -> Any:
    return by_key.get(key, {}).get("data")


def _full_rank(by_key: dict[Any, Any], networks: list[str]) -> list[str]:
    lines = [
        "| network | converted | float32: off | the dense one | layers | bfloat16: off | the dense one | layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in networks:
        if data := _data(by_key, "full rank", name):
            cells = [name, f"{data['changed']} of {data['convolutions']}"]
            for dtype in ("torch.float32", "torch.bfloat16"):
                found = data[dtype]
                cells += [f"{found['off']:.1e}", f"{found['dense_off']:.1e}", f"{found['layer']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _quarter(by_key: dict[Any, Any], networks: list[str]) -> list[str]:
    lines = [
        "| network | dense, MB | file, MB | times smaller | more than the parameters | header alone |",
        "|---|---|---|---|---|---|",
    ]
    for name in networks:
        if data := _data(by_key, "quarter", name):
            more, header = data["bytes"] / data["formula"] - 1, data["header"] / data["formula"]
            sizes = f"{data['dense'] / MB:.2f} | {data['bytes'] / MB:.2f} | {data['dense'] / data['bytes']:.2f}"
            lines.append(f"| {name} | {sizes} | {more:.2%} | {header:.2%} |")
    return lines


def _methods(by_key: dict[Any, Any], networks: list[str]) -> list[str]:
    used = [method for method in CONFIGS if any(key[-1] == method for key in by_key)]
    lines = [f"| network | {' | '.join(used)} |", "|---" * (len(used) + 1) + "|"]
    for name in networks:
        cells = [_cell(by_key.get(("method", name, method))) for method in used]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "data" not in row:
        return "" if row is None else row["status"]
    found = f"{row['data']['changed']} of {row['data']['convolutions']}"
    return f"{found}, {row['data']['off']:.0e}" if row["data"]["changed"] else found


def _reasons(by_key: dict[Any, Any]) -> list[str]:
    kept: Counter[str] = Counter()
    for row in by_key.values():
        kept.update(row.get("data", {}).get("kept", {}))
    return ["Reasons of the layers that were kept, and how often they were given:", ""] + [
        f"- {reason}: {count}" for reason, count in kept.most_common()
    ]
