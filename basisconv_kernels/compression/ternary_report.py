"""What layer-wise training made of each layer, as data, JSON and a table; sizes are those of real encodings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from basisconv_kernels.layers import ternary_code
from basisconv_kernels.layers.ternary import TernaryLayer

FLOAT_BITS = 32


@dataclass(frozen=True)
class TernaryLayerReport:
    """One convolution or linear layer.

    Attributes:
        name: its first name in the network.
        verdict: ``"constrained"``, ``"kept"`` (pruned, its weights are floats) or ``"untouched"``.
        reason: why it is not constrained; empty where it is.
        weights: how many; ``density``: share of them that is not 0.
        scale: σ, or the mean of several; None where it is not constrained.
        accuracy: of the network when the layer had been constrained, whether it stayed so or not; None if never tried.
        encoding: ``"gaps"`` or ``"planes"``; None where it is not constrained.
        bits: of weights and scales in a file, 32 a float weight of a layer that is not constrained.
    """

    name: str
    verdict: str
    reason: str
    weights: int
    density: float
    scale: float | None
    accuracy: float | None
    encoding: str | None
    bits: int

    @property
    def ratio(self) -> float:
        """Bits of the dense float32 weights over those of the file."""
        return FLOAT_BITS * self.weights / self.bits


@dataclass(frozen=True)
class TernaryReport:
    """A whole network; accuracies are what ``evaluate`` gave.

    Attributes:
        rule: the configuration, in words.
        layers: in the order of the network's modules.
        baseline, pruned, final: accuracy of the dense network, after pruning and its fine-tuning, and at the end.
        other_bits: 32 for each parameter and buffer element that is no weight of ``layers``: biases, BatchNorms.
        stopped: why the loop ended early; empty where it did not.
        history: (stage, epoch, steps, mean loss) of every epoch; stage −1 is the fine-tuning after pruning.
    """

    rule: str
    layers: tuple[TernaryLayerReport, ...]
    baseline: float
    pruned: float
    final: float
    other_bits: int
    stopped: str
    history: tuple[tuple[float, ...], ...]

    @property
    def constrained(self) -> tuple[TernaryLayerReport, ...]:
        """The layers that are ternary now."""
        return tuple(layer for layer in self.layers if layer.verdict == "constrained")

    @property
    def layer_ratio(self) -> float:
        """Bits of the float32 weights of the constrained layers over those in a file; 1 where there are none."""
        bits = sum(layer.bits for layer in self.constrained)
        return sum(FLOAT_BITS * layer.weights for layer in self.constrained) / bits if bits else 1.0

    @property
    def network_ratio(self) -> float:
        """The same of the whole network: layers that are not constrained, biases and BatchNorms included."""
        dense = sum(FLOAT_BITS * layer.weights for layer in self.layers) + self.other_bits
        return dense / (sum(layer.bits for layer in self.layers) + self.other_bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        ratios = {"layer_ratio": self.layer_ratio, "network_ratio": self.network_ratio}
        layers = [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return asdict(self) | ratios | {"layers": layers}

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_table(self) -> str:
        """Columns of plain text, and the totals."""
        head = ("layer", "weights", "density", "scale", "accuracy", "encoding", "ratio", "verdict")
        rows = [head, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return f"{table}\n{self.summary()}"

    def summary(self) -> str:
        """The totals in words."""
        text = (
            f"{len(self.constrained)} of {len(self.layers)} layers constrained; their weights {self.layer_ratio:.1f} "
            f"times smaller, the network {self.network_ratio:.1f} times; accuracy {self.baseline:.4f} dense, "
            f"{self.pruned:.4f} pruned, {self.final:.4f} now"
        )
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


def _row(layer: TernaryLayerReport) -> tuple[str, ...]:
    return (
        layer.name or "(the model itself)",
        str(layer.weights),
        f"{layer.density:.3f}",
        "" if layer.scale is None else f"{layer.scale:.4g}",
        "" if layer.accuracy is None else f"{layer.accuracy:.4f}",
        layer.encoding or "",
        f"{layer.ratio:.1f}",
        layer.verdict + (f": {layer.reason}" if layer.reason else ""),
    )


def row_of(
    name: str, module: nn.Module, reason: str, accuracy: float | None, masks: Mapping[str, Tensor]
) -> TernaryLayerReport:
    """The row of one layer as it is now."""
    if isinstance(module, TernaryLayer):
        codes = module.ternary()
        encoded = ternary_code.encode(codes)
        scale = float(module.scales()[0].mean()) if encoded.nonzero else 0.0
        density = encoded.nonzero / encoded.weights
        return TernaryLayerReport(
            name, "constrained", "", encoded.weights, density, scale, accuracy, encoded.kind, module.packed_bits()
        )
    weight = getattr(module, "weight", None)
    count = weight.numel() if isinstance(weight, Tensor) else 0
    kept = int(masks[name].sum()) if name in masks else count
    verdict = "kept" if name in masks else "untouched"
    return TernaryLayerReport(
        name, verdict, reason, count, kept / max(count, 1), None, accuracy, None, max(FLOAT_BITS * count, 1)
    )


def other_bits(model: nn.Module, layers: set[nn.Module]) -> int:
    """32 for each element of the state that is no weight, mask, code or scale of these layers."""
    weights = {"weight", "mask", "weight_code", "planes", "scale", "negative_scale"}
    own = {id(t) for layer in layers for name, t in _tensors(layer) if name in weights}
    everything = {id(t): t for module in model.modules() for _, t in _tensors(module)}
    return FLOAT_BITS * sum(t.numel() for key, t in everything.items() if key not in own)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = [*module._parameters.items(), *module._buffers.items()]
    return [(name, t) for name, t in held if t is not None]
