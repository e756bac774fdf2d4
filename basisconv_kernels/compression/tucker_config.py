"""What ``compress`` shall do by Tucker decomposition: the rule that sets the ranks, and when a layer stays dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from basisconv_kernels.compression.config import KEEP_DENSE

TUCKER_RULES = ("energy", "fraction", "ranks", "evbmf", "macs", "parameters", "latency")


@dataclass(frozen=True, kw_only=True)
class TuckerConfig:
    """How ``compress`` decomposes convolutions, ``W ≈ U_out · core · U_in``. Exactly one rule sets the ranks.

    Args:
        energy: the ranks of least work that keep this share, 0..1, of the energy of a layer's filters; a mapping gives
            a share by layer.
        fraction: ``rank_in = ceil(fraction·C)``, ``rank_out = ceil(fraction·K)``, 0..1; a mapping gives one by layer.
        ranks: (rank_in, rank_out) themselves, or a mapping of them by layer.
        evbmf: EVBMF on both unfoldings; the number, 0..1, is the share of the way from there up to the full ranks.
            Filters of zeros mislead the noise estimate: remove them before.
        macs, parameters: most multiply-accumulates (an image), or parameters, of all convolutions together; a float up
            to 1 is a fraction of what the dense network has. Ranks are given out by energy gained a cost.
        latency: most time of the convertible convolutions, as a fraction of the measured time of the dense ones.
        keep_dense: ``"auto"`` leaves a layer dense where the stages cost no fewer MACs, or hold no fewer parameters;
            ``"never"`` converts whatever can be converted.
        multiple_of: ranks are rounded up to a multiple, since a kernel's vectors are often full only then.
        rounds: most rounds of HOOI after the HOSVD, which lower the error further; 0 for the HOSVD alone.
        merge: use a ``BasisConv2d``, the output mode alone, where it costs no more MACs than the three stages do: in
            first layers of few channels, and in 1×1 and grouped convolutions, which have no other form.
        measure: also time the dense and the converted layer, at its input's shape, and with ``keep_dense="auto"``
            convert only where that is faster (except under a budget, which a layer left dense might overspend).

    Layers that a mapping does not name stay dense. Mappings are copied.

    Raises:
        ValueError, TypeError: no rule, more than one, or values out of range.

    Source: Kim et al. 2016, arXiv 1511.06530.
    """

    energy: float | Mapping[str, float] | None = None
    fraction: float | Mapping[str, float] | None = None
    ranks: tuple[int, int] | Mapping[str, tuple[int, int]] | None = None
    evbmf: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    keep_dense: str = "auto"
    multiple_of: int = 1
    rounds: int = 10
    merge: bool = True
    measure: bool = False

    def __post_init__(self) -> None:
        given = [rule for rule in TUCKER_RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise ValueError(
                f"TuckerConfig: exactly one rule for the ranks must be given of {', '.join(TUCKER_RULES)}, "
                f"got {' and '.join(given) if given else 'none'}"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, each.name, dict(value))
        for rule in ("energy", "fraction", "evbmf", "latency"):
            for value in self._values(rule):
                if not _is_number(value) or not 0 <= value <= 1 or (value == 0 and rule in ("fraction", "latency")):
                    bounds = "0..1, above 0" if rule in ("fraction", "latency") else "0..1"
                    raise ValueError(f"TuckerConfig: {rule} must lie in {bounds}, got {value!r}")
        for pair in self._values("ranks"):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_count(rank, 1) for rank in pair):
                raise ValueError(
                    f"TuckerConfig: ranks must be two ints of at least 1, (rank_in, rank_out), got {pair!r}"
                )
        for rule in ("macs", "parameters"):
            for value in self._values(rule):
                if not _is_number(value) or not value > 0 or math.isinf(value):
                    raise ValueError(f"TuckerConfig: {rule} must be a number above 0, got {value!r}")
        if self.keep_dense not in KEEP_DENSE:
            raise ValueError(f"TuckerConfig: keep_dense must be 'auto' or 'never', got {self.keep_dense!r}")
        for name, least in (("multiple_of", 1), ("rounds", 0)):
            if not _is_count(getattr(self, name), least):
                raise ValueError(
                    f"TuckerConfig: {name} must be an int of at least {least}, got {getattr(self, name)!r}"
                )

    def _values(self, rule: str) -> list[Any]:
        value = getattr(self, rule)
        return [] if value is None else list(value.values()) if isinstance(value, Mapping) else [value]

    @property
    def rule(self) -> str:
        """Name of the rule that is given."""
        return next(rule for rule in TUCKER_RULES if getattr(self, rule) is not None)

    def named_layers(self) -> tuple[str, ...] | None:
        """The layers that the rule's mapping names; None where one value serves all."""
        value = getattr(self, self.rule)
        return tuple(value) if isinstance(value, Mapping) else None

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Tucker: {', '.join(shown)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
