"""``python -m bench.gpu keep``: rows of the GPU commands become files of the repository, and those become documents.

``bench/results/<device>/bench.json``, ``probe.json`` and ``check.json`` hold the newest row of every key, one a line,
without times of day. The table by which automatic choice judges on such a device (``core.tuning``) is made of the
first.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from basisconv_kernels.core import timing_cuda, tuning
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.core.timing import Spread
from basisconv_kernels.ops.tucker_conv2d_model import ONE_PASS
from bench.gpu import facts
from bench.gpu.journal import FINAL, PASSED, STARTED, WRONG

RESULTS = facts.ROOT / "bench" / "results"
FORMAT = "basisconv-gpu-rows"
KINDS = ("bench", "probe", "check")
UNFINISHED = "unfinished"
# The engines of the bench by the backends whose times they are.
BACKENDS = {"two_step": tuning.PLAIN, "cuda": "cuda", ONE_PASS: ONE_PASS, "triton": "triton"}
WAYS = {"graph": "graph_cold", "eager": "eager"}
# How names of layers begin that are neither basis convolutions nor chains.
BINARY, REAL_AND_BITS = ("binary_",), ("ternary_", "stacked_")


# --- taking rows ------------------------------------------------------------------------------------------------------


def journals(source: Path) -> Iterator[tuple[str, bytes]]:
    """(``"bench"``, content) and alike, of an archive of a run, of its folder, or of one ``*.jsonl``.

    Raises:
        ValueError: it is none of them.
    """
    if source.is_dir():
        found = [(path.name, path.read_bytes()) for path in sorted(source.rglob("*.jsonl"))]
    elif source.suffix == ".jsonl":
        found = [(source.name, source.read_bytes())]
    else:
        try:
            with tarfile.open(source, "r:gz") as packed:
                members = [m for m in packed.getmembers() if m.isfile() and m.name.endswith(".jsonl")]
                found = [(Path(m.name).name, (packed.extractfile(m) or io.BytesIO()).read()) for m in members]
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{source} is no archive, folder or journal of a run: {error}") from None
    for name, content in found:
        if (kind := name.split(".")[0]) in KINDS:
            yield kind, content


def newest(sources: Iterable[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind: {key: its newest line}}; a step that began and did not end later is ``UNFINISHED``."""
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for source in sources:
        for kind, content in journals(source):
            for text in content.decode("utf-8", "replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the last one of a run that was killed
                if not isinstance(line, dict) or line.get("status") not in (STARTED, *FINAL):
                    continue
                before = found[kind].get(line["key"])
                if before is None or before["at"] <= line["at"]:
                    found[kind][line["key"]] = line
    return found


def row(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a line: no time of day, and of a reason its first line."""
    status = UNFINISHED if line["status"] == STARTED else line["status"]
    kept = {"key": line["key"], "status": status, "sources": line.get("context", {}).get("sources")}
    note = str(line.get("note") or "").splitlines()[:1]
    return {**kept, **({"note": note[0][:300]} if note and note[0] else {}), **(line.get("data") or {})}


def keep(sources: Sequence[Path], results: Path = RESULTS) -> list[Path]:
    """Write the rows of some runs under ``results``; the files.

    A row takes the place of the one that is there of the same key, of tests that of the same file and backend. Others
    stay, unless they were measured with other versions of the software.

    Raises:
        ValueError: a source that is none, or rows of several devices, or of none.
    """
    written = []
    for kind, lines in newest(sources).items():
        contexts = [line["context"] for line in lines.values() if line.get("context")]
        if not contexts:
            continue
        devices = {json.dumps(context["device"], sort_keys=True) for context in contexts}
        if len({context["device"]["name"] for context in contexts}) != 1:
            raise ValueError(f"the rows of {kind} are of several devices: {', '.join(sorted(devices))}")
        latest = max((line for line in lines.values() if line.get("context")), key=lambda line: line["at"])["context"]
        head = {"format": FORMAT, "kind": kind, "device": latest["device"], "versions": latest["versions"],
                "sources": latest["sources"]}  # fmt: skip
        path = results / folder_of(latest["device"]) / f"{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row(line) for line in lines.values()]
        path.write_text(text_of(head, beside_others(path, head, counted(rows) if kind == "check" else rows)), "utf-8")
        written.append(path)
    if not written:
        raise ValueError("no rows in " + ", ".join(map(str, sources)))
    return written


def beside_others(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with those of a file that they do not replace, in the order of the file."""
    there = read(path) if path.exists() else {}
    if there.get("versions") != head["versions"]:
        return list(rows)
    return [row for some in (_by_identity(there["rows"]) | _by_identity(rows)).values() for row in some]


def _by_identity(rows: Sequence[Mapping[str, Any]]) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for each in rows:
        found.setdefault(_identity(each), []).append(each)
    return found


def _identity(row: Mapping[str, Any]) -> Any:
    return row["key"] if "key" in row else (row["part"], row["backend"])


def counted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of thousands of tests: how many ended how, by file, backend and sources, and each reason of a failure once."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for each in rows:
        file, backend = part_of(each["key"])
        sources = str(each["sources"])
        part = found.setdefault((file, backend, sources), {"part": file, "backend": backend, "sources": sources,
                                                           "counts": {}, "wrong": {}})  # fmt: skip
        part["counts"][each["status"]] = part["counts"].get(each["status"], 0) + 1
        if each["status"] in WRONG:
            test = each["key"].rpartition("::")[2]
            first = part["wrong"].setdefault(reason(each.get("note", "")), {"first": test, "times": 0})
            first["times"] += 1
    return list(found.values())


def reason(note: str) -> str:
    """What went wrong, without the case, indices and lines, so that equal failures read alike."""
    return re.sub(r"\s*\[[^]]*\]?|^basisconv_kernels\.testing\.compare\.|(^\w+: )?\w+, csrc/\S+, ", "", note)[:160]


def part_of(key: str) -> tuple[str, str]:
    """File and backend of a test by its name, of another step its first word and nothing."""
    file, _, test = key.partition("::")
    if not test:
        return key.split()[0], ""
    words = re.findall(r"[a-z]+", test)
    backend = next((name for name in ("reference", "triton", "cuda") if name in words), "")
    return file, ONE_PASS if ONE_PASS in test else backend


def text_of(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with one row a line."""
    lines = ",\n".join(" " + json.dumps(row, ensure_ascii=False) for row in rows)
    opened = json.dumps(head, ensure_ascii=False)[:-1]
    return f'{opened}, "rows": [\n{lines}\n]}}\n'


def folder_of(device: Mapping[str, Any]) -> str:
    """``nvidia-h200``."""
    return str(device["name"]).lower().replace(" ", "-")


def read(path: Path) -> dict[str, Any]:
    """A file that ``keep`` wrote.

    Raises:
        ValueError: it is another one.
    """
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no rows of a GPU")
    return content


# --- the table of automatic choice ------------------------------------------------------------------------------------


def tuned_entries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of a tuned table out of rows of the bench: two library kernels against ours, layers and training steps.

    A row that failed has no time; without one of the library kernels there is no entry.
    """
    times: dict[tuple[str, str, str], dict[str, Spread]] = {}
    problems: dict[tuple[str, str, str], Conv2dProblem] = {}
    for found in content["rows"]:
        backend = BACKENDS.get(found.get("engine", ""))
        if found["status"] != PASSED or "layer" not in found or backend is None or of_bits(found):
            continue
        frozen = found.get("frozen")
        step = tuning.FORWARD if frozen is None else tuning.TRAINING
        if frozen:
            continue  # the choice does not see which weights train: the step of all of them stands for both
        for way, field in WAYS.items():
            if field in found:
                key = (found["layer"], step, way)
                problems[key] = problem_of(found["layer"])
                microseconds = {name: found[field][name] for name in ("median", "q1", "q3", "least")}
                in_ms = {name: float(f"{us / 1e3:.6g}") for name, us in microseconds.items()}
                times.setdefault(key, {})[backend] = Spread(**in_ms, samples=found[field]["samples"])
    return [
        timing_cuda.entry(_op(problems[key]), problems[key].to_json(), *key[1:], spreads)
        for key, spreads in times.items()
        if tuning.PLAIN in spreads and len(spreads) > 1
    ]


def of_bits(row: Mapping[str, Any]) -> bool:
    """Whether a row is about filters of bits, which have no table to choose by."""
    return str(row.get("layer", "")).startswith((*BINARY, *REAL_AND_BITS))


def _op(problem: Conv2dProblem) -> str:
    return "tucker_conv2d" if isinstance(problem, TuckerConv2dProblem) else "basis_conv2d"


def problem_of(layer: str) -> Conv2dProblem:
    """The problem of a layer by its name.

    Raises:
        KeyError: the bench has no such layer.
    """
    from bench.gpu import chains, layers

    known = {each.name: each.problem for part in (layers, chains) for each, _ in part.by_priority()}
    return replace(known[layer], device="cuda")


def tuned_text(content: Mapping[str, Any]) -> str:
    """The table of a device, as ``core.tuning`` reads it."""
    about = content["device"]
    device = {"kind": "cuda", "name": about["name"], "capability": about["capability"]}
    head = tuning.head(device, content["versions"]["torch"])
    lines = ",\n".join(" " + json.dumps(entry) for entry in tuned_entries(content))
    return f'{json.dumps(head)[:-1]}, "entries": [\n{lines}\n]}}\n'


def tuned_path(content: Mapping[str, Any], folder: Path = tuning.PACKAGED) -> Path:
    """Where the package has it."""
    about = content["device"]
    return folder / tuning.file_name({"kind": "cuda", "name": about["name"], "capability": about["capability"]})
