"""The other methods beside the basis levels of the demo: one network each, trained as long, tested alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.report import CompressionReport
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.timing import speed_up
from basisconv_kernels.demo import measure
from basisconv_kernels.demo.results import Times
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.ternary import TernaryLayer

METHODS: dict[str, TuckerConfig | TernaryConfig] = {
    "Tucker": TuckerConfig(energy=0.8),
    "ternary": TernaryConfig(method="twn", linear=False),
}
LEARNING_RATE = 0.005  # of everything that can be trained; the levels train coefficients and BatchNorms alone
STAGES = 4
# How the shipped networks with filters of bits were made; their training takes longer than the demo's epoch.
SHIPPED: dict[str, StackedBinaryConfig | BinaryConfig] = {
    "stacked binary": StackedBinaryConfig(splits=2, bank=0.5, rounds=1),  # of the report, which no round changes
    "XNOR": BinaryConfig(),
}
SHIPPED_STAGES = 2


WITHOUT = (TernaryLayer, StackedBinaryConv2d, BinaryConv2d)


@dataclass
class Other:
    """One network on its way through the demo; a shipped one was trained before, so it has no accuracy before that."""

    name: str
    network: nn.Module
    report: CompressionReport
    file: str
    file_bytes: int = 0
    accuracy_before: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def multiplies(self) -> bool:
        """Whether its convolutions multiply; ternary and stacked binary ones add, XNOR ones count bits."""
        return not any(isinstance(module, WITHOUT) for module in self.network.modules())


def pack(network: nn.Module) -> nn.Module:
    """Drop the float weights of ternary layers, in place: what is left is what the file holds."""
    for module in network.modules():
        if isinstance(module, TernaryLayer):
            module.pack()
    return network


def other_results(other: Other, labels: Tensor, times: Times, verification: dict[str, Any]) -> dict[str, Any]:
    """Costs, accuracy, times and what became of the file, as JSON values."""
    if other.logits is None:
        raise ValueError(f"demo: {other.name} has not predicted yet")
    return {
        "name": other.name,
        "rule": other.report.rule,
        "file": other.file,
        "file_bytes": other.file_bytes,
        "macs": other.report.macs_after,
        "multiplies": other.multiplies,
        "parameters": other.report.network_parameters_after,
        "replaced": [layer.name for layer in other.report.replaced],
        "accuracy_before": other.accuracy_before,
        "accuracy": measure.accuracy(other.logits, labels),
        "training": other.training,
        "ms_per_image": {str(b): t[other.name].spread().to_dict() for b, t in times.networks.items()},
        "speed_up": {str(b): speed_up(t["dense"], t[other.name]).to_dict() for b, t in times.networks.items()},
        "verification": verification["files"][other.file],
    }
