"""The method of ``StackedBinaryConfig``: convolutions become ``StackedBinaryConv2d`` layers by the alternating fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.methods import Method, Task, own_layers, register_method
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.survey import ConvLayer, evaluating, run, substitute, survey, watching
from basisconv_kernels.core.estimators import ESTIMATORS
from basisconv_kernels.layers.conversion import dense_parameters
from basisconv_kernels.layers.decompose import break_even
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.stacked_binary_conv2d_fit import StackedFit, fit_stacked, stored_bytes


@dataclass(frozen=True, kw_only=True)
class StackedBinaryConfig:
    """How ``compress`` turns convolutions into stacked low-dimensional binary filters.

    Args:
        splits (int): parts of a group's channels, each filled with one filter of the bank; layers whose channels do
            not divide stay dense.
        bank (int or float): n, the filters of a layer's bank; a float up to 1 is a fraction of its K filters, rounded
            up.
        scale (bool): a trained factor an output; it costs 32 bits an output, and a BatchNorm behind the layer does
            the same.
        binarize_input (bool): take the signs of the input too (XNOR mode); train it, accuracy is lost without. Layers
            whose input is never negative, as behind a ReLU, stay dense; ``BinaryConfig`` puts a BatchNorm in front.
        keep_first (bool): the first convolution that the network calls stays dense, as is usual for binary networks.
        estimator (str): straight-through estimator of the layers.
        rounds, seed (int): of the alternating fit.

    Fine-tune the result (``finetune``), then ``freeze_bits`` and save it: bank and index are stored as bits.
    """

    splits: int
    bank: int | float
    scale: bool = True
    binarize_input: bool = False
    keep_first: bool = True
    estimator: str = "clip"
    rounds: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("splits", "rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"StackedBinaryConfig: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"StackedBinaryConfig: {name} must be at least 1, got {value}")
        if not isinstance(self.bank, (int, float)) or isinstance(self.bank, bool):
            raise TypeError(f"StackedBinaryConfig: bank must be an int, or a float for a fraction, got {self.bank!r}")
        if not (self.bank >= 1 if isinstance(self.bank, int) else 0 < self.bank <= 1):
            raise ValueError(
                f"StackedBinaryConfig: bank must be at least 1, or a fraction of the filters above 0 and up to 1.0, "
                f"got {self.bank!r}"
            )
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"StackedBinaryConfig: estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}"
            )

    def bank_for(self, filters: int) -> int:
        """N for a layer of K filters."""
        return self.bank if isinstance(self.bank, int) else math.ceil(round(self.bank * filters, 9))

    def __str__(self) -> str:
        kind = "stacked binary, real input" if not self.binarize_input else "stacked binary, signs of the input"
        return f"{kind}, splits {self.splits}, bank {self.bank}{'' if self.scale else ', no scale'}"


def freeze_bits(model: nn.Module) -> nn.Module:
    """Freeze every layer of this package that trains latents of bits, in place; returns the network.

    The latents are gone then, and files hold bits: train before, not after.

    Args:
        model (Module): any network.
    """
    for module in model.modules():
        freeze = getattr(module, "freeze", None)
        if isinstance(module, own_layers()) and callable(freeze):
            freeze()
    return model


def convert(target: nn.Module, config: StackedBinaryConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Fit every convolution, then replace; the network, and a row for every convolution."""
    layers, first = _surveyed(target, task)
    unsigned = unsigned_inputs(target, layers, task.batches) if config.binarize_input else {}
    reasons: dict[str, str] = {}
    fits: dict[str, StackedFit] = {}
    for layer in layers:
        reason = task.why_not(layer) or _why_not(layer, config, first) or unsigned.get(layer.module)
        if reason is None:
            weight, _ = dense_parameters(layer.conv)
            if not torch.isfinite(weight).all():
                raise ValueError(f"compress: layer {layer.name!r} has NaN or infinite weights; nothing was changed")
            fits[layer.name] = fit_stacked(
                weight, config.bank_for(weight.shape[0]), config.splits, rounds=config.rounds, seed=config.seed
            )
        else:
            reasons[layer.name] = reason
    made = {
        layer.module: StackedBinaryConv2d.from_conv(
            layer.conv, bank=config.bank_for(layer.shape[0]), splits=config.splits, scale=config.scale,
            binarize_input=config.binarize_input, estimator=config.estimator, fitted=fits[layer.name],
        )
        for layer in layers
        if layer.name in fits
    }  # fmt: skip
    rows = tuple(_report(layer, config, fits.get(layer.name), reasons.get(layer.name, "")) for layer in layers)
    return substitute(target, made), rows


def unsigned_inputs(target: nn.Module, layers: Sequence[ConvLayer], batches: Sequence[Any]) -> dict[nn.Module, str]:
    """Convolutions whose input is never negative, as behind a ReLU, with what that means for its signs."""
    least: dict[nn.Module, float] = {}

    def watcher_for(module: nn.Module) -> Any:
        def watch(input: Tensor, output: Tensor) -> None:
            if input.numel():
                least[module] = min(least.get(module, 0.0), float(input.min()))

        return watch

    with evaluating(target), watching({layer.module: watcher_for(layer.module) for layer in layers}):
        for batch in batches:
            run(target, batch)
    what = "its input is never negative on the calibration inputs (behind a ReLU?), so all its signs would be +1"
    return {module: what for module, value in least.items() if value >= 0}


def _surveyed(target: nn.Module, task: Task) -> tuple[list[ConvLayer], nn.Module | None]:
    """The convolutions, and the one that is called first; a layer that an earlier step converted may be that one."""
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        called.append(module)

    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, *own_layers())
    handles = [m.register_forward_pre_hook(note) for m in target.modules() if isinstance(m, kinds)]
    # The hooks are for this run alone: a layer with hooks of its own would be kept.
    try:
        layers = survey(target, task.example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return layers, next(iter(called), None)


def _why_not(layer: ConvLayer, config: StackedBinaryConfig, first: nn.Module | None) -> str | None:
    """Why the method leaves a layer dense; None where it does not."""
    K, C, R, S, G = layer.shape
    if config.keep_first and layer.module is first:
        return "the first convolution stays dense (keep_first)"
    if C % (G * config.splits):
        return f"its {C // G} channels{' a group' if G > 1 else ''} do not divide into {config.splits} splits"
    bits = 8 * stored_bytes(config.bank_for(K), C // G // config.splits, R, S, K, config.splits)
    if bits >= 32 * layer.weights:
        return f"bank and index take {bits} bits, no fewer than its {layer.weights} float32 weights"
    return None


def _report(layer: ConvLayer, config: StackedBinaryConfig, fitted: StackedFit | None, reason: str) -> LayerReport:
    """Operations are additions, counted like multiply-accumulates; parameters are 32-bit words of storage."""
    K, C, R, S, G = layer.shape
    macs, parameters, error = layer.dense_macs, layer.dense_parameters, None
    if fitted is not None:
        n, splits = len(fitted.bank), config.splits
        macs = layer.pixels * (min(n * C * R * S + K * splits, layer.weights))
        stored = stored_bytes(n, C // G // splits, R, S, K, splits)
        parameters = -(-stored // 4) + (K if config.scale else 0) + layer.bias_parameters
        error = fitted.relative_error(dense_parameters(layer.conv)[0])
    return LayerReport(
        name=layer.name,
        verdict="kept" if fitted is None else "replaced",
        reason=reason,
        K=K,
        C=C,
        R=R,
        S=S,
        groups=G,
        break_even=break_even(K, layer.taps, G),
        basis_channels=None if fitted is None else len(fitted.bank),
        energy_kept=None if error is None else 1 - error**2,
        relative_error=error,
        macs_before=layer.dense_macs,
        macs_after=macs,
        parameters_before=layer.dense_parameters,
        parameters_after=parameters,
    )


register_method(Method(StackedBinaryConfig, convert, (StackedBinaryConv2d,)))
