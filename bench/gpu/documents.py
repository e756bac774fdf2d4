"""What the documents say of a GPU, made of the rows that ``keep`` wrote; each block stands between marks of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basisconv_kernels.core import tuning
from basisconv_kernels.ops import tucker_conv2d_model as model
from bench.gpu import facts, keep
from bench.gpu.journal import PASSED, WRONG
from bench.gpu.report import subject

Content = Mapping[str, Any]
OURS = ("cuda", "triton")
BITS = ("packed_to_packed", "packed_to_bf16", "bf16_to_bf16")
MOST_REASONS = 2  # of failures, in a cell of a table
PLAIN = "two convolutions"

# Subject, what was proven without a GPU in two ways, and the parts of ``gpu-check`` that prove it on one.
PROVEN: tuple[tuple[str, str, str, Callable[[str, str], bool]], ...] = (
    (
        "Triton kernels",
        "float32, float16: forward, gradients, every row of the table",
        "every row, four architectures; gradients in five layouts",
        lambda part, backend: (
            not any(word in part for word in ("tucker", "bits"))
            and (backend == "triton" or part.startswith("tests/triton"))
        ),
    ),
    (
        "ternary, stacked and binary convolutions, `bitpack`, in Triton",
        "float32, float16: every case of the ops, drawn geometries",
        "every tile and form, sm_80 and sm_90",
        lambda part, _: part == "tests/gpu/test_triton_bits.py",
    ),
    (
        "`ternary_conv2d` and stacked filters of real activations on CUDA",
        "every template, in three orders of the threads",
        "sm_90a",
        lambda part, backend: part == "tests/gpu/test_ternary_kernels.py" or ("ternary" in part and backend == "cuda"),
    ),
    (
        "`tucker_conv2d` in Triton, one pass and two",
        "float32, float16: forward, gradients",
        "sm_80, sm_89, sm_90",
        lambda part, backend: "tucker" in part and backend == "triton",
    ),
    (
        "`tucker_conv2d` on the CUDA kernels",
        "its cases and gradients",
        "as the kernels",
        lambda part, backend: "tucker" in part and backend == "cuda",
    ),
    (
        "`tucker_conv2d` on CUDA in one pass",
        "every template, in three orders of the threads",
        "sm_80, sm_90",
        lambda part, backend: backend == model.ONE_PASS,
    ),
    (
        "CUDA kernels",
        "every template, in three orders of the threads",
        "sm_80, sm_90a",
        lambda part, backend: (
            "tucker" not in part
            and backend in ("cuda", "")
            and part.startswith(("tests/gpu/test_cuda", "tests/ops/test_basis"))
        ),
    ),
    (
        "`binary_conv2d`, `bitpack`, stacked filters of bits, on CUDA",
        "every template, in three orders of the threads",
        "sm_80, sm_90, sm_90a",
        lambda part, backend: (
            backend in ("cuda", "")
            and part.startswith(("tests/gpu/test_binary", "tests/ops/test_b", "tests/ops/test_stacked"))
            and not part.startswith("tests/ops/test_basis")
        ),
    ),
    ("wrappers", "by definition, with the same tests", "sm_90a", lambda part, _: part == "tests/gpu/test_wrappers.py"),
    (
        "plain PyTorch, the backend `reference`",
        "on processors, all dtypes",
        "–",
        lambda part, backend: backend == "reference",
    ),
)
LIBRARY = ("the native library", "see below", "what it needs of torch is in a list of what torch 2.11 has")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def device_line(content: Content) -> str:
    """**NVIDIA H200**, driver …"""
    versions, device = content["versions"], content["device"]
    cudnn = versions["cudnn"]
    named = f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return (
        f"**{device['name']}**, driver {device['driver']}, torch {versions['torch']}, {named}, "
        f"triton {versions['triton']}, sources {content['sources']}"
    )


# --- what was proven --------------------------------------------------------------------------------------------------


def proven(check: Content | None) -> str:
    """The table of what is proven where; of the GPU what the newest run of each test said, and for which sources."""
    head = ("", "interpreted or executed on a processor", "compiled, and the machine code read", "on a GPU")
    if check is None:
        return table(head, [*((name, *texts, "not yet") for name, *texts, _ in PROVEN), (*LIBRARY, "not yet")])
    rows = [(name, run, built, _cell(check, belongs)) for name, run, built, belongs in PROVEN]
    ran = sum(part["counts"].get(PASSED, 0) for part in check["rows"] if part["backend"] == "cuda")
    rows.append((*LIBRARY, f"loaded by torch {check['versions']['torch']}" if ran else "not yet"))
    rest = [r for r in check["rows"] if not any(belongs(r["part"], r["backend"]) for *_, belongs in PROVEN)]
    others = ", ".join(dict.fromkeys(f"`{Path(r['part']).name}`" for r in rest))
    rows += [(f"others: {others}", "", "", _cell({**check, "rows": rest}, lambda *_: True))] if rest else []
    return f"{table(head, rows)}\n\nThe last column: {device_line(check)}."


def _cell(check: Content, belongs: Callable[[str, str], bool]) -> str:
    now, before = Counter[str](), Counter[str]()
    wrong: dict[str, int] = {}
    for part in check["rows"]:
        if belongs(part["part"], part["backend"]):
            current = part["sources"] in (check["sources"], "None")
            (now if current else before).update(part["counts"])
            for reason, found in part["wrong"].items():
                wrong[reason] = wrong.get(reason, 0) + found["times"]
    texts = [_counts(now), f"before the last change: {_counts(before)}" if before else ""]
    texts += [f"wrong {times}×: {reason.replace('|', '/')}" for reason, times in list(wrong.items())[:MOST_REASONS]]
    if (more := sum(list(wrong.values())[MOST_REASONS:])) > 0:
        texts.append(f"wrong {more}× alike: `check.json`")
    return "; ".join(filter(None, texts)) or "not yet"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != PASSED, s)))


# --- how fast ---------------------------------------------------------------------------------------------------------


def by_subject(bench: Content, chosen: Callable[[Mapping[str, Any]], bool]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{subject: {engine: row}} of the rows that passed."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in bench["rows"]:
        if row["status"] == PASSED and "engine" in row and chosen(row):
            found.setdefault(subject(row), {})[row["engine"]] = row
    return found


def _us(rows: Mapping[str, Mapping[str, Any]], engine: str, bench: Content) -> str:
    row = rows.get(engine)
    if row is None:
        return "–"
    mark = "†" if engine in (*OURS, model.ONE_PASS, "auto") and row["sources"] != bench["sources"] else ""
    times = row.get("graph_cold")
    return f"{times['median']:.1f}{mark}" if times else "–"


def _times_faster(rows: Mapping[str, Mapping[str, Any]], engine: str) -> str:
    """In a graph, and eager; bold where it is slower."""
    texts = []
    for way in ("graph_cold", "eager"):
        ours, plain = rows.get(engine, {}).get(way), rows.get("two_step", {}).get(way)
        if ours and plain:
            ratio = plain["median"] / ours["median"]
            texts.append(f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}")
    return ", ".join(texts) or "–"


def _over_dense(rows: Mapping[str, Mapping[str, Any]], engine: str) -> str:
    """How many times faster than cuDNN's dense convolution in 16 bits, in the graph."""
    ours, dense = (rows.get(name, {}).get("graph_cold") for name in (engine, "dense"))
    return f"{dense['median'] / ours['median']:.2f}" if ours and dense else "–"


def choice(entries: Sequence[Mapping[str, Any]], problem: Mapping[str, Any], step: str) -> str:
    """What automatic choice takes by the table that these rows make: for weights, whatever batch and map size."""
    key = tuning._weights_key("", dict(problem))
    same = [e for e in entries if e["step"] == step and tuning._weights_key("", e["problem"]) == key]
    slower = {name for entry in same for name in tuning.slower_in(dict(entry))}
    known = {name for entry in same for name in entry["ms"]}
    if model.against_one_pass(same) is not None:
        slower.add(model.ONE_PASS)
    return next((name for name in (model.ONE_PASS, *OURS) if name in known - slower), PLAIN)


def is_chain(row: Mapping[str, Any]) -> bool:
    """Whether a row is about ``tucker_conv2d``."""
    return "layer" in row and re.search(r"_i\d+_q\d+$", row["layer"]) is not None


def _plain(row: Mapping[str, Any], training: bool) -> bool:
    return "layer" in row and ("frozen" in row) == training and not is_chain(row)


def chains(bench: Content, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of these rows, if there are any."""
    ours = ("cuda", model.ONE_PASS, "triton")
    rows = []
    for name, engines in by_subject(bench, is_chain).items():
        of = [e for e in entries if e["problem"] == keep.problem_of(name).to_json()]
        times = [text for engine in ours for text in (_us(engines, engine, bench), _times_faster(engines, engine))]
        plain = [_us(engines, engine, bench) for engine in ("two_step", "dense")]
        rows.append([name, *plain, *times, choice(entries, of[0]["problem"], tuning.FORWARD) if of else "–"])
    titles = [f"{engine}{more}" for engine in ("two passes", "one pass", "triton") for more in (", µs", ", × faster")]
    head = ["Tucker chain", "three convolutions, µs", "dense, µs", *titles, "automatic choice"]
    return [table(head, rows)] if rows else []


def layers(bench: Content) -> str:
    """Layers, training steps and networks: microseconds, how many times faster than two convolutions, the choice."""
    entries = keep.tuned_entries(bench)
    parts = []
    for title, training in (("layer", False), ("training step", True)):
        found = by_subject(bench, lambda row, training=training: _plain(row, training))
        shown = (*OURS, *(("auto",) if any("auto" in engines for engines in found.values()) else ()))
        rows = []
        for name, engines in found.items():
            if not set(OURS) & set(engines):
                continue
            layer = next(iter(engines.values()))["layer"]
            of = [e for e in entries if e["problem"] == keep.problem_of(layer).to_json()]
            step = tuning.TRAINING if training else tuning.FORWARD
            taken = choice([e for e in entries if of and e["op"] == of[0]["op"]], of[0]["problem"], step) if of else "–"
            dense = [] if training else [_us(engines, "dense", bench)]
            times = [text for engine in shown for text in (_us(engines, engine, bench), _times_faster(engines, engine))]
            rows.append([name, _us(engines, "two_step", bench), *dense, *times, taken])
        ours = [f"{engine}{more}" for engine in shown for more in (", µs", ", × faster")]
        head = [title, f"{PLAIN}, µs", *([] if training else ["dense, µs"]), *ours, "automatic choice"]
        parts += [table(head, rows)] if rows else []
    parts += chains(bench, entries)
    bits = by_subject(bench, lambda row: str(row.get("layer", "")).startswith("binary_"))
    if bits:
        rows = [
            [
                name,
                _us(found, "dense", bench),
                *(text for e in BITS for text in (_us(found, e, bench), _over_dense(found, e))),
            ]
            for name, found in bits.items()
        ]
        head = [
            "binary layer",
            "dense, µs",
            *(f"{e.replace('_', ' ')}{more}" for e in BITS for more in (", µs", ", × dense")),
        ]
        parts.append(table(head, rows))
    networks = by_subject(bench, lambda row: "network" in row)
    engines = ("dense", "two_step", "auto", *OURS)
    if networks:
        rows = [[name, *(_us(found, engine, bench) for engine in engines)] for name, found in networks.items()]
        parts.append(table(["network", *(f"{engine}, µs" for engine in engines)], rows))
    wrong = [row for row in bench["rows"] if row["status"] in WRONG]
    failed = Counter((keep.reason(row.get("note", "")), row["key"].rpartition(" ")[2]) for row in wrong)
    lines = [f"- `{engine}`, failed {times}×: {why}" for (why, engine), times in failed.items()]
    about = f"{device_line(bench)}."
    if any(r.get("engine") in OURS and r["sources"] != bench["sources"] for r in bench["rows"]):
        about += " † was measured before the last change of the sources."
    return "\n\n".join([about, *parts, *(["\n".join(lines)] if lines else [])])


def summary(bench: Content) -> str:
    """For the README: how the CUDA kernel does, and what automatic choice makes of it."""
    entries = keep.tuned_entries(bench)
    one = [r for r in by_subject(bench, lambda row: "layer" in row and "frozen" not in row).values() if "two_step" in r]
    pairs = {}
    for rows in one:
        if "cuda" in rows and "graph_cold" in rows["cuda"]:
            name = rows["cuda"]["layer"]
            ratio = rows["two_step"]["graph_cold"]["median"] / rows["cuda"]["graph_cold"]["median"]
            pairs[name] = (ratio, choice(entries, keep.problem_of(name).to_json(), tuning.FORWARD))
    if not pairs:
        return f"{device_line(bench)}: no layer was measured with the CUDA kernel."
    taken = [ratio for ratio, backend in pairs.values() if backend == "cuda"]
    ordered = sorted(ratio for ratio, _ in pairs.values())
    lines = [
        f"{device_line(bench)}; bfloat16, channels_last, in a CUDA graph.",
        f"On {len(pairs)} layers the CUDA kernel is {ordered[0]:.2f} to {ordered[-1]:.2f} times as fast as two "
        "convolutions of cuDNN.",
    ]
    if taken:
        span = f"{min(taken):.2f} to {max(taken):.2f} times as fast"
        lines.append(f"Automatic choice takes it for {len(taken)} of them, {span}; for the others what is not slower.")
    return "\n".join([*lines, "All rows: [a day with a GPU](docs/gpu.md)."])


# --- rates and costs --------------------------------------------------------------------------------------------------


def probe(content: Content) -> str:
    """The constants that kernels are designed by."""
    data = {row["key"]: row for row in content["rows"] if row["status"] == PASSED}
    found: list[tuple[str, str]] = []
    if rates := data.get("rates"):
        side = rates["side"]
        clock, copied = rates["sm_clock_mhz"], rates["copied_bytes"] / 2**30
        found.append((f"bfloat16 product of {side}×{side}", f"{rates['tflops']:.0f} TFLOP/s at {clock} MHz"))
        found.append((f"copy of {copied:.0f} GiB, read and written", f"{rates['copy_tb_per_s']:.2f} TB/s"))
    if cache := data.get("cache"):
        sizes = [key for key in cache if key.startswith("tb_per_s_")]
        texts = [f"{key.split('_')[3]} MB {cache[key]:.1f}" for key in sizes]
        what = f"reads of a set again and again, TB/s; cache {cache['l2_bytes'] / 2**20:.0f} MiB"
        found.append((what, ", ".join(texts)))
    if boxes := data.get("boxes"):
        moved = boxes["tb_per_s"]
        texts = [f"{name} {rate:.0f} ({moved[name]:.1f} TB/s)" for name, rate in boxes["tiles_per_us"].items()]
        found.append(("tiles of 3×3 fetched a µs", ", ".join(texts)))
    if nodes := data.get("graph_nodes"):
        in_graph, alone = nodes["us_a_graph_node"], nodes["us_a_launch"]
        found.append(("an empty kernel", f"{in_graph:.2f} µs in a graph, {alone:.2f} µs launched"))
    if costs := data.get("op_costs"):
        texts = [f"{key[3:].replace('_', ' ')} {us:.1f}" for key, us in costs.items() if key.startswith("us_")]
        found.append(("an eager call that does nothing, µs of the processor", ", ".join(texts)))
    if calls := data.get("call_costs"):
        texts = [f"{key[3:]} {us:.0f}" for key, us in calls.items() if key.startswith("us_")]
        found.append(("an eager call, or training step, of `basis_conv2d` on a tiny map, µs", ", ".join(texts)))
    if bits := data.get("bits"):
        products, counts = bits["bmma_tera_ops"], bits["popc_tera_bits"]
        found.append(("single bits", f"`mma` {products:.0f} Top/s, `popc` {counts:.0f} Tbit/s"))
    parts = [table(("what", "measured"), found)] if found else []
    for key, title in (("wgmma_bf16", "`wgmma` bfloat16, Top/s"), ("wgmma_b1", "`wgmma` bits, Top/s")):
        if key in data:
            parts.append(_matrix_rates(data[key], title))
    if clusters := data.get("clusters"):
        rows = [
            (size, *(f"{values[name]:g}" for name in ("most_active", "us_launch", "us_a_round", "us_a_round_full")))
            for size, values in clusters.items()
            if isinstance(values, dict)
        ]
        head = ("blocks of a cluster", "clusters at once", "launch, µs", "a round, µs", "a round on a full device, µs")
        parts.append(table(head, rows))
    return "\n\n".join([f"{device_line(content)}.", *parts])


def _matrix_rates(data: Mapping[str, Any], title: str) -> str:
    cells: dict[str, dict[str, str]] = {}
    for name, values in data.items():
        if isinstance(values, dict):
            _, N, form = name.split(" ")
            text = f"{values['tera_ops_grid']:.0f} ({values['ns_each_alone']:.0f} ns)"
            cells.setdefault(N.removeprefix("n"), {})[form] = text
    forms = list(dict.fromkeys(form for row in cells.values() for form in row))
    words = {"rs": "A in registers", "ss": "A in shared memory", "rs_ldmatrix": "A by `ldmatrix`"}
    head = (f"{title} (one alone); N", *(words.get(form, form) for form in forms))
    return table(head, ([N, *(row.get(form, "–") for form in forms)] for N, row in cells.items()))


# --- the documents ----------------------------------------------------------------------------------------------------

BLOCKS: dict[str, dict[str, tuple[str, Callable[[Any], str]]]] = {
    "docs/gpu.md": {"proven": ("check", proven), "layers": ("bench", layers), "probe": ("probe", probe)},
    "README.md": {"gpu summary": ("bench", summary)},
}


def contents(results: Path = keep.RESULTS) -> dict[str, list[dict[str, Any]]]:
    """{kind: the rows of each device}."""
    return {kind: [keep.read(path) for path in sorted(results.glob(f"*/{kind}.json"))] for kind in keep.KINDS}


def updated(document: str, text: str, found: Mapping[str, Sequence[Content]]) -> str:
    """A document with its blocks made anew.

    Raises:
        ValueError: a mark is missing, or there twice.
    """
    for name, (kind, made) in BLOCKS[document].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{document} needs the marks {begin.strip()} and {end.strip()}, once each")
        before, _, rest = text.partition(begin)
        _, _, behind = rest.partition(end)
        block = "\n\n".join(made(content) for content in found[kind])
        text = f"{before}{begin}\n{block or 'No rows are kept yet.'}\n\n{end}{behind}"
    return text


def write(root: Path = facts.ROOT) -> list[Path]:
    """Make all documents and tables anew; the files that changed."""
    found, changed = contents(root / "bench" / "results"), []
    texts = {root / name: updated(name, (root / name).read_text("utf-8"), found) for name in BLOCKS}
    folder = root / "basisconv_kernels" / "assets" / "tuned"
    texts |= {keep.tuned_path(content, folder): keep.tuned_text(content) for content in found["bench"]}
    for path, text in texts.items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed
