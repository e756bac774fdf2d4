"""Rules that set Q, the number of basis filters of each layer: energy, fraction, budgets, sensitivity, latency.

Every rule works in basis filters *per group* and stays within ``1 ≤ Q/G ≤ rank of the filters``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from basisconv_kernels.layers.decompose import FilterSpectrum, pays
from basisconv_kernels.layers.tucker_decompose import evbmf_rank


@dataclass(frozen=True)
class Rankable:
    """What the rules need to know of a layer.

    Attributes:
        name: for messages.
        K: output channels.
        spectrum: of its filters.
        macs, parameters: cost of one basis filter in every group, ``G·D + K`` times the pixels, or once.
        least: fewest basis filters per group, at most the rank.
        step: Q/G is raised by this much at a time.
    """

    name: str
    K: int
    spectrum: FilterSpectrum
    macs: int
    parameters: int
    least: int = 1
    step: int = 1

    @property
    def groups(self) -> int:
        """G."""
        return self.spectrum.groups

    @property
    def taps(self) -> int:
        """D."""
        return self.spectrum.rows.shape[2]

    def pays(self, per_group: int) -> bool:
        """Whether Q is below the break-even Q*."""
        return pays(per_group * self.groups, self.K, self.taps, self.groups)

    def settle(self, per_group: int) -> int:
        """The wish as it can be had: at least ``least``, in steps, never past the rank, and not past Q* by rounding."""
        wished = min(max(per_group, self.least), self.spectrum.cap)
        rounded = min(math.ceil(wished / self.step) * self.step, self.spectrum.cap)
        return wished if self.pays(wished) and not self.pays(rounded) else rounded


def rankable(
    name: str, K: int, spectrum: FilterSpectrum, pixels: int, min_channels: int = 1, multiple_of: int = 1
) -> Rankable:
    """A ``Rankable`` from the layer's facts; ``min_channels`` and ``multiple_of`` count Q over all groups."""
    G, taps = spectrum.groups, spectrum.rows.shape[2]
    unit = G * taps + K
    least = min(math.ceil(min_channels / G), spectrum.cap)
    return Rankable(name, K, spectrum, pixels * unit, unit, least, multiple_of // math.gcd(multiple_of, G))


def by_fraction(K: int, groups: int, fraction: float) -> int:
    """Q/G for ``Q = ceil(fraction·K)``, rounded up to a multiple of the groups."""
    # 0.55·20 is 11.000000000000002 in binary: what is whole up to rounding counts as whole.
    return max(1, math.ceil(round(fraction * K / groups, 9)))


def evbmf_per_group(spectrum: FilterSpectrum, weakening: float) -> int:
    """Q/G by EVBMF on the filters of each group, the largest of the groups; see ``tucker_decompose.evbmf_rank``.

    Args:
        spectrum: of the filters.
        weakening: 0..1, the share of the way from the EVBMF rank up to the rank of the filters.
    """
    found = max(1, *(evbmf_rank(mixing @ rows) for mixing, rows in zip(spectrum.mixing, spectrum.rows, strict=True)))
    return min(found, spectrum.cap) + math.floor(weakening * max(0, spectrum.cap - found))


def by_budget(layers: Sequence[Rankable], budget: float, cost: str) -> dict[str, int]:
    """Q/G of each layer, by most energy gained a cost, as long as the budget holds; it is never overspent.

    A further step of a layer gains ``Σ s²`` of the new filters over the layer's ``Σ s²``. Gains fall, so the greedy
    choice is the best for what it spends. A step that no longer fits ends its layer; cheaper layers may go on.

    Args:
        layers: what may be given filters; each starts at its ``least``.
        budget: most total cost of these layers.
        cost ("macs" or "parameters"): attribute of ``Rankable`` to spend.

    Raises:
        ValueError: the least of every layer together is more than the budget.
    """
    chosen = {layer.name: layer.least for layer in layers}
    left = budget - sum(getattr(layer, cost) * layer.least for layer in layers)
    if left < 0:
        raise ValueError(
            f"compress: a budget of {budget:.0f} {cost} for the convertible convolutions is less than their least, "
            f"{budget - left:.0f}; raise the budget, or lower min_channels"
        )
    queue: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        layer = layers[index]
        gain, size = _next_step(layer, chosen[layer.name])
        if size:
            heapq.heappush(queue, (-gain / (size * getattr(layer, cost)), index))

    for index in range(len(layers)):
        offer(index)
    while queue:
        _, index = heapq.heappop(queue)
        layer = layers[index]
        _, size = _next_step(layer, chosen[layer.name])
        price = size * getattr(layer, cost)
        if price <= left:
            left -= price
            chosen[layer.name] += size
            offer(index)
    return chosen


def _next_step(layer: Rankable, per_group: int) -> tuple[float, int]:
    """(energy gained, size) of the next step; size 0 at the rank. The first one reaches the next multiple."""
    size = min(layer.step - per_group % layer.step, layer.spectrum.cap - per_group)
    if size <= 0:
        return 0.0, 0
    energies = layer.spectrum.energies
    total = float(energies.sum())
    return (float(energies[per_group : per_group + size].sum()) / total if total else 0.0), size


def by_sensitivity(
    layer: Rankable, fractions: Sequence[float], min_channels: int, passes: Callable[[int], bool]
) -> int:
    """Q/G at the least fraction of K that passes, as every larger one does; the rank where the largest already fails.

    Args:
        layer: the layer under test.
        fractions: of K, falling.
        min_channels: least Q.
        passes: Q/G → whether the network with this layer truncated is still good enough.
    """
    cap = layer.spectrum.cap
    best, tested = cap, cap  # nothing is lost at the rank
    for fraction in fractions:
        per_group = min(by_fraction(layer.K, layer.groups, fraction), cap)
        if per_group != tested and not passes(per_group):
            break
        best = tested = per_group
    return max(best, min(math.ceil(min_channels / layer.groups), cap))


class Option(NamedTuple):
    """One way to run a layer: measured milliseconds, or another cost, energy kept, and Q/G or another number of the
    way, None for the dense convolution.
    """

    ms: float
    energy: float
    per_group: int | None


def by_latency(
    options: Mapping[str, Sequence[Option]], share: float, *, keep_dense: bool = True
) -> dict[str, int | None]:
    """The option of each layer that keeps most energy within a share of the dense layers' time, as ``within`` does.

    Args:
        options: by layer name; each holds the dense one.
        share: of the sum of the dense times, 0..1.
        keep_dense: whether the dense option may be chosen.

    Raises:
        ValueError: the fastest options together take longer.
    """
    dense = sum(next(o.ms for o in many if o.per_group is None) for many in options.values())
    allowed = {
        name: [option for option in many if keep_dense or option.per_group is not None]
        for name, many in options.items()
    }
    chosen = within(allowed, share * dense)
    if chosen is None:
        least = sum(min(option.ms for option in many) for many in allowed.values())
        raise ValueError(
            f"compress: latency={share} asks for {share * dense:.3f} ms in the convertible convolutions, but their "
            f"fastest options take {least:.3f} ms of {dense:.3f} ms dense; ask for more time, or use another rule"
        )
    return chosen


def within(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, int | None] | None:
    """The option of each layer that keeps most energy within a limit of time, or of another cost in ``ms``.

    Each layer starts at its cheapest option; then the step with most energy gained a cost is taken, along the upper
    hull of the layer's options, as long as the limit holds. None where the cheapest options together exceed it.
    """
    hulls = {name: _hull(many) for name, many in options.items()}
    taken = dict.fromkeys(hulls, 0)
    left = limit - sum(hull[0].ms for hull in hulls.values())
    if left < 0:
        return None
    slopes = [
        ((after.energy - before.energy) / (after.ms - before.ms), name, position)
        for name, hull in hulls.items()
        for position, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    for _, name, position in sorted(slopes, key=lambda step: -step[0]):
        hull = hulls[name]
        price = hull[position + 1].ms - hull[position].ms
        if taken[name] == position and price <= left:
            left -= price
            taken[name] += 1
    return {name: hull[taken[name]].per_group for name, hull in hulls.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of time: rising in time and energy, with falling slope."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.ms, -o.energy)):
        if hull and option.energy <= hull[-1].energy:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (after.energy - before.energy) / (after.ms - before.ms) if after.ms > before.ms else math.inf
