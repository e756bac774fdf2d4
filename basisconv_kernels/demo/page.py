"""The demo's page: one HTML file with everything inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import torch
from matplotlib.image import imsave
from torch import Tensor

from basisconv_kernels.demo import models, plots
from basisconv_kernels.demo.data import Split
from basisconv_kernels.demo.results import disturbance, middle, some

TEMPLATE = "page.html.j2"


def write(results: dict[str, Any], test: Split, path: Path) -> None:
    """Write the page of a run.

    Args:
        results: as in ``results.json``.
        test (Split): the images that ``results["samples"]`` points into.
        path (Path): of the HTML file.
    """
    path.write_text(render(results, test), "utf-8")


def render(results: dict[str, Any], test: Split) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=count, size=size, ms=milliseconds, percent=percent, points=points, times=times, thousands=thousands
    )
    charts = {name: markupsafe.Markup(svg) for name, svg in plots.all_charts(results).items()}
    names = models.CLASS_NAMES[results["data"]["key"]]
    batches = [str(batch) for batch in results["timing"]["batches"]]
    return environment.get_template(TEMPLATE).render(
        r=results,
        main=middle(results["levels"]),
        one=batches[0],
        large=batches[-1],
        batches=batches,
        charts=charts,
        gain=_gain(results, int(batches[-1])),
        classes=names,
        some=some,
        warning=disturbance(results),
        samples=[{**sample, "image": _png(test.images[sample["index"]])} for sample in results["samples"]],
        environment=_environment_rows(results["environment"]),
    )


def _gain(results: dict[str, Any], batch: int) -> dict[str, Any]:
    """The row of ``gains`` about the middle level at a batch size."""
    energy = middle(results["levels"])["energy"]
    empty = {"layers": 0, "faster_than_dense": [], "faster_than_two_step": []}
    return next((row for row in results["gains"] if row["energy"] == energy and row["batch"] == batch), empty)


def _png(image: Tensor) -> str:
    """An image [C, H, W] of bytes as a data URI."""
    pixels = image.movedim(0, -1)
    pixels = pixels.expand(*pixels.shape[:2], 3) if pixels.shape[2] == 1 else pixels
    buffer = io.BytesIO()
    imsave(buffer, pixels.to(torch.uint8).contiguous().numpy(), format="png", metadata={})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page says about machine and versions."""
    native = found["native_library"]
    built = f"built for {', '.join(native['cpu']['built'])}" if isinstance(native, dict) else str(native)
    load = found["load_average_at_start"]
    rows = {
        "Processor": found["cpu"],
        "Cores, threads": f"{found['cores']} cores, {found['threads']} threads",
        "Instruction set of the kernels": f"{found['isa']} ({built})",
        "Load average at the start": "unknown" if load is None else f"{load:.2f}",
        "PyTorch": f"{found['torch']}, {found['torch_cpu_capability']}, oneDNN {found['onednn'] or 'absent'}",
        "basisconv_kernels": found["basisconv_kernels"],
        "Python": found["python"],
        "System": found["system"],
        "Variables set": ", ".join(f"{k}={v}" for k, v in found["variables"].items()) or "none",
    }
    return list(rows.items())


# --- numbers for people -----------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """46230912 → ``46.2 M``."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value / unit < 100 else f"{value / unit:.1f} {name}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes as kB or MB, powers of ten."""
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def percent(value: float) -> str:
    """0.9481 → ``94.81 %``."""
    return f"{100 * value:.2f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.2f}".replace("-", "−")


def times(value: float) -> str:
    """2.514 → ``2.51×``."""
    return f"{value:.2f}×"


def thousands(value: int) -> str:
    """10000 → ``10,000``."""
    return f"{value:,}"
