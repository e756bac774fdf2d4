"""The layer kinds of ``BinaryConv2d`` and of pooling on packed signs; docs/model_files.md has their fields."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from basisconv_kernels.compression import recipe_layers as layers
from basisconv_kernels.compression.recipe import (
    BOOLEAN,
    NULL,
    Field,
    LayerKind,
    difference,
    either,
    integer,
    one_of,
    record,
    register,
    sizes,
)
from basisconv_kernels.core.checks import ACTIVATIONS, padding4
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.core.estimators import ESTIMATORS
from basisconv_kernels.layers import conversion
from basisconv_kernels.layers.binary_conv2d import SCALINGS, BinaryConv2d
from basisconv_kernels.layers.packed_max_pool2d import PackedMaxPool2d, pool_refusal

_ESTIMATOR = one_of(*ESTIMATORS)
_FIELDS = {
    **{name: field for name, field in layers._GEOMETRY.items() if name != "padding_mode"},
    "padding": sizes(4, 0),
    "padding_value": one_of(-1, 0, 1),
    "scaling": one_of(*SCALINGS),
    "scale_groups": either(NULL, integer(1)),
    "input_scale": BOOLEAN,
    "input_norm": either(NULL, record(layers._NORM)),
    "activation": one_of(*ACTIVATIONS),
    "estimator": Field(
        f"two of {_ESTIMATOR.expected}",
        lambda value: type(value) is list and len(value) == 2 and all(map(_ESTIMATOR.check, value)),
    ),
    "frozen": BOOLEAN,
    "contiguous": BOOLEAN,
    "input_threshold": BOOLEAN,
    "output_threshold": BOOLEAN,
}


def _describe(layer: BinaryConv2d) -> dict[str, Any]:
    geometry = {name: value for name, value in layers._geometry(layer).items() if name != "padding_mode"}
    return {
        **geometry,
        "padding_value": layer.padding_value,
        "scaling": layer.scaling,
        "scale_groups": layer.scale_groups if layer.scale_group is not None else None,
        "input_scale": layer.input_scale,
        "input_norm": None if layer.input_norm is None else layers._describe_norm(layer.input_norm),
        "activation": layer.activation,
        "estimator": list(layer.estimator),
        "frozen": layer.frozen,
        "contiguous": layer.contiguous,
        "input_threshold": layer.input_threshold_value is not None,
        "output_threshold": layer.threshold_value is not None,
    }


def _rebuild(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if isinstance(module, BinaryConv2d):
        raise ArchitectureError(difference(description, _describe(module)))
    layers._same_geometry(_as_conv(description, module), module)
    arguments = layers._arguments(description)
    contiguous, frozen = arguments.pop("contiguous"), arguments.pop("frozen")
    norm, groups = arguments.pop("input_norm"), arguments.pop("scale_groups")
    thresholds = {name: arguments.pop(f"{name}_threshold") for name in ("input", "output")}
    if groups is not None:  # the numbers themselves come with the values
        arguments["scale_group"] = torch.full((arguments["out_channels"],), groups - 1)
    try:
        layer = BinaryConv2d(**arguments, device="meta", dtype=layers._weight_dtype(module))
    except ValueError as error:
        raise ArchitectureError(f"the file describes a layer that cannot be: {error}") from error
    if norm is not None:
        dtype = layers._DTYPES[norm["dtype"]]
        settings = {key: value for key, value in norm.items() if key != "dtype"}
        layer.input_norm = nn.BatchNorm2d(layer.in_channels, **settings, device="meta", dtype=dtype)
    layer.contiguous = contiguous
    trained = isinstance(module, nn.Conv2d) and conversion.is_trained(module)
    for parameter in layer.parameters():
        parameter.requires_grad_(trained)
    if frozen:
        layer.hold_bits(**thresholds)
    return layer.train(module.training)


def _as_conv(description: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The description in the words of a Conv2d: of equal paddings, its own; a bias may have become part of bits."""
    found = {**description, "padding_mode": "zeros", "bias": description["bias"] or description["output_threshold"]}
    if isinstance(module, nn.Conv2d):
        own: Any = (module.padding, module.kernel_size, module.stride, module.dilation)
        if list(padding4("load", *own)) == description["padding"]:
            found["padding"] = layers._geometry(module)["padding"]
    return found


# --- pooling ----------------------------------------------------------------------------------------------------------

_POOL = {
    "channels": integer(1),
    "kernel_size": sizes(2, 1),
    "stride": sizes(2, 1),
    "padding": sizes(2, 0),
    "dilation": sizes(2, 1),
}


def _describe_pool(layer: PackedMaxPool2d) -> dict[str, Any]:
    return {"channels": layer.channels, **{name: list(getattr(layer, name)) for name in _POOL if name != "channels"}}


def _rebuild_pool(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if isinstance(module, PackedMaxPool2d):
        raise ArchitectureError(difference(description, _describe_pool(module)))
    against = pool_refusal(module)
    if against is not None or not isinstance(module, nn.MaxPool2d):
        raise ArchitectureError(f"the model's module {against}")
    layer = PackedMaxPool2d.from_pool(module, torch.zeros(description["channels"], dtype=torch.bool, device="meta"))
    differing = difference(description, _describe_pool(layer))
    if differing:
        raise ArchitectureError(differing)
    return layer.train(module.training)


register(LayerKind("binary_conv2d", BinaryConv2d, _FIELDS, _describe, _rebuild))
register(LayerKind("packed_max_pool2d", PackedMaxPool2d, _POOL, _describe_pool, _rebuild_pool))
