"""Plain inference modules to ONNX, for the engines that do not speak PyTorch.

Small on purpose: the operators that the benchmark's own networks use, one function each, so that what an engine is
given is what stands here, and no exporter's version can change it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.fx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bench.harness.bits import CENTRE, STEP, WEIGHT_STEP, Int8Layer

OPSET = 17
IR_VERSION = 9


class NotExportableError(NotImplementedError):
    """A module holds an operator that this exporter has no rule for."""


class _Graph:
    """Nodes and weights collected so far."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Tensor) -> str:
        """Add a constant, as float32."""
        self.weights.append(numpy_helper.from_array(value.detach().float().contiguous().numpy(), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add an operator; its one output bears its name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _conv(graph: _Graph, name: str, source: str, conv: nn.Conv2d) -> str:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise NotExportableError(f"onnx_export: Conv2d {name} needs zero padding in numbers")
    inputs = [source, graph.weight(f"{name}.weight", conv.weight)]
    if conv.bias is not None:
        inputs.append(graph.weight(f"{name}.bias", conv.bias))
    vertical, horizontal = _pair(conv.padding)
    return graph.node(
        "Conv", inputs, name, kernel_shape=list(conv.kernel_size), strides=list(conv.stride), group=conv.groups,
        dilations=list(conv.dilation), pads=[vertical, horizontal, vertical, horizontal],
    )  # fmt: skip


def _linear(graph: _Graph, name: str, source: str, linear: nn.Linear) -> str:
    inputs = [source, graph.weight(f"{name}.weight", linear.weight)]
    if linear.bias is not None:
        inputs.append(graph.weight(f"{name}.bias", linear.bias))
    return graph.node("Gemm", inputs, name, transB=1)


def _max_pool(graph: _Graph, name: str, source: str, pool: nn.MaxPool2d) -> str:
    vertical, horizontal = _pair(pool.padding)
    if _pair(pool.dilation) != (1, 1) or pool.ceil_mode:
        raise NotExportableError(f"onnx_export: MaxPool2d {name} with dilation or ceil_mode")
    return graph.node(
        "MaxPool", [source], name, kernel_shape=list(_pair(pool.kernel_size)), strides=list(_pair(pool.stride)),
        pads=[vertical, horizontal, vertical, horizontal],
    )  # fmt: skip


def _global_pool(graph: _Graph, name: str, source: str, pool: nn.AdaptiveAvgPool2d) -> str:
    if pool.output_size not in (1, (1, 1)):
        raise NotExportableError(f"onnx_export: AdaptiveAvgPool2d {name} to {pool.output_size}; only 1 is known")
    return graph.node("GlobalAveragePool", [source], name)


MODULES: dict[type[nn.Module], Callable[..., str]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.ReLU: lambda graph, name, source, _: graph.node("Relu", [source], name),
    nn.Flatten: lambda graph, name, source, _: graph.node("Flatten", [source], name, axis=1),
    nn.Identity: lambda graph, name, source, _: source,
}


def to_onnx(module: nn.Module, input: Tensor) -> onnx.ModelProto:
    """The module as an ONNX model with fixed sizes, input ``x`` and output ``y``, all float32.

    Raises:
        NotExportableError: no rule for an operator; the message names it.
    """
    graph = _Graph()
    traced = torch.fx.symbolic_trace(nn.Sequential(module))  # so that a bare layer is a submodule too
    names: dict[torch.fx.Node, str] = {}
    result = ""
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = "x"
        elif node.op == "call_module":
            part = traced.get_submodule(node.target)
            rule = MODULES.get(type(part))
            if rule is None:
                raise NotExportableError(f"onnx_export: no rule for {type(part).__name__} ({node.target})")
            names[node] = rule(graph, node.target, names[node.args[0]], part)
        elif node.op == "call_function" and node.target is operator.add:
            names[node] = graph.node("Add", [names[node.args[0]], names[node.args[1]]], node.name)
        elif node.op == "output":
            result = graph.node("Identity", [names[node.args[0]]], "y")
        else:
            raise NotExportableError(f"onnx_export: no rule for {node.op} {node.target}")
    assert result == "y"
    with torch.no_grad():
        output = module(input)
    made = helper.make_graph(
        graph.nodes,
        type(module).__name__,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(input.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output.shape))],
        graph.weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def quantized_to_onnx(layer: Int8Layer, codes: Tensor) -> onnx.ModelProto:
    """A QLinearConv of uint8 codes ``x`` to uint8 codes ``y``."""
    K, _, R, S = layer.codes.shape
    constants = {
        "x_step": (TensorProto.FLOAT, STEP), "x_zero": (TensorProto.UINT8, CENTRE),
        "w_step": (TensorProto.FLOAT, WEIGHT_STEP), "w_zero": (TensorProto.INT8, 0),
        "y_step": (TensorProto.FLOAT, layer.output_step), "y_zero": (TensorProto.UINT8, CENTRE),
    }  # fmt: skip
    weights = [helper.make_tensor(name, kind, [], [value]) for name, (kind, value) in constants.items()]
    weights.append(numpy_helper.from_array(layer.codes.numpy(), "w"))
    inputs = ["x", "x_step", "x_zero", "w", "w_step", "w_zero", "y_step", "y_zero"]
    node = helper.make_node("QLinearConv", inputs, ["y"], kernel_shape=[R, S], pads=[layer.padding] * 4)
    N, _, H, W = codes.shape
    size = [N, K, H + 2 * layer.padding - R + 1, W + 2 * layer.padding - S + 1]
    made = helper.make_graph(
        [node],
        "Int8Layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(codes.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, size)],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def write(module: nn.Module, input: Tensor, path: Path) -> None:
    """``to_onnx`` into a file."""
    made = quantized_to_onnx(module, input) if isinstance(module, Int8Layer) else to_onnx(module, input)
    onnx.save(made, str(path))
