"""What the documents say of a GPU, made of the rows that ``keep`` wrote; each block stands between marks of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basisconv_kernels.core import tuning
from basisconv_kernels.ops import tucker_conv2d_model as model
from bench.gpu import facts, keep
from bench.gpu.journal import PASSED, WRONG
from bench.gpu.proven import proven
from bench.gpu.report import subject
from bench.gpu.tables import Content, device_line, table

OURS = ("cuda", "triton")
BITS = ("packed_to_packed", "packed_to_bf16", "bf16_to_bf16")
PLAIN = "two convolutions"

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
    """What automatic choice takes by the table that these rows make; of one pass and two in an eager call."""
    key = tuning._weights_key("", dict(problem))
    same = [e for e in entries if e["step"] == step and tuning._weights_key("", e["problem"]) == key]
    slower = {name for entry in same for name in tuning.slower_in(dict(entry))}
    known = {name for entry in same for name in entry["ms"]}
    if model.against_one_pass(same, model.pixels_of(problem)) is not None:
        slower.add(model.ONE_PASS)
    return next((name for name in (model.ONE_PASS, *OURS) if name in known - slower), PLAIN)


def is_chain(row: Mapping[str, Any]) -> bool:
    """Whether a row is about ``tucker_conv2d``."""
    return "layer" in row and re.search(r"_i\d+_q\d+$", row["layer"]) is not None


def _plain(row: Mapping[str, Any], training: bool) -> bool:
    return "layer" in row and ("frozen" in row) == training and not is_chain(row) and not keep.of_bits(row)


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


def beside_dense(bench: Content, title: str, kinds: tuple[str, ...], engines: Sequence[str]) -> list[str]:
    """The table of layers whose names begin so, beside cuDNN's dense convolution, if there are any."""
    found = by_subject(bench, lambda row: str(row.get("layer", "")).startswith(kinds))
    rows = [
        [name, _us(of, "dense", bench), *(text for e in engines for text in (_us(of, e, bench), _over_dense(of, e)))]
        for name, of in found.items()
    ]
    titles = [f"{engine.replace('_', ' ')}{more}" for engine in engines for more in (", µs", ", × dense")]
    return [table([title, "dense, µs", *titles], rows)] if rows else []


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
    parts += beside_dense(bench, "binary layer", keep.BINARY, BITS)
    parts += beside_dense(bench, "layer of real numbers and bits", keep.REAL_AND_BITS, OURS)
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
    one = [r for r in by_subject(bench, lambda row: _plain(row, False)).values() if "two_step" in r]
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
    more = [f"- {line}" for line in beyond_the_basis(bench)]
    return "\n".join([*lines, *(["", *more, ""] if more else []), "All rows: [a day with a GPU](docs/gpu.md)."])


def beyond_the_basis(bench: Content) -> list[str]:
    """A line each for chains, layers of bits and whole networks, slow ones included."""

    def span(kinds: Callable[[Mapping[str, Any]], bool], ours: Sequence[str], plain: str) -> str | None:
        ratios = [
            of[plain]["graph_cold"]["median"] / min(of[e]["graph_cold"]["median"] for e in ours if e in of)
            for of in by_subject(bench, kinds).values()
            if plain in of and set(ours) & set(of)
        ]
        return f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as" if ratios else None

    def named(kinds: tuple[str, ...]) -> Callable[[Mapping[str, Any]], bool]:
        return lambda row: str(row.get("layer", "")).startswith(kinds)

    found = (
        ("Tucker chains, by the better of two CUDA forms", is_chain, ("cuda", model.ONE_PASS), "two_step",
         "three convolutions"),
        ("Binary layers, from bits to bits", named(keep.BINARY), ("packed_to_packed",), "dense",
         "the dense convolution in bfloat16"),
        ("Ternary and stacked binary layers of real numbers, with scale, bias and ReLU", named(keep.REAL_AND_BITS),
         ("cuda",), "dense", "the dense convolution with bias and ReLU"),
        ("ResNet-50 and VGG-16 with Q = K/4", lambda row: "network" in row, ("auto",), "dense",
         "the dense network"),
    )  # fmt: skip
    spans = [(title, span(kinds, ours, plain), beside) for title, kinds, ours, plain, beside in found]
    return [f"{title}: {text} {beside}." for title, text, beside in spans if text]


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
