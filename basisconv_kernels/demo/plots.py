"""The page's charts, as SVG text that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in stand-in colours, which become variables of the page's style sheet: one drawing for light and dark.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
DENSE, TWO_STEP, FUSED = "#050505", "#060606", "#070707"
SERIES = ("#110101", "#120101", "#130101", "#140101", "#150101", "#160101")
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface",
    DENSE: "--dense", TWO_STEP: "--two-step", FUSED: "--fused",
    **{color: f"--series-{number}" for number, color in enumerate(SERIES, 1)},
}  # fmt: skip
FORM_COLORS = {"dense": DENSE, "two_step": TWO_STEP, "fused": FUSED}
FORM_NAMES = {"dense": "dense", "two_step": "two-step", "fused": "fused"}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: readable for screen readers, sharp, small
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.8,
}
MANY_LAYERS = 8  # from here on layers are drawn alike, without names


def all_charts(results: dict[str, Any]) -> dict[str, str]:
    """{name: SVG} of ``accuracy``, ``spectra``, ``layers`` and ``speed_BATCH`` for each batch size."""
    with matplotlib.rc_context(STYLE):
        charts = {"accuracy": _accuracy(results), "spectra": _spectra(results), "layers": _layers(results)}
        for batch in results["timing"]["batches"]:
            charts[f"speed_{batch}"] = _speed(results, str(batch))
    return charts


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, text: str, x: float, y: float, color: str, rise: float, ha: Any = "center") -> None:
    """A word above or below a point, ``rise`` in points, on the ground of the page so that no line crosses it."""
    ground = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    axes.annotate(text, (x, y), (0, rise), textcoords="offset points", ha=ha, color=color, bbox=ground, zorder=5)


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as one ``<svg>`` element for use inside a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", text.split(">", 1)[0])
        + ">"
        + text.split(">", 1)[1]
    )
    text = text.replace("xlink:href", "href").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names of groups repeat from chart to chart
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*)px [^;\"]*", r"font: \1\2px system-ui, sans-serif", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    label = f'<svg role="img" aria-labelledby="{name}-title"'
    return text.replace("<svg", label, 1).replace(">", f'><title id="{name}-title">{title}</title>', 1).strip()


def _accuracy(results: dict[str, Any]) -> str:
    levels = results["levels"]
    figure, axes = _axes(5.0, 3.3)
    axes.grid(axis="y")
    times = [level["theoretical_speed_up"] for level in levels]
    before = [100 * level["accuracy_before"] for level in levels]
    after = [100 * level["fused"]["accuracy"] for level in levels]
    dense = 100 * results["dense"]["accuracy"]
    axes.axhline(dense, color=DENSE, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.plot([1, *times], [dense, *before], color=MUTED, linewidth=1.2, marker="o", markersize=6,
              markerfacecolor=SURFACE, markevery=range(1, len(times) + 1), label="truncated")  # fmt: skip
    axes.plot([1, *times], [dense, *after], color=FUSED, marker="o", markersize=6, markevery=range(1, len(times) + 1),
              label="after one epoch of fine-tuning")  # fmt: skip
    axes.plot([1], [dense], "o", color=DENSE, markersize=6)
    low = min(before + after)
    span = max(dense - low, 2.0)
    _label(axes, f"dense {dense:.2f}", 1, dense, DENSE, -15, ha="left")
    for x, y_before, y_after in zip(times, before, after, strict=True):
        _label(axes, f"{y_after:.2f}", x, y_after, FUSED, 7)
        if abs(y_after - y_before) > 0.04 * span:
            _label(axes, f"{y_before:.1f}", x, y_before, MUTED, -15)
    axes.set_ylim(low - 0.18 * span, dense + 0.18 * span)
    axes.set_xlim(0.85, max(times) * 1.08)
    axes.set_xlabel("times fewer multiply-accumulates")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower left", labelcolor=INK)
    return _svg(figure, "accuracy", "Test accuracy against compression, before and after fine-tuning")


def _speed(results: dict[str, Any], batch: str) -> str:
    levels = results["levels"]
    figure, axes = _axes(5.0, 3.3)
    axes.grid(axis="y")
    theory = [level["theoretical_speed_up"] for level in levels]
    top = max(theory) * 1.08
    axes.plot(
        [1, top], [1, top], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="as the operation count says"
    )
    axes.axhline(1, color=DENSE, linewidth=1.2)
    _label(axes, "dense", 0.87, 1, DENSE, -13, ha="left")
    for form, marker in (("two_step", "s"), ("fused", "o")):
        spreads = [level[form]["speed_up"][batch] for level in levels]
        middles = [spread["median"] for spread in spreads]
        errors = [[s["median"] - s["q1"] for s in spreads], [s["q3"] - s["median"] for s in spreads]]
        axes.errorbar(theory, middles, errors, color=FORM_COLORS[form], marker=marker, markersize=6, elinewidth=1.2,
                      label=FORM_NAMES[form])  # fmt: skip
        for x, y in zip(theory, middles, strict=True):
            _label(axes, f"{y:.2f}×", x, y, FORM_COLORS[form], 8 if form == "fused" else -16)
    axes.set_xlim(0.85, top)
    axes.set_ylim(0, max([*theory, *(level["fused"]["speed_up"][batch]["q3"] for level in levels)]) * 1.1)
    axes.set_xlabel("times fewer multiply-accumulates")
    axes.set_ylabel("speed, times dense")
    axes.legend(loc="upper left", labelcolor=INK)
    images = "image" if batch == "1" else "images"
    return _svg(figure, f"speed-{batch}", f"Measured speed-up against the saved operations, {batch} {images} at a time")


def _spectra(results: dict[str, Any]) -> str:
    rows = results["spectra"]
    figure, axes = _axes(5.0, 3.3)
    axes.grid(axis="y")
    few = len(rows) <= MANY_LAYERS
    beside: Any = ("axes fraction", "data")
    for level in results["levels"]:
        kept = 100 * level["energy"]
        axes.axhline(kept, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
        axes.annotate(
            f"{kept:g} %", (1, kept), (4, -3), color=MUTED, xycoords=beside, textcoords="offset points",
            annotation_clip=False,
        )  # fmt: skip
    for number, row in enumerate(rows):
        color = SERIES[number % len(SERIES)] if few else FUSED
        shares = [100 * (q + 1) / row["K"] for q in range(len(row["kept"]))]
        energies = [100 * value for value in row["kept"]]
        axes.plot(shares, energies, color=color, linewidth=1.6 if few else 0.8, alpha=1 if few else 0.5,
                  label=f"{row['name']}, K = {row['K']}" if few else None)  # fmt: skip
        for Q in row["chosen"]:
            if Q is not None:
                axes.plot([shares[Q - 1]], [energies[Q - 1]], "o", color=color, markersize=4.5 if few else 2.5)
    axes.set_xlim(0, 100.5)
    axes.set_ylim(0, 103)
    axes.set_xlabel("basis filters, % of the layer's filters")
    axes.set_ylabel("energy kept, %")
    if few and rows:
        axes.legend(loc="lower right", labelcolor=INK)
    return _svg(figure, "spectra", "Energy of the filters kept by the first basis filters, layer by layer")


def _layers(results: dict[str, Any]) -> str:
    level = results["levels"][len(results["levels"]) // 2]
    batch = str(max(results["timing"]["batches"]))
    layers = [layer for layer in level["layers"] if layer["ms"]]
    figure, axes = _axes(6.4, 0.85 + 0.5 * max(len(layers), 1))
    axes.grid(axis="x")
    thickness = 0.26
    for row, layer in enumerate(layers):
        for slot, form in enumerate(("dense", "two_step", "fused")):
            spread = layer["ms"][batch][form]
            y = row + (slot - 1) * (thickness + 0.02)
            axes.barh(y, spread["median"], thickness, color=FORM_COLORS[form],
                      label=FORM_NAMES[form] if row == 0 else None)  # fmt: skip
            axes.plot([spread["q1"], spread["q3"]], [y, y], color=INK, linewidth=1)
    axes.set_yticks(range(len(layers)), [f"{layer['name']}\nQ {layer['Q']} of {layer['K']}" for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.55)
    axes.set_xlabel(f"milliseconds for {batch} images, median and quartiles")
    if layers:
        axes.legend(loc="lower right", ncols=3, labelcolor=INK, bbox_to_anchor=(1, 1))
    return _svg(figure, "layers", f"Time of each replaced layer: dense, two-step, fused; {batch} images at a time")
