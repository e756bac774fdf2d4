"""What the commands print: the demo's table, and rows of text for files, tunings and explanations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from basisconv_kernels.core.tuning import BUSY, PLAIN, circumstances, slower_in
from basisconv_kernels.demo.results import disturbance, middle, some
from basisconv_kernels.layers.decompose import break_even

FORM_NAMES = {"two_step": "two-step", "fused": "fused"}
WIDTH = 140  # where the output is no terminal


def print_summary(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the demo's tables and what they say, on stdout."""
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=WIDTH)
    for table in (_costs(results), _times(results), _layers(results)):
        console.print(table)
    for line in conclusions(results):
        console.print(line)


def conclusions(results: dict[str, Any]) -> list[str]:
    """Which layers gained, and what became of the files."""
    level, batch = middle(results["levels"]), max(results["timing"]["batches"])
    said = [warning] if (warning := disturbance(results)) else []
    for row in results["gains"]:
        if row["energy"] == level["energy"] and row["batch"] == batch:
            for form, words in (("dense", "dense"), ("two_step", "two convolutions")):
                names = row[f"faster_than_{form}"]
                said.append(
                    f"Faster fused than {words} at energy {level['energy']:g}, batch {batch}: {len(names)} of "
                    f"{row['layers']} layers{': ' if names else ''}{some(names)}"
                )
    images = results["data"]["test_images"]
    if results["verification"]["passed"]:
        files = [*results["levels"], *results["others"]]
        identical = all(entry["verification"]["bit_identical"] for entry in files)
        said.append(
            f"Verified: a new process loaded the files and gave the same class for all {images:,} test images"
            + (", logits equal to the last bit" if identical else "")
        )
    else:
        problems = [f"{level['file']}: {level['verification'].get('error') or 'other predictions'}"
                    for level in (*results["levels"], *results["others"])
                    if not level["verification"]["passed"]]  # fmt: skip
        said.append(f"VERIFICATION FAILED: {'; '.join(problems)}")
    seconds = {name: spent for name, spent in results["seconds"].items() if name != "total"}
    longest = sorted(seconds, key=lambda name: -seconds[name])[:4]
    parts = ", ".join(f"{name} {seconds[name]:.0f} s" for name in longest)
    said.append(f"Total {results['seconds']['total']:.0f} s ({parts})")
    return said


def _costs(results: dict[str, Any]) -> Table:
    name = f"{results['network']['name']} on {results['data']['name']}, {results['data']['test_images']:,} test images"
    columns = ("network", "filters", "MACs", "parameters", "file kB", "accuracy truncated", "fine-tuned", "difference")
    table = _table(name, columns)
    dense = results["dense"]
    cost = (_millions(dense["macs"]), _millions(dense["parameters"]), f"{dense['file_bytes'] / 1e3:.0f}")
    table.add_row(
        "dense", str(results["levels"][0]["filters_before"]), *cost, "", f"{100 * dense['accuracy']:.2f} %", ""
    )
    for level in results["levels"]:
        after = level["fused"]["accuracy"]
        table.add_row(
            f"energy {level['energy']:g}",
            str(level["filters_after"]),
            _millions(level["macs"]),
            _millions(level["parameters"]),
            f"{level['file_bytes'] / 1e3:.0f}",
            f"{100 * level['accuracy_before']:.2f} %",
            f"{100 * after:.2f} %",
            f"{100 * (after - dense['accuracy']):+.2f}",
        )
    for other in results["others"]:
        table.add_row(
            other["name"],
            "",
            _millions(other["macs"]) if other["multiplies"] else "none",
            _millions(other["parameters"]),
            f"{other['file_bytes'] / 1e3:.0f}",
            "" if other["accuracy_before"] is None else f"{100 * other['accuracy_before']:.2f} %",
            f"{100 * other['accuracy']:.2f} %",
            f"{100 * (other['accuracy'] - dense['accuracy']):+.2f}",
        )
    return table


def _times(results: dict[str, Any]) -> Table:
    batches = [str(batch) for batch in results["timing"]["batches"]]
    columns = [f"{what}batch {b}" for b in batches for what in ("ms/image, ", "speed, ")]
    table = _table("Time: median [quartiles]", ("network", *columns, "by MACs"))
    dense, dense_macs = results["dense"]["ms_per_image"], results["dense"]["macs"]
    table.add_row("dense", *(cell for b in batches for cell in (_spread(dense[b]), "1")), "1")
    for level in results["levels"]:
        for form, name in FORM_NAMES.items():
            one = level[form]
            cells = [cell for b in batches for cell in (_spread(one["ms_per_image"][b]), _ratio(one["speed_up"][b]))]
            table.add_row(f"energy {level['energy']:g} {name}", *cells, f"{level['theoretical_speed_up']:.2f}×")
    for other in results["others"]:
        cells = [cell for b in batches for cell in (_spread(other["ms_per_image"][b]), _ratio(other["speed_up"][b]))]
        by_macs = f"{dense_macs / other['macs']:.2f}×" if other["multiplies"] else ""
        table.add_row(other["name"], *cells, by_macs)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _layers(results: dict[str, Any]) -> Table:
    level, batch = middle(results["levels"]), str(max(results["timing"]["batches"]))
    title = f"Layers at energy {level['energy']:g}, ms a call of {batch} images"
    forms = ("dense", "two-step", "fused", "dense/fused", "two-step/fused")
    table = _table(title, ("layer", "C→K", "Q", "Q*", "MACs", *forms))
    for layer in level["layers"]:
        shape, cost = f"{layer['C']}→{layer['K']}", _millions(layer["macs_before"])
        if not layer["ms"]:
            table.add_row(layer["name"], shape, "dense", f"{layer['break_even']:.1f}", cost)
            continue
        times = layer["ms"][batch]
        middles = [times[form]["median"] for form in ("dense", "two_step", "fused")]
        table.add_row(
            layer["name"], shape, str(layer["Q"]), f"{layer['break_even']:.1f}",
            f"{cost} → {_millions(layer['macs_after'])}", *(f"{value:.3f}" for value in middles),
            f"{middles[0] / middles[2]:.2f}×", f"{middles[1] / middles[2]:.2f}×",
        )  # fmt: skip
    return table


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value < 1e8 else f"{value / 1e6:.1f} M"


def _spread(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.3f} [{spread['q1']:.3f}–{spread['q3']:.3f}]"


def _ratio(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.2f}× [{spread['q1']:.2f}–{spread['q3']:.2f}]"


# --- rows of text -----------------------------------------------------------------------------------------------------


def recipe_rows(recipe: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table of the layers in a saved file; layers of unknown kinds show their description."""
    rows: list[tuple[str, ...]] = [("layer", "kind", "C→K", "kernel", "Q", "Q*", "weights", "about")]
    for layer in sorted(recipe["layers"], key=lambda layer: _natural(layer["names"][0])):
        name = ", ".join(layer["names"]) or "(the model itself)"
        about = {key: value for key, value in layer.items() if key not in ("kind", "names")}
        basis = _tensor(recipe, layer, "basis_weight")
        coefficients = _tensor(recipe, layer, "coefficients")
        if basis is None or coefficients is None:
            cells = _tucker_cells(about) if "rank_in" in about else _dense_cells(about)
            rows.append((name, layer["kind"], *cells))
            continue
        Q, taps_in, R, S = basis
        K, mixed = coefficients
        groups = about.get("groups", 1)
        taps = taps_in * R * S
        compact = groups > 1 and mixed != Q
        change = f"{K * taps:,} → {Q * taps + K * mixed:,}"
        shown = {key: value for key, value in about.items() if key in SHOWN and value not in ORDINARY}
        limit = break_even(K, taps, groups if compact else 1)
        rows.append(
            (name, layer["kind"], f"{taps_in * groups}→{K}", f"{R}×{S}", str(Q), f"{limit:.1f}", change, _short(shown))
        )
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``features.10`` behind ``features.3``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _dense_cells(about: dict[str, Any]) -> tuple[str, ...]:
    """The cells of an ordinary convolution; those of an unknown kind hold its description alone."""
    try:
        C, K, (R, S), groups = (about[key] for key in ("in_channels", "out_channels", "kernel_size", "groups"))
    except KeyError:
        return ("", "", "", "", "", _short(about))
    shown = {key: value for key, value in about.items() if key in SHOWN and value not in ORDINARY}
    return (f"{C}→{K}", f"{R}×{S}", "", "", f"{K * (C // groups) * R * S:,}", _short(shown))


def _tucker_cells(about: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a Tucker convolution; both ranks stand in the place of Q."""
    C, K, (R, S), i, o = (about[k] for k in ("in_channels", "out_channels", "kernel_size", "rank_in", "rank_out"))
    shown = {key: value for key, value in about.items() if key in SHOWN and value not in ORDINARY}
    change = f"{K * C * R * S:,} → {C * i + o * (i * R * S + K):,}"
    return (f"{C}→{K}", f"{R}×{S}", f"{i}·{o}", "", change, _short(shown))


SHOWN = ("stride", "dilation", "groups", "activation", "padding_mode", "basis_norm", "precise")
ORDINARY: tuple[Any, ...] = (None, False, 1, [1, 1], "zeros")


def _tensor(recipe: dict[str, Any], layer: dict[str, Any], name: str) -> list[int] | None:
    """Shape of a layer's tensor, under whichever of its names it is stored."""
    for prefix in layer["names"]:
        key = f"{prefix}.{name}".lstrip(".")
        entry = recipe["tensors"].get(recipe["shared"].get(key, key))
        if entry is not None:
            return list(entry["shape"])
    return None


def _short(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def tuned_rows(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A table of what ``tune`` measured."""
    backends = list(dict.fromkeys(name for entry in entries for name in entry["ms"]))
    rows = [("problem", *(f"{name} ms" for name in backends), "fastest", "reference / fastest", "passed over")]
    for entry in entries:
        p = entry["problem"]
        ranks = f"{p['rank_in']}→{p['Q']}→" if "rank_in" in p else f"{p['Q']}→" if "Q" in p else ""
        shape = f"N{p['N']} {p['C']}→{ranks}{p['K']} {p['R']}×{p['S']} @{p['H']}×{p['W']}"
        shape += f" bank {p['n']} splits {p['splits']}" if "splits" in p else ""
        shape += f"{' packed' if p['planes'] else ''} → {p['output']}" if "output" in p else ""
        shape = shape if "Q" in p else f"{entry['op']} {shape}"
        shape += f" stride {p['stride'][0]}" if p["stride"] != [1, 1] else ""
        shape += " channels_last" if p["channels_last"] else " NCHW"
        shape += f" {entry['step']}, {entry['way']}" if "way" in entry else ""
        best = entry["ms"][entry["fastest"]]["median"]
        cells = [_milliseconds(entry["ms"].get(name)) for name in backends]
        gain = f"{entry['ms'][PLAIN]['median'] / best:.2f}×" if PLAIN in entry["ms"] else ""
        slower = "does not count: busy" if entry["disturbed"] > BUSY else ", ".join(slower_in(entry))
        rows.append((shape, *cells, entry["fastest"], gain, slower))
    return rows


def _milliseconds(spread: dict[str, Any] | None) -> str:
    return "" if spread is None else f"{spread['median']:.3f} [{spread['q1']:.3f}–{spread['q3']:.3f}]"


def explanation_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What ``explain`` says."""
    N, K, OH, OW = found["output"]
    runs = found["chosen"] or "nothing"
    runs += f", instruction set {found['isa']}" if found["isa"] else ""
    if found["asked"]:
        runs += f" (asked for: {found['asked']})"
    rows = [("problem", found["problem"]), ("output", f"[{N}, {K}, {OH}, {OW}]"), ("runs on", runs)]
    for name, reasons in found["candidates"].items():
        able = "chosen" if name == found["chosen"] else found["slower"].get(name, "could run")
        rows.append((f"  {name}", "; ".join(reasons) or able))
        if reasons and name in found["slower"]:
            rows.append(("    besides", found["slower"][name]))
        if name in found["predicted"] and name not in found["slower"]:
            rows.append(("    predicted", f"against two library kernels, {found['predicted'][name]}"))
        if name in found["self_checks"]:
            rows.append(("    self-check", found["self_checks"][name]))
    if found["unknown_backend"]:
        rows.append((f"  {found['unknown_backend']}", "not a backend of this op"))
    if training := found["training"]:
        rows.append(("training step", training["chosen"] or "nothing"))
        rows += [(f"  {name}", why) for name, why in training["slower"].items()]
    rows.append(("tuned tables", ", ".join(found["tables"]) or "none for this processor: run `basisconv tune`"))
    if found["tables"] and not found["measured"]:
        rows.append(("  measured", "nothing for these weights in this memory format with so many threads"))
    for entry in (*found["measured"], *(training["measured"] if training else ())):
        times = (f"{name} {_milliseconds(spread)} ms" for name, spread in entry["ms"].items())
        rows.append(("  measured", f"{', '.join(times)} ({circumstances(entry)})"))
    if "stored_bytes" in found:
        return [*rows, *_bit_rows(found)]
    ratio = _fewer(found["macs_dense"], found["macs_basis"])
    macs = f"{found['macs_basis']:,} instead of {found['macs_dense']:,} ({ratio})"
    weights = f"{found['weights_basis']:,} instead of {found['weights_dense']:,}"
    rows += [("MACs", macs), ("weights", weights)]
    if found["break_even"] is None:
        advice = "the stages cost less" if found["pays"] else "the dense convolution costs no more MACs or weights"
        return [*rows, ("verdict", advice)]
    advice = "below it: the basis costs less" if found["pays"] else "not below it: the dense convolution costs no more"
    return [*rows, ("break-even Q*", f"{found['break_even']:.2f}; {advice}")]


def _bit_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Costs of filters of bits; their operations are additions, or pairs of signs, no multiplications."""
    operations = f"{found['operations']:,} instead of {found['macs_dense']:,} multiplications and additions"
    form = {None: "", "stacked": ", the bank over every split", "expanded": ", full filters, which take fewer here"}
    dense = 4 * found["weights_dense"]
    stored = f"{found['stored_bytes']:,} bytes instead of {dense:,} of float32 ({dense / found['stored_bytes']:.0f}×)"
    return [("operations", operations + form[found["form"]]), ("filters", stored)]


def _fewer(before: int, after: int) -> str:
    return f"{before / after:.2f}×" if after else "empty"
