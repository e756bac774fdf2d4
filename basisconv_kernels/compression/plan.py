"""The decision of ``compress`` for every convolution that may be replaced; nothing of the network is changed here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from basisconv_kernels.compression import ranks
from basisconv_kernels.compression.basis import PatchCorrelation
from basisconv_kernels.compression.config import BasisConfig, Sensitivity
from basisconv_kernels.compression.ranks import Option, Rankable
from basisconv_kernels.compression.survey import ConvLayer, evaluating, run, substitute, watching
from basisconv_kernels.compression.timing import measure_ms, random_like
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.conversion import dense_parameters
from basisconv_kernels.layers.decompose import FilterSpectrum, break_even, decompose

LATENCY_STEPS = 8  # basis sizes that the latency rule times in each layer
VECTOR = 8  # and rounds up to: float32 numbers in the narrowest vector of the CPU kernels
BUDGETS = {"macs": "dense_macs", "parameters": "dense_parameters"}


@dataclass
class Decision:
    """What becomes of one layer; ``basis`` is its replacement, None where it stays dense for the ``reason``.

    ``per_group`` is Q/G, None where the rule itself chose the dense layer.
    """

    per_group: int | None
    reason: str = ""
    energy_kept: float = 1.0
    relative_error: float = 0.0
    basis: BasisConv2d | None = None
    dense_ms: float | None = None
    basis_ms: float | None = None


def decide(
    model: nn.Module,
    layers: list[ConvLayer],
    open_layers: list[ConvLayer],
    config: BasisConfig,
    named_by_rule: dict[str, str],
    batches: list[Any],
) -> dict[str, Decision]:
    """A decision for each of ``open_layers``.

    Args:
        model: the network, unchanged afterwards; run for ``data_aware`` and the sensitivity rule.
        layers: all convolutions, since a budget counts all.
        open_layers: those that may be replaced.
        config: the rule.
        named_by_rule: {layer name: the name under which the rule's mapping holds its value}.
        batches: inputs of the network, for ``data_aware``.
    """
    spectra = _spectra(model, open_layers, config, batches)
    ranked = {
        layer.name: ranks.rankable(
            layer.name, layer.shape[0], spectra[layer.name], layer.pixels, config.min_channels, config.multiple_of
        )
        for layer in open_layers
    }
    value = getattr(config, config.rule)
    if config.rule in BUDGETS:
        decisions = _by_budget(layers, ranked, config, value)
    elif config.rule == "sensitivity":
        decisions = _by_sensitivity(model, open_layers, ranked, value)
    elif config.rule == "latency":
        decisions = _by_latency(open_layers, ranked, value, keep_dense=config.keep_dense == "auto")
    else:
        decisions = {}
        for name, facts in ranked.items():
            decisions[name] = _one_layer(name, facts, config, named_by_rule)
    for layer in open_layers:
        _settle(decisions[layer.name], layer, ranked[layer.name], config)
    return decisions


def _spectra(
    model: nn.Module, layers: list[ConvLayer], config: BasisConfig, batches: list[Any]
) -> dict[str, FilterSpectrum]:
    correlations = {layer.name: PatchCorrelation(layer.conv) for layer in layers} if config.data_aware else {}

    def watcher_for(layer: ConvLayer) -> Callable[[Tensor, Tensor], None]:
        return lambda input, output: correlations[layer.name].add(input)

    if correlations:
        with evaluating(model), watching({layer.module: watcher_for(layer) for layer in layers}):
            for batch in batches:
                run(model, batch)
    return {
        layer.name: decompose(
            dense_parameters(layer.conv)[0],
            layer.module.groups,
            correlations[layer.name].value if config.data_aware else None,
            name=f"compress: layer {layer.name!r}",
        )
        for layer in layers
    }


def _one_layer(name: str, facts: Rankable, config: BasisConfig, named_by_rule: dict[str, str]) -> Decision:
    """The rules that look at one layer alone: energy, fraction, basis_channels."""
    value = getattr(config, config.rule)
    wish = value[named_by_rule[name]] if isinstance(value, dict) else value
    if config.rule == "energy":
        return Decision(facts.spectrum.channels_for_energy(wish))
    if config.rule == "fraction":
        return Decision(ranks.by_fraction(facts.K, facts.groups, wish))
    decision = Decision(math.ceil(wish / facts.groups))
    if wish % facts.groups:
        decision.reason = f"Q = {wish} rounded up to a multiple of the {facts.groups} groups"
    if decision.per_group is not None and decision.per_group > facts.spectrum.cap:
        decision.reason = f"Q = {wish} lowered to the rank of the filters"
        if isinstance(value, dict):
            warnings.warn(f"compress: layer {name!r}: {decision.reason}", stacklevel=5)
    return decision


def _by_budget(
    layers: list[ConvLayer], ranked: dict[str, Rankable], config: BasisConfig, budget: float
) -> dict[str, Decision]:
    """The budget is of all convolutions together: what stays dense, and every bias, is paid for first."""
    rule = config.rule
    hopeless = {name for name, facts in ranked.items() if config.keep_dense == "auto" and not facts.pays(facts.least)}
    ranked = {name: facts for name, facts in ranked.items() if name not in hopeless}
    total = sum(getattr(layer, BUDGETS[rule]) for layer in layers)
    absolute = budget * total if isinstance(budget, float) and budget <= 1 else budget
    fixed = sum(getattr(layer, BUDGETS[rule]) for layer in layers if layer.name not in ranked)
    if rule == "parameters":
        fixed += sum(layer.bias_parameters for layer in layers if layer.name in ranked)
    chosen = ranks.by_budget(list(ranked.values()), absolute - fixed, rule)
    stay = {name: Decision(None, "no basis of it costs less than dense") for name in hopeless}
    return stay | {name: Decision(per_group) for name, per_group in chosen.items()}


def _by_sensitivity(
    model: nn.Module, layers: list[ConvLayer], ranked: dict[str, Rankable], rule: Sensitivity
) -> dict[str, Decision]:
    """Truncate one layer at a time, as a dense convolution of the same shape, and ask the user's function."""

    def accuracy(network: nn.Module) -> float:
        with evaluating(network):
            return float(rule.evaluate(network))

    base = accuracy(model)
    if base < rule.min_accuracy:
        raise ValueError(
            f"compress: the dense network has accuracy {base}, below min_accuracy = {rule.min_accuracy}, so no "
            "truncation can pass; lower min_accuracy"
        )
    decisions = {}
    for layer in layers:
        facts = ranked[layer.name]

        def passes(per_group: int, layer: ConvLayer = layer, facts: Rankable = facts) -> bool:
            truncated = _basis(layer, facts, per_group).to_conv()
            network = substitute(model, {layer.module: truncated})
            try:
                return accuracy(network) >= rule.min_accuracy
            finally:
                substitute(network, {truncated: layer.module})

        decisions[layer.name] = Decision(ranks.by_sensitivity(facts, rule.fractions, rule.min_channels, passes))
    return decisions


def _by_latency(
    layers: list[ConvLayer], ranked: dict[str, Rankable], share: float, *, keep_dense: bool
) -> dict[str, Decision]:
    options = {layer.name: _timed_options(layer, ranked[layer.name], keep_dense) for layer in layers}
    chosen = ranks.by_latency(options, share, keep_dense=keep_dense)
    decisions = {}
    for name, per_group in chosen.items():
        times = {option.per_group: option.ms for option in options[name]}
        decisions[name] = Decision(per_group, dense_ms=times[None])
        if per_group is None:
            decisions[name].reason = "measured: dense keeps most energy for its time"
        else:
            decisions[name].basis_ms = times[per_group]
    return decisions


def _basis(layer: ConvLayer, facts: Rankable, per_group: int, *, train_basis: bool = False) -> BasisConv2d:
    return BasisConv2d.from_conv(
        layer.conv, basis_channels=per_group * facts.groups, train_basis=train_basis, spectrum=facts.spectrum
    )


def _measure(layer: ConvLayer, bases: list[BasisConv2d]) -> list[float]:
    """Milliseconds of the dense layer and of the others, at the layer's own input shape."""
    if layer.example is None:
        raise RuntimeError(f"compress: layer {layer.name!r} was never called, so there is no input shape to time it at")
    input = random_like(layer.example, next(layer.module.parameters()).device)
    return measure_ms([layer.module, *bases], input)


def _timed_options(layer: ConvLayer, facts: Rankable, keep_dense: bool) -> list[Option]:
    """The dense layer and a range of basis sizes below break-even, each timed."""
    cap = facts.spectrum.cap
    sizes = {facts.settle(math.ceil(cap * step / LATENCY_STEPS)) for step in range(1, LATENCY_STEPS + 1)}
    sizes = {min(math.ceil(size * facts.groups / VECTOR) * VECTOR // facts.groups, cap) for size in sizes} - {0}
    useful = sorted(size for size in sizes if facts.pays(size)) or ([] if keep_dense else [min(sizes)])
    dense_ms, *times = _measure(layer, [_basis(layer, facts, size) for size in useful])
    options = [Option(dense_ms, 1.0, None)]
    return options + [
        Option(ms, facts.spectrum.kept_energy(size), size) for ms, size in zip(times, useful, strict=True)
    ]


def _settle(decision: Decision, layer: ConvLayer, facts: Rankable, config: BasisConfig) -> None:
    """Fix Q within its bounds, keep the layer dense where that is no worse, else build the replacement."""
    if decision.per_group is None:
        return
    if config.rule not in BUDGETS and config.rule != "latency":  # those two have settled their Q already
        decision.per_group = facts.settle(decision.per_group)
    per_group, Q = decision.per_group, decision.per_group * facts.groups
    if config.keep_dense == "auto" and not facts.pays(per_group):
        limit = break_even(facts.K, facts.taps, facts.groups)
        decision.reason = f"Q = {Q} is not below Q* = {limit:.2f}, so dense costs no more"
        return
    basis = _basis(layer, facts, per_group, train_basis=config.train_basis)
    if config.measure and decision.basis_ms is None:
        decision.dense_ms, decision.basis_ms = _measure(layer, [basis])
        slower = decision.basis_ms >= decision.dense_ms
        if slower and config.keep_dense == "auto" and config.rule not in BUDGETS:
            decision.reason = f"measured: no faster with Q = {Q}"
            return
    decision.basis = basis
    decision.energy_kept = facts.spectrum.kept_energy(per_group)
    decision.relative_error = facts.spectrum.relative_error(per_group)
