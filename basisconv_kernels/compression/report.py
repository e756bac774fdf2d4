"""What ``compress`` and ``fold_batchnorm`` did, as data, JSON and a table."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

UNNAMED = "no pattern names it"  # the reason why a step by name pattern passed over a layer


@dataclass(frozen=True)
class LayerReport:
    """One convolution of the network.

    Attributes:
        name: its first name in the network.
        verdict: ``"replaced"``, ``"pruned"`` or ``"kept"``.
        reason: why it was kept; for a replaced layer a note, or empty.
        K, C, R, S, groups: output and input channels, filter height and width, channel groups.
        break_even: Q*, from where the basis costs no less than the dense convolution.
        basis_channels: Q of the replaced layer, rank_out of a TuckerConv2d, n of a
            StackedBinaryConv2d, else None.
        energy_kept: share of the filters' energy that the basis keeps (of the expected output's, if data-aware).
        relative_error: ‖weight − coefficients·basis‖ / ‖weight‖, Frobenius.
        macs_before, macs_after: multiply-accumulates an image, over all calls; 0 where the layer was never reached.
        parameters_before, parameters_after: weights and bias, the frozen basis included; a BatchNorm between the stages
            folds away and is not counted. Bits of a StackedBinaryConv2d count in words of 32.
        dense_ms, basis_ms: measured milliseconds a call at the shape of its example input, of the dense and of the
            replaced layer; None where not measured.
        rank_in: of a TuckerConv2d, else None.
        channels_after: (K, C) that pruning left, None where it removed nothing.
        method: class of the layer that is there now, ``"pruned"`` for an ordinary one with fewer channels, empty where
            nothing was changed.
        bytes_before, bytes_after: of the layer's tensors in a model file, binary and ternary layers packed.
    """

    name: str
    verdict: str
    reason: str
    K: int
    C: int
    R: int
    S: int
    groups: int
    break_even: float
    basis_channels: int | None
    energy_kept: float | None
    relative_error: float | None
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    dense_ms: float | None = None
    basis_ms: float | None = None
    rank_in: int | None = None
    channels_after: tuple[int, int] | None = None
    method: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def replaced(self) -> bool:
        """Whether another layer is in its place now."""
        return self.verdict == "replaced"


@dataclass(frozen=True)
class CompressionReport:
    """Every convolution of a network before and after ``compress``.

    Multiply-accumulates (MACs) and parameters are those of the convolutions; ``network_parameters_*`` count the whole
    network, frozen bases included. 1 MAC = 2 FLOP: ``flops_*`` are twice the MACs. A ratio of operations is no
    speed-up.

    Attributes:
        rule: the configuration, in words.
        layers: in the order of the network's modules.
        steps: where there were several, the report of each; ``layers`` tell then what all of them did together.
        accuracy_before, accuracy_after: what ``evaluate`` gave; None without one.
    """

    rule: str
    layers: tuple[LayerReport, ...]
    network_parameters_before: int
    network_parameters_after: int
    steps: tuple[CompressionReport, ...] = ()
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @classmethod
    def joined(cls, steps: Sequence[CompressionReport]) -> CompressionReport:
        """The report of a pipeline: costs before the first and after the last step."""
        rows: dict[str, LayerReport] = {}
        for row in (row for step in steps for row in step.layers):
            rows[row.name] = row if row.name not in rows else _joined(rows[row.name], row)
        rule = " | ".join(step.rule for step in steps)
        before, after = steps[0].network_parameters_before, steps[-1].network_parameters_after
        return cls(rule, tuple(rows.values()), before, after, tuple(steps))

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        """The layers in whose place another is now."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that stayed as they were."""
        return tuple(layer for layer in self.layers if not layer.replaced)

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates of the dense convolutions, an image."""
        return sum(layer.macs_before for layer in self.layers)

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the convolutions now."""
        return sum(layer.macs_after for layer in self.layers)

    @property
    def flops_before(self) -> int:
        """2 · macs_before."""
        return 2 * self.macs_before

    @property
    def flops_after(self) -> int:
        """2 · macs_after."""
        return 2 * self.macs_after

    @property
    def parameters_before(self) -> int:
        """Weights and biases of the dense convolutions."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Weights and biases of the convolutions now."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def filters_before(self) -> int:
        """ΣK."""
        return sum(layer.K for layer in self.layers)

    @property
    def filters_after(self) -> int:
        """ΣQ of the replaced and ΣK of the other layers."""
        return sum(layer.basis_channels or (layer.channels_after or (layer.K,))[0] for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Of the convolutions' tensors in a model file."""
        return sum(layer.bytes_before or 0 for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of what stands in their place."""
        return sum(layer.bytes_after or 0 for layer in self.layers)

    def totals(self) -> dict[str, int]:
        """The sums, by name."""
        names = ("macs", "flops", "parameters", "filters", "network_parameters", "bytes")
        return {f"{name}_{when}": getattr(self, f"{name}_{when}") for name in names for when in ("before", "after")}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        own: dict[str, Any] = {
            "rule": self.rule,
            "totals": self.totals(),
            "layers": [asdict(layer) for layer in self.layers],
        }
        if self.accuracy_before is not None:
            own |= {"accuracy_before": self.accuracy_before, "accuracy_after": self.accuracy_after}
        return own | ({"steps": [step.to_dict() for step in self.steps]} if self.steps else {})

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_html(self, title: str = "Compression report") -> str:
        """One page with everything inside: totals, plots by layer, the table; no scripts, nothing fetched."""
        from basisconv_kernels.compression.report_page import page  # which reads the classes of this file

        return page(self, title)

    def to_table(self, width: int = 160) -> str:
        """A table for people: drawn by rich where it is installed, else columns of plain text."""
        rows = [row_of(layer) for layer in self.layers]
        body = _rich_table(rows, width) if importlib.util.find_spec("rich") else _plain_table(rows)
        return f"{body}\n{self.summary()}"

    def _pruned(self) -> str:
        count = sum(layer.channels_after is not None for layer in self.layers)
        return f", {count} pruned" if count else ""

    def summary(self) -> str:
        """The totals in a few lines."""
        return (
            f"{len(self.replaced)} of {len(self.layers)} convolutions replaced{self._pruned()}; filters "
            f"{self.filters_before} → {self.filters_after}; MACs an image {_short(self.macs_before)} → "
            f"{_short(self.macs_after)} ({_change(self.macs_before, self.macs_after)})\n"
            f"parameters of the convolutions {_short(self.parameters_before)} → {_short(self.parameters_after)} "
            f"({_change(self.parameters_before, self.parameters_after)}), of the network "
            f"{_short(self.network_parameters_before)} → {_short(self.network_parameters_after)} "
            f"({_change(self.network_parameters_before, self.network_parameters_after)})"
            f"{self._bytes_and_accuracy()}"
        )

    def _bytes_and_accuracy(self) -> str:
        text = ""
        if self.bytes_before:
            change = _change(self.bytes_before, self.bytes_after)
            text += f"\nbytes of the convolutions {_short(self.bytes_before)} → {_short(self.bytes_after)} ({change})"
        if self.accuracy_before is not None and self.accuracy_after is not None:
            text += f"\naccuracy {self.accuracy_before:.4f} → {self.accuracy_after:.4f}"
        return text


def _joined(earlier: LayerReport, later: LayerReport) -> LayerReport:
    """One layer after two steps: the later says what it is now, the earlier what it was."""
    if later.reason == UNNAMED or (earlier.verdict != "kept" and later.verdict == "kept"):
        return replace(earlier, macs_after=later.macs_after, parameters_after=later.parameters_after)
    was = ("K", "C", "R", "S", "groups", "macs_before", "parameters_before")
    channels = later.channels_after or earlier.channels_after
    return replace(later, **{name: getattr(earlier, name) for name in was}, channels_after=channels)


@dataclass(frozen=True)
class FoldedChain:
    """What was folded into one convolution.

    Attributes:
        name: of the convolution in the network.
        absorbed: what it took in, in order: names of BatchNorm and activation modules, or the functions' names.
    """

    name: str
    absorbed: tuple[str, ...]


@dataclass(frozen=True)
class FoldReport:
    """What ``fold_batchnorm`` did.

    Attributes:
        chains: what was folded.
        left_alone: (name, reason) of what was not, though it might have been expected.
    """

    chains: tuple[FoldedChain, ...]
    left_alone: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and strings."""
        return asdict(self)


COLUMNS = (
    "layer", "C→K R×S", "method", "Q", "Q*", "energy", "error", "MACs", "parameters", "bytes", "ms", "verdict",
)  # fmt: skip


def row_of(layer: LayerReport) -> tuple[str, ...]:
    """The cells of ``COLUMNS``."""
    shape = f"{layer.C}→{layer.K} {layer.R}×{layer.S}" + (f" /{layer.groups}" if layer.groups > 1 else "")
    changed = layer.verdict != "kept"
    if layer.channels_after is not None:
        shape = f"{shape}: {layer.channels_after[1]}→{layer.channels_after[0]}"
    return (
        layer.name or "(the model itself)",
        shape,
        layer.method,
        "" if layer.basis_channels is None else "·".join(str(r) for r in (layer.rank_in, layer.basis_channels) if r),
        f"{layer.break_even:.1f}",
        "" if layer.energy_kept is None else f"{layer.energy_kept:.3f}",
        "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
        _short(layer.macs_before) + (f" → {_short(layer.macs_after)}" if changed else ""),
        _short(layer.parameters_before) + (f" → {_short(layer.parameters_after)}" if changed else ""),
        ""
        if layer.bytes_before is None or layer.bytes_after is None
        else _short(layer.bytes_before) + (f" → {_short(layer.bytes_after)}" if changed else ""),
        "" if layer.dense_ms is None or layer.basis_ms is None else f"{layer.dense_ms:.3f} → {layer.basis_ms:.3f}",
        layer.verdict + (f": {layer.reason}" if layer.reason else ""),
    )


def _plain_table(rows: list[tuple[str, ...]]) -> str:
    table = [COLUMNS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _rich_table(rows: list[tuple[str, ...]], width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())


def _short(count: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before else "none"
