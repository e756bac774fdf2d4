"""Our binary, stacked and ternary ops, weights packed before; and 8-bit convolutions of PyTorch and ONNX Runtime."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import basisconv_kernels
from basisconv_kernels.core import machine
from bench.harness.bits import CENTRE, STEP, WEIGHT_STEP, BitLayer, Int8Layer
from bench.harness.engine_torch import load, placed
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Files, Method


def ours(layer: BitLayer, x: Tensor) -> Method:
    """Our op on a layer, channels_last."""
    call, detail = _CALLS[layer.op](layer, placed(x, "channels_last"))

    def output() -> Any:
        made = call()
        made = basisconv_kernels.unpack(made) if isinstance(made, basisconv_kernels.PackedTensor) else made
        return [made.float().contiguous().numpy()]

    return Method("fused", "channels_last", call, output, f"{machine.isa()}{detail}, packed", torch.inference_mode)


def _binary(layer: BitLayer, x: Tensor, packed_maps: bool) -> tuple[Callable[[], Any], str]:
    weight = layer.weight
    packed = basisconv_kernels.binary_conv2d_pack(weight, groups=layer.problem.groups)
    operand = basisconv_kernels.bitpack(x) if packed_maps else x
    output = "packed" if packed_maps else "float"
    settings = _geometry(layer)
    call = functools.partial(
        basisconv_kernels.binary_conv2d, operand, weight, output=output, packed=packed, **settings
    )  # fmt: skip
    return call, ""


def _stacked(layer: BitLayer, x: Tensor) -> tuple[Callable[[], Any], str]:
    bank, index, groups = layer.bank, layer.index, layer.problem.groups
    packed = basisconv_kernels.stacked_binary_conv2d_pack(bank, index, groups=groups)
    form = basisconv_kernels.stacked_binary_conv2d_form(bank.shape, index.shape)
    call = functools.partial(
        basisconv_kernels.stacked_binary_conv2d, x, bank, index, packed=packed, **_geometry(layer)
    )  # fmt: skip
    return call, f", {form}"


def _ternary(layer: BitLayer, x: Tensor) -> tuple[Callable[[], Any], str]:
    planes = basisconv_kernels.ternary_planes(layer.filters)
    packed = basisconv_kernels.ternary_conv2d_pack(planes, layer.problem.C)
    call = functools.partial(basisconv_kernels.ternary_conv2d, x, planes, packed=packed, **_geometry(layer))
    return call, ""


def _geometry(layer: BitLayer) -> dict[str, Any]:
    p = layer.problem
    return {"stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups}


_CALLS: dict[str, Callable[[BitLayer, Tensor], tuple[Callable[[], Any], str]]] = {
    "binary_packed": functools.partial(_binary, packed_maps=True),
    "binary_float": functools.partial(_binary, packed_maps=False),
    "stacked": _stacked,
    "ternary": _ternary,
}


class TorchInt8:
    """PyTorch's quantized convolution (oneDNN), codes in and out, channels_last."""

    def prepare(self, files: Files) -> list[Method]:
        """The int8 form."""
        if "int8" not in files.about["forms"]:
            raise UnsupportedError("this case has no int8 form")
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise UnsupportedError("this PyTorch has no oneDNN for quantized convolutions")
        torch.backends.quantized.engine = "onednn"
        module = load(files.folder / "int8.pt", "channels_last")
        if not isinstance(module, Int8Layer):
            raise UnsupportedError("this case has no int8 form")
        x = placed(torch.load(files.folder / "input.pt"), "channels_last")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch moves its quantization elsewhere
            K, C, R, S = module.codes.shape
            layer = torch.ao.nn.quantized.Conv2d(C, K, (R, S), padding=module.padding)
            filters = torch.quantize_per_tensor(module.codes.float() * WEIGHT_STEP, WEIGHT_STEP, 0, torch.qint8)
            layer.set_weight_bias(filters, None)
            layer.scale, layer.zero_point = module.output_step, CENTRE
            codes = placed(torch.quantize_per_tensor(x, STEP, CENTRE, torch.quint8), "channels_last")

        call = functools.partial(layer, codes)

        def output() -> Any:
            return [call().dequantize().contiguous().numpy()]

        return [Method("int8", "channels_last", call, output, "oneDNN", torch.inference_mode)]
