"""The layer kinds of ternary layers: trained, with float weights, and packed, with a code of a few bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from basisconv_kernels.compression.recipe import (
    BOOLEAN,
    NULL,
    LayerKind,
    either,
    integer,
    number,
    one_of,
    record,
    register,
)
from basisconv_kernels.compression.recipe_layers import (
    _GEOMETRY,
    _arguments,
    _asks_for_gradients,
    _geometry,
    _same_geometry,
    _weight_dtype,
)
from basisconv_kernels.core.checks import ACTIVATIONS
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers import ternary_code
from basisconv_kernels.layers.ternary import TernaryLayer
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear, linear_refusal
from basisconv_kernels.layers.ternary_weights import RULES

_CODE = {"encoding": one_of(*ternary_code.KINDS), "nonzero": integer(0), "bytes": integer(0)}
_WEIGHTS = {
    "rule": one_of(*RULES),
    "scale_per_output": BOOLEAN,
    "threshold": number(0),
    "code": either(NULL, record(_CODE)),
}
_CONV = {**_GEOMETRY, "activation": one_of(*ACTIVATIONS), **_WEIGHTS}
_LINEAR = {"in_features": integer(1), "out_features": integer(1), "bias": BOOLEAN, **_WEIGHTS}


def _weights(layer: TernaryLayer) -> dict[str, Any]:
    code = None
    if layer.encoding is not None:
        encoded = layer.encoding
        code = {"encoding": encoded.kind, "nonzero": encoded.nonzero, "bytes": encoded.data.numel()}
    return {
        "rule": layer.rule,
        "scale_per_output": layer.scale_per_output,
        "threshold": layer.threshold,
        "code": code,
    }


def _describe_conv(layer: TernaryConv2d) -> dict[str, Any]:
    return {**_geometry(layer), "activation": layer.activation, **_weights(layer)}


def _describe_linear(layer: TernaryLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        **_weights(layer),
    }


def _finish(layer: TernaryLayer, code: dict[str, Any] | None, module: nn.Module) -> nn.Module:
    """The form, the flags for gradients, and the training flag."""
    if code is not None:
        count = torch.Size(layer.weight_shape).numel()
        data = torch.empty(code["bytes"], dtype=torch.uint8, device="meta")
        dtype = _weight_dtype(module)
        layer._set_packed(ternary_code.Encoded(code["encoding"], count, code["nonzero"], data), "meta")
        if layer.scale is None:  # TWN states its scales once it is packed
            layer.scale = nn.Parameter(torch.empty(layer.weight_shape[0], device="meta", dtype=dtype))
    _asks_for_gradients(layer, module)
    return layer.train(module.training)


def _rebuild_conv(description: dict[str, Any], module: nn.Module) -> nn.Module:
    _same_geometry(description, module)
    arguments = _arguments(description)
    code = arguments.pop("code")
    return _finish(TernaryConv2d(**arguments, device="meta", dtype=_weight_dtype(module)), code, module)


def _rebuild_linear(description: dict[str, Any], module: nn.Module) -> nn.Module:
    against = linear_refusal(module)
    if against is not None or not isinstance(module, nn.Linear):
        raise ArchitectureError(f"the model's module {against}")
    for name, found in (
        ("in_features", module.in_features),
        ("out_features", module.out_features),
        ("bias", module.bias is not None),
    ):
        if description[name] != found:
            raise ArchitectureError(f"{name} is {description[name]} in the file, {found} in the model")
    arguments = dict(description)
    code = arguments.pop("code")
    return _finish(TernaryLinear(**arguments, device="meta", dtype=_weight_dtype(module)), code, module)


register(LayerKind("ternary_conv2d", TernaryConv2d, _CONV, _describe_conv, _rebuild_conv))
register(LayerKind("ternary_linear", TernaryLinear, _LINEAR, _describe_linear, _rebuild_linear))
