"""What ``compress`` shall do by filter pruning: the criterion, and how many filters go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

CRITERIA = ("l1", "taylor", "duplicate")
PRUNE_RULES = ("fraction", "macs", "parameters", "threshold")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How ``compress`` removes filters, physically: no masks remain. One rule says how many.

    Channels that belong together (through additions, depthwise convolutions, concatenations, flattening) go together.
    The inputs and outputs of the network stay, and so does what reaches an operation that channels cannot be followed
    through; the report says which.

    Args:
        criterion: ``"l1"``: Σ|w| of a filter over the mean of its layer; ``"taylor"``: |mean over pixels of dL/dz·z|,
            averaged over the samples, over the length of the layer's; ``"duplicate"``: filters, with their bias, whose
            cosine with an earlier filter of the layer is at least ``threshold``.
        fraction: of the filters of every layer, or set of tied layers, 0..1 below 1; the least ones go.
        macs, parameters: most of all convolutions together; a float up to 1 is a fraction of what the network has. The
            least filters of the whole network go until that holds.
        threshold: of ``"duplicate"`` alone, its only rule: 0..1 above 0.
        loss: for ``"taylor"``: (network, batch) → scalar loss; batches are those of ``calibration``.
        min_channels: least channels that a layer keeps.
        multiple_of: with ``fraction``: layers keep a multiple, rounded up.

    Raises:
        ValueError, TypeError: no rule, more than one, or values out of range.

    Sources: Li et al. 2017, arXiv 1608.08710 (L1); Molchanov et al. 2017, arXiv 1611.06440 (Taylor).
    """

    criterion: str = "l1"
    fraction: float | None = None
    macs: float | None = None
    parameters: float | None = None
    threshold: float | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = field(default=None, repr=False)
    min_channels: int = 1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"PruneConfig: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        given = [rule for rule in PRUNE_RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise ValueError(
                f"PruneConfig: exactly one rule must be given of {', '.join(PRUNE_RULES)}, "
                f"got {' and '.join(given) if given else 'none'}"
            )
        if (self.criterion == "duplicate") != (self.threshold is not None):
            raise ValueError("PruneConfig: threshold is the rule of criterion='duplicate', and of that alone")
        if (self.criterion == "taylor") != (self.loss is not None):
            raise ValueError("PruneConfig: criterion='taylor', and no other, needs loss, (network, batch) → Tensor")
        for rule, most in (("fraction", 1.0), ("threshold", math.inf)):
            value = getattr(self, rule)
            if value is not None and not (_is_number(value) and 0 <= value <= 1 and value < most):
                raise ValueError(f"PruneConfig: {rule} must lie in 0..1, got {value!r}")
        for rule in ("macs", "parameters"):
            value = getattr(self, rule)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"PruneConfig: {rule} must be a number above 0, got {value!r}")
        for name in ("min_channels", "multiple_of"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"PruneConfig: {name} must be an int of at least 1, got {value!r}")

    @property
    def rule(self) -> str:
        """Name of the rule that is given."""
        return next(rule for rule in PRUNE_RULES if getattr(self, rule) is not None)

    def __str__(self) -> str:
        left_out = ("criterion", "loss")
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)
                 if f.name not in left_out and getattr(self, f.name) != f.default]  # fmt: skip
        return f"Prune: {', '.join([self.criterion, *shown])}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
