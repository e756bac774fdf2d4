"""The layer kinds that ``compress`` and ``fold_batchnorm`` make: basis, Tucker and plain convolutions, identities.

Convolutions that stayed dense are described too: a file then fits no network of another stride, whose weights have the
same shapes, and a convolution that took in a BatchNorm may have a bias that the dense network does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.recipe import (
    BOOLEAN,
    FOLDABLE,
    NULL,
    LayerKind,
    difference,
    either,
    integer,
    number,
    one_of,
    record,
    register,
    sizes,
)
from basisconv_kernels.core.checks import ACTIVATIONS, FLOAT_DTYPES
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers import conversion, folding
from basisconv_kernels.layers.basis_conv2d import BASES, PADDING_MODES, BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}

_GEOMETRY = {
    "in_channels": integer(1),
    "out_channels": integer(1),
    "kernel_size": sizes(2, 1),
    "stride": sizes(2, 1),
    "padding": either(one_of("same", "valid"), sizes(2, 0), sizes(4, 0)),
    "dilation": sizes(2, 1),
    "groups": integer(1),
    "padding_mode": one_of(*PADDING_MODES),
    "bias": BOOLEAN,
}
_NORM = {
    "eps": number(0),
    "momentum": either(NULL, number(0)),
    "affine": BOOLEAN,
    "track_running_stats": BOOLEAN,
    "dtype": one_of(*_DTYPES),
}
_BASIS = {
    **_GEOMETRY,
    "basis_channels": integer(1),
    "basis": one_of(*BASES),
    "train_basis": BOOLEAN,
    "basis_norm": either(NULL, record(_NORM)),
    "compact": BOOLEAN,
    "activation": one_of(*ACTIVATIONS),
    "precise": BOOLEAN,
}


def _geometry(module: Any) -> dict[str, Any]:
    """What a Conv2d and the layers that replace it have in common."""
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": module.padding if isinstance(module.padding, str) else list(module.padding),
        "dilation": list(module.dilation),
        "groups": getattr(module, "groups", 1),
        "padding_mode": module.padding_mode,
        "bias": module.bias is not None,
    }


def _same_geometry(description: dict[str, Any], conv: nn.Module) -> None:
    """Refuse a module that is no dense convolution of this geometry; the bias apart, which folding may have added."""
    against = conversion.refusal(conv)
    if against is not None:
        raise ArchitectureError(f"the model's module {against}")
    differing = difference(description, {k: v for k, v in _geometry(conv).items() if k != "bias"})
    if differing:
        raise ArchitectureError(differing)
    if conv.bias is not None and not description["bias"]:
        raise ArchitectureError("it has no bias in the file, one in the model")


def _asks_for_gradients(layer: nn.Module, conv: nn.Module) -> None:
    """Give the trained tensors of a new layer the flags that a conversion of ``conv`` would give them."""
    trained = isinstance(conv, nn.Conv2d) and conversion.is_trained(conv)
    for name, parameter in layer.named_parameters(recurse=False):
        old_bias = conv.bias if name == "bias" else None
        if name != "basis_weight":
            parameter.requires_grad_(trained if not isinstance(old_bias, Tensor) else old_bias.requires_grad)


def _weight_dtype(conv: nn.Module) -> torch.dtype:
    return next(p.dtype for p in conv.parameters())


# --- convolutions that stayed dense -----------------------------------------------------------------------------------


def _rebuild_conv(description: dict[str, Any], module: nn.Module) -> nn.Module:
    _same_geometry(description, module)
    conv = nn.Conv2d(**_arguments(description), device="meta", dtype=_weight_dtype(module))
    _asks_for_gradients(conv, module)
    return conv.train(module.training)


def _arguments(description: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: lists become tuples, as the modules themselves store them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}


# --- basis convolutions -----------------------------------------------------------------------------------------------


def _describe_basis(layer: BasisConv2d) -> dict[str, Any]:
    norm = layer.basis_norm
    return {
        **_geometry(layer),
        "basis_channels": layer.basis_channels,
        "basis": layer.basis,
        "train_basis": layer.trains_basis,
        "basis_norm": None if norm is None else _describe_norm(norm),
        "compact": layer.groups == 1 or folding.is_compact(layer.coefficients, layer.basis_weight, layer.groups),
        "activation": layer.activation,
        "precise": layer.precise,
    }


def _describe_norm(norm: nn.BatchNorm2d) -> dict[str, Any]:
    if type(norm) is not nn.BatchNorm2d:
        raise TypeError(f"basis_norm must be a BatchNorm2d to be saved, got {type(norm).__name__}")
    held = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
    return {
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "dtype": str(held.dtype).removeprefix("torch."),
    }


def _rebuild_basis(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if isinstance(module, BasisConv2d):
        raise ArchitectureError(difference(description, _describe_basis(module)))
    _same_geometry(description, module)
    arguments = _arguments(description)
    norm = arguments.pop("basis_norm")
    layer = BasisConv2d(**arguments, device="meta", dtype=_weight_dtype(module))
    if norm is not None:
        dtype = _DTYPES[norm["dtype"]]
        settings = {key: value for key, value in norm.items() if key != "dtype"}
        layer.basis_norm = nn.BatchNorm2d(layer.basis_channels, **settings, device="meta", dtype=dtype)
    _asks_for_gradients(layer, module)
    return layer.train(module.training)


# --- Tucker convolutions ----------------------------------------------------------------------------------------------

_TUCKER = {
    **{name: field for name, field in _GEOMETRY.items() if name != "groups"},
    "rank_in": integer(1),
    "rank_out": integer(1),
    "activation": one_of(*ACTIVATIONS),
    "precise": BOOLEAN,
}


def _describe_tucker(layer: TuckerConv2d) -> dict[str, Any]:
    return {
        **{name: value for name, value in _geometry(layer).items() if name != "groups"},
        "rank_in": layer.rank_in,
        "rank_out": layer.rank_out,
        "activation": layer.activation,
        "precise": layer.precise,
    }


def _rebuild_tucker(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if isinstance(module, TuckerConv2d):
        raise ArchitectureError(difference(description, _describe_tucker(module)))
    _same_geometry({**description, "groups": 1}, module)
    layer = TuckerConv2d(**_arguments(description), device="meta", dtype=_weight_dtype(module))
    _asks_for_gradients(layer, module)
    return layer.train(module.training)


# --- what was folded away ---------------------------------------------------------------------------------------------


def _rebuild_identity(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if not isinstance(module, FOLDABLE):
        raise ArchitectureError(
            f"an Identity in the file, in the model a {type(module).__name__}, which no layer can have taken in"
        )
    return nn.Identity().train(module.training)


register(LayerKind("basis_conv2d", BasisConv2d, _BASIS, _describe_basis, _rebuild_basis))
register(LayerKind("tucker_conv2d", TuckerConv2d, _TUCKER, _describe_tucker, _rebuild_tucker))
register(LayerKind("conv2d", nn.Conv2d, _GEOMETRY, _geometry, _rebuild_conv, subclasses=True))
register(LayerKind("identity", nn.Identity, {}, lambda module: {}, _rebuild_identity, subclasses=True))
