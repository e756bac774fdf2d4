"""What ``compress`` shall do: the rule that sets the number of basis filters, and when a layer stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

RULES = ("energy", "fraction", "basis_channels", "macs", "parameters", "sensitivity", "latency")
KEEP_DENSE = ("auto", "never")
BASES = ("eigen", "random_orthogonal", "dct")
FRACTIONS = tuple(round(0.05 * step, 2) for step in range(19, 0, -1))  # .95, .90, … .05


@dataclass(frozen=True)
class Sensitivity:
    """Q by measurement: each layer alone is truncated further and further, without fine-tuning, until accuracy falls.

    ``Q = max(ceil(K·f), min_channels)`` with the least fraction f at which, as at every larger one, ``evaluate`` still
    gave ``min_accuracy``. A layer that already fails at the largest fraction stays at full rank.

    Args:
        evaluate: network in eval mode → accuracy; called once for the dense network, then for each truncation.
        min_accuracy: least accuracy, in the units of ``evaluate``.
        min_channels: least Q.
        fractions: of the K filters of a layer, each in 0..1, tried from the largest down.

    Source: the tables of the authors' code of Tayyab, Khan, Mahalanobis 2021, arXiv 2105.10436.
    """

    evaluate: Callable[[nn.Module], float] = field(repr=False)
    min_accuracy: float
    min_channels: int = 4
    fractions: Sequence[float] = FRACTIONS

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(f"Sensitivity: evaluate must be a function of the network, got {self.evaluate!r}")
        object.__setattr__(self, "fractions", tuple(sorted(self.fractions, reverse=True)))
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"Sensitivity: fractions must lie in 0..1, above 0, got {list(self.fractions)}")
        _at_least("Sensitivity", "min_channels", self.min_channels)


@dataclass(frozen=True, kw_only=True)
class BasisConfig:
    """How ``compress`` converts the convolutions of a network. Exactly one rule sets Q, the number of basis filters.

    Args:
        energy: least Q that keeps this share, 0..1, of the energy of a layer's filters; a mapping gives a share by
            layer.
        fraction: ``Q = ceil(fraction·K)``, 0..1; a mapping gives a fraction by layer.
        basis_channels: Q itself; a mapping gives Q by layer. Rounded up to a multiple of the groups, lowered to the
            rank.
        macs, parameters: most multiply-accumulates (an image), or parameters, of all convolutions together; a float up
            to 1 is a fraction of what the dense network has. Basis filters are given out by energy gained a cost.
        sensitivity: a ``Sensitivity``.
        latency: most time of the convertible convolutions, as a fraction of the measured time of the dense ones.
        keep_dense: ``"auto"`` leaves a layer dense where ``Q ≥ Q* = K·D/(D + K/G)``, from where the basis costs no
            less; ``"never"`` converts whatever can be converted.
        min_channels: least Q of every layer.
        multiple_of: Q is rounded up to a multiple, since a kernel's vectors are often full only then; never past the
            rank and never past Q*.
        measure: also time the dense and the converted layer, at its input's shape, and with ``keep_dense="auto"``
            convert only where that is faster (except under a budget, which a layer left dense might overspend).
        train_basis: the basis becomes a parameter; else it is frozen, and fine-tuning reaches the coefficients alone.
        basis_norm: insert a BatchNorm between the stages, calibrated to the identity of eval mode.
        basis: ``"eigen"`` takes basis and coefficients from the weights; ``"random_orthogonal"`` and ``"dct"`` draw a
            basis of that size and random coefficients, for training from scratch: nothing of the weights is left, and
            the basis stays as drawn unless ``train_basis``. Random numbers are PyTorch's.
        data_aware: truncate for the least error of a layer's output on the calibration inputs instead of its filters'.

    Layers that a mapping does not name stay dense. Mappings and sequences are copied.

    Raises:
        ValueError, TypeError: no rule, more than one, or values out of range.
    """

    energy: float | Mapping[str, float] | None = None
    fraction: float | Mapping[str, float] | None = None
    basis_channels: int | Mapping[str, int] | None = None
    macs: float | None = None
    parameters: float | None = None
    sensitivity: Sensitivity | None = None
    latency: float | None = None
    keep_dense: str = "auto"
    min_channels: int = 1
    multiple_of: int = 1
    measure: bool = False
    train_basis: bool = False
    basis_norm: bool = False
    data_aware: bool = False
    basis: str = "eigen"

    def __post_init__(self) -> None:
        given = [rule for rule in RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise ValueError(
                f"BasisConfig: exactly one rule for Q must be given of {', '.join(RULES)}, "
                f"got {' and '.join(given) if given else 'none'}"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                object.__setattr__(self, each.name, dict(value))
        for rule in ("energy", "fraction"):
            _in_unit_range(rule, getattr(self, rule), zero=rule == "energy")
        _in_unit_range("latency", self.latency, zero=False)
        if self.basis_channels is not None:
            many = self.basis_channels.values() if isinstance(self.basis_channels, Mapping) else [self.basis_channels]
            for value in many:
                _at_least("BasisConfig", "basis_channels", value)
        for rule in ("macs", "parameters"):
            value = getattr(self, rule)
            if value is not None and (not _is_number(value) or not value > 0 or math.isinf(value)):
                raise ValueError(f"BasisConfig: {rule} must be a number above 0, got {value!r}")
        if self.sensitivity is not None and not isinstance(self.sensitivity, Sensitivity):
            raise TypeError(f"BasisConfig: sensitivity must be a Sensitivity, got {type(self.sensitivity).__name__}")
        if self.keep_dense not in KEEP_DENSE:
            raise ValueError(f"BasisConfig: keep_dense must be 'auto' or 'never', got {self.keep_dense!r}")
        if self.basis not in BASES:
            raise ValueError(f"BasisConfig: basis must be one of {', '.join(BASES)}, got {self.basis!r}")
        _at_least("BasisConfig", "min_channels", self.min_channels)
        _at_least("BasisConfig", "multiple_of", self.multiple_of)

    @property
    def rule(self) -> str:
        """Name of the rule that is given."""
        return next(rule for rule in RULES if getattr(self, rule) is not None)

    def named_layers(self) -> tuple[str, ...] | None:
        """The layers that the rule's mapping names; None where one value serves all."""
        value = getattr(self, self.rule)
        return tuple(value) if isinstance(value, Mapping) else None

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(shown)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_unit_range(name: str, value: Any, *, zero: bool) -> None:
    for number in value.values() if isinstance(value, Mapping) else [] if value is None else [value]:
        if not _is_number(number) or not 0 <= number <= 1 or (number == 0 and not zero):
            bounds = "0..1" if zero else "0..1, above 0"
            raise ValueError(f"BasisConfig: {name} must lie in {bounds}, got {number!r}")


def _at_least(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
