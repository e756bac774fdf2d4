"""The other methods beside the basis levels of the demo: one network each, trained as long, tested alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from basisconv_kernels.compression.report import CompressionReport
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.timing import speed_up
from basisconv_kernels.demo import measure
from basisconv_kernels.demo.results import Times
from basisconv_kernels.layers.ternary import TernaryLayer

METHODS: dict[str, TuckerConfig | TernaryConfig] = {
    "Tucker": TuckerConfig(energy=0.8),
    "ternary": TernaryConfig(method="twn", linear=False),
}
LEARNING_RATE = 0.005  # of everything that can be trained; the levels train coefficients and BatchNorms alone
STAGES = 4


@dataclass
class Other:
    """One network on its way through the demo."""

    name: str
    network: nn.Module
    report: CompressionReport
    file: str
    file_bytes: int = 0
    accuracy_before: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def multiplies(self) -> bool:
        """Whether its convolutions multiply; ternary ones add."""
        return not any(isinstance(module, TernaryLayer) for module in self.network.modules())


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
