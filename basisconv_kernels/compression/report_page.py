"""A ``CompressionReport`` as one HTML page; its plots are SVG that this file writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from basisconv_kernels.compression.report import COLUMNS, CompressionReport, LayerReport, row_of

BAR, GAP, LEFT, WIDTH, RIGHT = 9, 5, 170, 520, 150  # pixels
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --muted: #666; --paper: #fff; --before: #b9c2cc; --after: #2364aa; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --muted: #aaa; --paper: #16181b; --before: #4c5560;
  --after: #6fa8dc; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--before); vertical-align: top; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; } text { font: 11px system-ui, sans-serif;
  fill: var(--ink); } .before { fill: var(--before); } .after { fill: var(--after); } .muted { color: var(--muted); }
"""


def page(report: CompressionReport, title: str) -> str:
    """The whole page."""
    rows = "".join(f"<tr>{_cells('td', row_of(layer))}</tr>\n" for layer in report.layers)
    plots = "".join(_plot(*measure) for measure in _measures(report.layers))
    summary = "".join(f"<p>{escape(line)}</p>\n" for line in report.summary().splitlines())
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="muted">{escape(report.rule)}</p>\n{summary}{plots}'
        "<h2>Layers</h2>\n<p>A ratio of operations is no speed-up: where milliseconds were measured, they say what was "
        f'gained.</p>\n<div class="wide"><table>\n<tr>{_cells("th", COLUMNS)}</tr>\n{rows}</table></div>\n'
        "</body>\n</html>\n"
    )


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


Bars = list[tuple[str, float, float]]


def _measures(layers: Sequence[LayerReport]) -> list[tuple[str, str, Bars]]:
    """(name, unit, bars) of what is known of at least one layer."""
    found: list[tuple[str, str, Bars]] = []
    for name, unit, before, after in (
        ("MACs an image", "", "macs_before", "macs_after"),
        ("Parameters", "", "parameters_before", "parameters_after"),
        ("Bytes in a file", "B", "bytes_before", "bytes_after"),
        ("Milliseconds a call", "ms", "dense_ms", "basis_ms"),
    ):
        pairs = [(layer.name or "(the model)", getattr(layer, before), getattr(layer, after)) for layer in layers]
        bars = [(layer, float(b), float(a)) for layer, b, a in pairs if b is not None and a is not None]
        if any(b or a for _, b, a in bars):
            found.append((name, unit, bars))
    return found


def _plot(name: str, unit: str, bars: Bars) -> str:
    """Two bars a layer, before and after, on a common scale from zero."""
    most = max(max(before, after) for _, before, after in bars)
    step = 2 * BAR + GAP
    parts = []
    for number, (layer, before, after) in enumerate(bars):
        top = number * step
        label = layer if len(layer) <= 26 else f"…{layer[-25:]}"
        parts.append(f'<text x="{LEFT - 8}" y="{top + BAR + 4}" text-anchor="end">{escape(label)}</text>')
        for kind, value, y in (("before", before, top), ("after", after, top + BAR)):
            parts.append(
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{WIDTH * value / most:.1f}" height="{BAR - 1}"/>'
            )
        end = LEFT + WIDTH * max(before, after) / most + 6
        text = f"{short(before)} → {short(after)} {unit}".rstrip()
        parts.append(f'<text x="{end:.1f}" y="{top + BAR + 4}">{escape(text)}</text>')
    height = len(bars) * step
    title = f"{name}, before (grey) and after (blue)"
    return (
        f'<h2>{escape(name)}</h2>\n<svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" width="{LEFT + WIDTH + RIGHT}" height="{height}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>\n"
    )


def short(value: float) -> str:
    """A number in at most four digits and a letter."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"
