"""From ordinary convolutions to basis convolutions and back: the rules that ``BasisConv2d``'s methods follow."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from basisconv_kernels.core.checks import Quad, padding4
from basisconv_kernels.layers import folding

if TYPE_CHECKING:
    from basisconv_kernels.layers.basis_conv2d_conversion import Convertible

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # of Conv2d
# Hooks of PyTorch's older reparametrisations: they compute the weight before every call.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def refusal(conv: nn.Module) -> str | None:
    """Why a module cannot become a basis convolution, in words; None when it can."""
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        return "is a transposed convolution"
    if not isinstance(conv, nn.Conv2d):
        return f"is a {type(conv).__name__}, not a Conv2d"
    kind = type(conv).__bases__[0] if parametrize.is_parametrized(conv) else type(conv)
    if kind is not nn.Conv2d:
        return f"is a {kind.__name__}, a subclass of Conv2d whose forward may differ"
    return None


def foreign_hooks(conv: nn.Module) -> bool:
    """Whether the module carries hooks that a conversion would lose."""
    pre_hooks = [hook for hook in conv._forward_pre_hooks.values() if not isinstance(hook, _WEIGHT_HOOKS)]
    return bool(pre_hooks or conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks)


def dense_parameters(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) as the next call in eval mode would use them, without gradients: parametrisations applied.

    The convolution stays as it is: eval mode keeps a spectral norm from taking another step of its power iteration.
    """
    flags = [(module, module.training) for module in conv.modules()]
    conv.eval()
    try:
        with torch.no_grad():
            values: dict[str, Any] = {"weight": conv.weight, "bias": conv.bias}
            for hook in conv._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):
                    values[hook.name] = hook.compute_weight(conv)
                elif isinstance(hook, SpectralNorm):
                    values[hook.name] = hook.compute_weight(conv, do_power_iteration=False)
                elif isinstance(hook, BasePruningMethod):
                    values[hook._tensor_name] = hook.apply_mask(conv)
    finally:
        for module, flag in flags:
            module.training = flag
    bias = values["bias"]
    weight: Tensor = values["weight"]
    return weight.detach(), None if bias is None else bias.detach()


def is_trained(conv: nn.Conv2d) -> bool:
    """Whether the convolution's weight, or what it is computed from, asks for gradients."""
    return any(p.requires_grad for name, p in conv.named_parameters() if "bias" not in name)


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """The constructor arguments that a BasisConv2d shares with the convolution."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }


def pair_coefficients(recombination: nn.Conv2d, groups: int, basis_channels: int, op: str) -> Tensor:
    """The coefficients [K, Q] or [K, Q/G] of the second convolution of a pair; a ValueError where it is none."""
    if recombination.kernel_size != (1, 1) or recombination.stride != (1, 1):
        raise ValueError(
            f"{op}: recombination_conv must be 1×1 with stride 1, got kernel_size {recombination.kernel_size} and "
            f"stride {recombination.stride}"
        )
    if any(padding4(op, recombination.padding, (1, 1), (1, 1), (1, 1))):
        raise ValueError(f"{op}: recombination_conv must have no padding, got {recombination.padding}")
    if recombination.in_channels != basis_channels:
        raise ValueError(
            f"{op}: recombination_conv must take the {basis_channels} channels that basis_conv gives, "
            f"it takes {recombination.in_channels}"
        )
    coefficients = dense_parameters(recombination)[0][:, :, 0, 0]
    if recombination.groups in (1, groups):
        return coefficients
    return folding.expand_compact(coefficients, recombination.groups)


def copied_norm(norm: nn.Module, channels: int, offset: Tensor | None, op: str) -> nn.BatchNorm2d:
    """A copy of the BatchNorm of a pair; an offset added in front of it moves into its running mean, exactly."""
    if type(norm) is not nn.BatchNorm2d or norm.num_features != channels:
        raise ValueError(f"{op}: basis_norm must be a BatchNorm2d over the {channels} basis maps, got {norm}")
    copied = copy.deepcopy(norm)
    if offset is not None and copied.running_mean is not None:
        copied.running_mean -= offset.to(copied.running_mean)
    return copied


def collapse(layer: Convertible, op: str) -> nn.Conv2d:
    """The one Conv2d that equals both stages; see ``BasisConv2d.to_conv``."""
    padding = conv_padding(layer.padding)
    if padding is None:
        raise ValueError(
            f"{op}: Conv2d has no asymmetric padding {layer.padding}; use to_plain(collapse=True), which pads first"
        )
    coefficients, bias = layer.folded_coefficients()
    weight, groups = folding.dense_weight(layer.basis_weight, coefficients, layer.groups)
    return _conv2d(
        layer, weight, bias, layer.coefficients.requires_grad, stride=layer.stride, padding=padding,
        dilation=layer.dilation, groups=groups, padding_mode=layer.padding_mode,
    )  # fmt: skip


def plain(layer: Convertible, *, collapsed: bool) -> nn.Sequential:
    """Ordinary modules that equal the layer; see ``BasisConv2d.to_plain``."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    mode = layer.padding_mode
    padding: Any = conv_padding(layer.padding)
    if padding is None:
        stages["pad"] = pad_module(layer.pad_amounts, mode)
        padding, mode = 0, "zeros"
    spatial = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "padding_mode": mode}
    coefficients, trained = layer.coefficients, layer.coefficients.requires_grad
    if collapsed:
        folded, bias = layer.folded_coefficients()
        weight, groups = folding.dense_weight(layer.basis_weight, folded, layer.groups)
        stages["conv"] = _conv2d(layer, weight, bias, trained, groups=groups, **spatial)
    else:
        compact = folding.is_compact(coefficients, layer.basis_weight, layer.groups)
        stages["basis"] = _conv2d(
            layer, layer.basis_weight, None, layer.basis_weight.requires_grad, groups=layer.groups, **spatial
        )
        if layer.basis_norm is not None:
            stages["basis_norm"] = copy.deepcopy(layer.basis_norm)
        stages["recombination"] = _conv2d(
            layer, coefficients[:, :, None, None], layer.bias, trained, groups=layer.groups if compact else 1
        )
    if layer.activation is not None:
        stages["activation"] = nn.ReLU() if layer.activation == "relu" else nn.ReLU6()
    made = nn.Sequential(stages).train(layer.training)
    if "basis_norm" in stages and layer.basis_norm is not None:
        stages["basis_norm"].train(layer.basis_norm.training)
    return made


def conv_padding(padding: Any) -> tuple[int, int] | str | None:
    """The padding as Conv2d takes it; None where it takes none such (asymmetric numbers)."""
    if isinstance(padding, str) or len(padding) == 2:
        return padding
    return None


def pad_module(amounts: Quad, mode: str) -> nn.Module:
    """A padding module for (top, bottom, left, right)."""
    kinds: dict[str, Any] = {
        "zeros": nn.ZeroPad2d,
        "reflect": nn.ReflectionPad2d,
        "replicate": nn.ReplicationPad2d,
        "circular": nn.CircularPad2d,
    }
    top, bottom, left, right = amounts
    return kinds[mode]((left, right, top, bottom))


def _conv2d(
    layer: Convertible, weight: Tensor, bias: Tensor | None, trained: bool, *, groups: int, **spatial: Any
) -> nn.Conv2d:
    """A Conv2d of the layer's dtype and device that holds copies of weight and bias."""
    K, taps_in, R, S = weight.shape
    # Built without values: initial ones would cost time and draw from the user's random numbers.
    conv = nn.Conv2d(taps_in * groups, K, (R, S), groups=groups, bias=bias is not None, device="meta", **spatial)
    like = layer.coefficients
    conv.weight = nn.Parameter(weight.detach().to(like, copy=True), requires_grad=trained)
    if bias is not None:
        asks = trained if layer.bias is None else layer.bias.requires_grad
        conv.bias = nn.Parameter(bias.detach().to(like, copy=True), requires_grad=asks)
    return conv
