"""The layer kind of ``StackedBinaryConv2d`` in model files; docs/model_files.md has its fields and tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

from basisconv_kernels.compression import recipe_layers as layers
from basisconv_kernels.compression.recipe import BOOLEAN, LayerKind, difference, integer, one_of, register
from basisconv_kernels.core.checks import ACTIVATIONS
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.core.estimators import ESTIMATORS
from basisconv_kernels.layers import conversion
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d

_FIELDS = {
    **layers._GEOMETRY,
    "bank": integer(1),
    "splits": integer(1),
    "scale": BOOLEAN,
    "binarize_input": BOOLEAN,
    "activation": one_of(*ACTIVATIONS),
    "estimator": one_of(*ESTIMATORS),
    "frozen": BOOLEAN,
}


def _describe(layer: StackedBinaryConv2d) -> dict[str, Any]:
    return {
        **layers._geometry(layer),
        "bank": layer.bank,
        "splits": layer.splits,
        "scale": layer.scale is not None,
        "binarize_input": layer.binarize_input,
        "activation": layer.activation,
        "estimator": layer.estimator,
        "frozen": layer.frozen,
    }


def _rebuild(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if isinstance(module, StackedBinaryConv2d):
        raise ArchitectureError(difference(description, _describe(module)))
    layers._same_geometry(description, module)
    arguments = layers._arguments(description)
    frozen = arguments.pop("frozen")
    try:
        layer = StackedBinaryConv2d(**arguments, device="meta", dtype=layers._weight_dtype(module))
    except ValueError as error:
        raise ArchitectureError(f"the file describes a layer that cannot be: {error}") from error
    trained = isinstance(module, nn.Conv2d) and conversion.is_trained(module)
    for parameter in layer.parameters():
        parameter.requires_grad_(trained)
    if frozen:
        layer.hold_bits()
    return layer.train(module.training)


register(LayerKind("stacked_binary_conv2d", StackedBinaryConv2d, _FIELDS, _describe, _rebuild))
