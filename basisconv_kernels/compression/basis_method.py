"""The method of ``BasisConfig``: convolutions become ``BasisConv2d`` layers as ``plan`` decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from basisconv_kernels.compression import plan
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.methods import Method, Task, register_method
from basisconv_kernels.compression.names import resolve_exact
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.survey import ConvLayer, evaluating, run, substitute, survey, watching
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.calibration import ChannelMoments
from basisconv_kernels.layers.decompose import break_even


def check(model: nn.Module, config: BasisConfig) -> None:
    """Refuse a mapping that names what is no convolution of the network."""
    resolve_exact(model, config.rule, config.named_layers() or ())


def convert(target: nn.Module, config: BasisConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Decide for every convolution, then replace; the network, and a row for every convolution."""
    named_by_rule = resolve_exact(target, config.rule, config.named_layers() or ())
    layers = survey(target, task.example_inputs)
    reasons: dict[str, str] = {}
    for layer in layers:
        reason = task.why_not(layer)
        if reason is None and config.named_layers() is not None and layer.name not in named_by_rule:
            reason = f"not named in {config.rule}"
        if reason is not None:
            reasons[layer.name] = reason
    open_layers = [layer for layer in layers if layer.name not in reasons]
    decisions = plan.decide(target, layers, open_layers, config, named_by_rule, list(task.batches))

    replaced = {layer.module: d.basis for layer in open_layers if (d := decisions[layer.name]).basis is not None}
    for layer in open_layers:
        reasons[layer.name] = decisions[layer.name].reason
    rows = tuple(_report(layer, decisions.get(layer.name), reasons[layer.name]) for layer in layers)
    if config.basis != "eigen":
        for made in replaced.values():
            made.basis = config.basis
            made.reset_parameters()
        rows = tuple(replace(row, energy_kept=None, relative_error=None) for row in rows)
    target = substitute(target, replaced)
    if config.basis_norm:
        _insert_norms(target, list(replaced.values()), list(task.batches))
    return target, rows


def _insert_norms(model: nn.Module, layers: list[BasisConv2d], batches: list[Any]) -> None:
    """A calibrated BatchNorm between the stages of each layer, from the maps of the compressed network."""
    moments = {layer: ChannelMoments(layer.basis_channels) for layer in layers}

    def watcher_for(layer: BasisConv2d) -> Callable[[Any, Any], None]:
        return lambda input, output: moments[layer].add(layer.basis_maps(input))

    with evaluating(model), watching({layer: watcher_for(layer) for layer in layers}):
        for batch in batches:
            run(model, batch)
    for layer, found in moments.items():
        layer.set_basis_norm(found)


def _report(layer: ConvLayer, decision: plan.Decision | None, reason: str) -> LayerReport:
    K, C, R, S, G = layer.shape
    per_group = None if decision is None or decision.basis is None else decision.per_group
    replaced = decision is not None and per_group is not None
    return LayerReport(
        name=layer.name,
        verdict="replaced" if replaced else "kept",
        reason=reason,
        K=K,
        C=C,
        R=R,
        S=S,
        groups=G,
        break_even=break_even(K, layer.taps, G),
        basis_channels=None if per_group is None else per_group * G,
        energy_kept=decision.energy_kept if decision is not None and replaced else None,
        relative_error=decision.relative_error if decision is not None and replaced else None,
        macs_before=layer.dense_macs,
        macs_after=layer.dense_macs if per_group is None else layer.basis_macs(per_group),
        parameters_before=layer.dense_parameters,
        parameters_after=layer.dense_parameters if per_group is None else layer.basis_parameters(per_group),
        dense_ms=None if decision is None else decision.dense_ms,
        basis_ms=None if decision is None else decision.basis_ms,
    )


register_method(Method(BasisConfig, convert, (BasisConv2d,), check))
