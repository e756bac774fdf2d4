"""The method of ``BinaryConfig``: convolutions become ``BinaryConv2d`` layers, each BatchNorm → sign → convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.methods import Method, Task, register_method
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.stacked_binary import unsigned_inputs
from basisconv_kernels.compression.survey import ConvLayer, evaluating, run, substitute, survey, watching
from basisconv_kernels.core.estimators import ESTIMATORS
from basisconv_kernels.core.packed import words_for
from basisconv_kernels.layers.binary_conv2d import SCALINGS, BinaryConv2d
from basisconv_kernels.layers.calibration import ChannelMoments
from basisconv_kernels.layers.conversion import dense_parameters
from basisconv_kernels.layers.decompose import break_even
from basisconv_kernels.ops.binary_conv2d_scaling import filter_scale


@dataclass(frozen=True, kw_only=True)
class BinaryConfig:
    """How ``compress`` turns convolutions into XNOR-Net's blocks: BatchNorm, signs of the input, signs of the filters.

    ``W[k] ≈ α[k]·sign(W[k])`` with ``α[k] = mean |W[k]|``, the least-squares scale of binary-weight networks.

    Args:
        scaling (None, "mean" or "learned"): α: the mean magnitude as the weights are trained, a parameter that starts
            there, or none, for a BatchNorm behind the layer.
        filters_per_scale (int): neighbouring filters that share one α.
        input_norm (bool): a BatchNorm in front of every sign, which starts with the statistics of the calibration
            inputs. Without it, layers stay dense whose input is never negative there, since all its signs would be +1.
        input_scale (bool): multiply with the mean magnitudes of the input around each pixel, as in XNOR-Net's paper;
            layers with groups stay dense then, and activations cannot stay packed between layers.
        keep_first, keep_last (bool): the first convolution that the network calls, and the last layer if that is a
            convolution, stay dense, as is usual for binary networks.
        estimator (str): straight-through estimator of both signs.

    The result needs training: a sign keeps little of its input. Then ``pack_activations`` or ``freeze_bits``.

    Source: Rastegari, Ordonez, Redmon, Farhadi 2016, arXiv 1603.05279.
    """

    scaling: str | None = "mean"
    filters_per_scale: int = 1
    input_norm: bool = True
    input_scale: bool = False
    keep_first: bool = True
    keep_last: bool = True
    estimator: str = "clip"

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"BinaryConfig: scaling must be None, 'mean' or 'learned', got {self.scaling!r}")
        if not isinstance(self.filters_per_scale, int) or isinstance(self.filters_per_scale, bool):
            raise TypeError(f"BinaryConfig: filters_per_scale must be an int, got {self.filters_per_scale!r}")
        if self.filters_per_scale < 1:
            raise ValueError(f"BinaryConfig: filters_per_scale must be at least 1, got {self.filters_per_scale}")
        if self.filters_per_scale > 1 and self.scaling is None:
            raise ValueError("BinaryConfig: filters_per_scale shares scales, so scaling must be 'mean' or 'learned'")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"BinaryConfig: estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")

    def __str__(self) -> str:
        shown = [f"binary, scaling {self.scaling}"]
        shown += [f"one for {self.filters_per_scale} filters"] if self.filters_per_scale > 1 else []
        shown += [] if self.input_norm else ["no BatchNorm in front"]
        shown += ["scaled by the input"] if self.input_scale else []
        return ", ".join(shown)

    def scale_group(self, filters: int) -> Tensor | None:
        """Which scale each of K filters takes; None where each has its own."""
        return None if self.filters_per_scale == 1 else torch.arange(filters) // self.filters_per_scale


def convert(target: nn.Module, config: BinaryConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Look at every input, then replace; the network, and a row for every convolution."""
    order = list(_called(target, task.example_inputs))
    layers = survey(target, task.example_inputs)
    reasons = {layer.name: task.why_not(layer) or _why_not(layer, config, order) for layer in layers}
    wanted = [layer for layer in layers if reasons[layer.name] is None]
    for layer in wanted:
        if not torch.isfinite(dense_parameters(layer.conv)[0]).all():
            raise ValueError(f"compress: layer {layer.name!r} has NaN or infinite weights; nothing was changed")
    seen = _inputs_of(target, wanted, task.batches)
    unsigned = {} if config.input_norm else unsigned_inputs(target, wanted, task.batches)
    made: dict[nn.Module, nn.Module] = {}
    for layer in wanted:
        if layer.module in unsigned:
            reasons[layer.name] = f"{unsigned[layer.module]}; input_norm=True puts a BatchNorm in front"
        else:
            made[layer.module] = _binary(layer, config, seen[layer.module])
    rows = tuple(_report(layer, config, reasons[layer.name]) for layer in layers)
    return substitute(target, made), rows


def _called(target: nn.Module, example_inputs: Any) -> Iterator[nn.Module]:
    """Convolutions and linear layers in the order of their calls."""
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        called.append(module)

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    handles = [m.register_forward_pre_hook(note) for m in target.modules() if isinstance(m, kinds)]
    # The hooks are for this run alone: a layer with hooks of its own would be kept.
    try:
        survey(target, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    yield from called


def _why_not(layer: ConvLayer, config: BinaryConfig, order: Sequence[nn.Module]) -> str | None:
    """Why the method leaves a layer dense; None where it does not."""
    _, C, _, _, G = layer.shape
    convolutions = [module for module in order if isinstance(module, nn.Conv2d)]
    if config.keep_first and layer.module is convolutions[0]:
        return "the first convolution stays dense (keep_first)"
    if config.keep_last and layer.module is order[-1]:
        return "the last layer stays dense (keep_last)"
    if layer.module.padding_mode != "zeros":
        return f"pads with padding_mode={layer.module.padding_mode!r}, which a binary convolution does not"
    if config.input_scale and G > 1:
        return "has groups, and input_scale is a mean over all channels"
    if C // G == 1:
        return "has one channel a filter: a word of 32 bits would hold one of its signs"
    return None


def _inputs_of(
    target: nn.Module, layers: Sequence[ConvLayer], batches: Sequence[Any]
) -> dict[nn.Module, ChannelMoments]:
    """Mean and variance of the layers' inputs, channel by channel."""
    seen: dict[nn.Module, ChannelMoments] = {layer.module: ChannelMoments(layer.shape[1]) for layer in layers}

    def watcher_for(moments: ChannelMoments) -> Callable[[Tensor, Tensor], None]:
        return lambda input, output: moments.add(input)

    with evaluating(target), watching({module: watcher_for(moments) for module, moments in seen.items()}):
        for batch in batches:
            run(target, batch)
    return seen


def _binary(layer: ConvLayer, config: BinaryConfig, moments: ChannelMoments) -> BinaryConv2d:
    made = BinaryConv2d.from_conv(
        layer.conv, scaling=config.scaling, scale_group=config.scale_group(layer.shape[0]),
        input_scale=config.input_scale, input_norm=config.input_norm, estimator=config.estimator,
    )  # fmt: skip
    norm = made.input_norm
    if norm is not None and norm.running_mean is not None and norm.running_var is not None and moments.count:
        norm.running_mean.copy_(moments.mean)
        norm.running_var.copy_(moments.variance)
    return made


def _report(layer: ConvLayer, config: BinaryConfig, reason: str | None) -> LayerReport:
    """Pairs of signs are counted like multiply-accumulates; parameters are 32-bit words of storage."""
    K, C, R, S, G = layer.shape
    parameters, error = layer.dense_parameters, None
    if reason is None:
        scales = 0 if config.scaling is None else -(-K // config.filters_per_scale)
        parameters = K * R * S * words_for(C // G) + scales + layer.bias_parameters
        error = _relative_error(dense_parameters(layer.conv)[0], config)
    return LayerReport(
        name=layer.name,
        verdict="replaced" if reason is None else "kept",
        reason=reason or "",
        K=K,
        C=C,
        R=R,
        S=S,
        groups=G,
        break_even=break_even(K, layer.taps, G),
        basis_channels=None,
        energy_kept=None if error is None else 1 - error**2,
        relative_error=error,
        macs_before=layer.dense_macs,
        macs_after=layer.dense_macs,
        parameters_before=layer.dense_parameters,
        parameters_after=parameters,
    )


def _relative_error(weight: Tensor, config: BinaryConfig) -> float:
    """‖W − α·sign(W)‖ / ‖W‖ with least-squares α; 0 where all weights are."""
    wide = weight.double()
    group = config.scale_group(len(wide))
    group = None if group is None else group.to(wide.device)
    scale = filter_scale(wide, group)
    alpha = scale if group is None else scale[group]
    signs = torch.where(wide >= 0, 1.0, -1.0).to(wide)
    norm = float(wide.norm())
    return float((wide - alpha[:, None, None, None] * signs).norm()) / norm if norm else 0.0


register_method(Method(BinaryConfig, convert, (BinaryConv2d,)))
