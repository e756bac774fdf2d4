"""The form in which every network of the demo is timed: what PyTorch can do for a convolution, for all sides alike.

BatchNorms are folded before (``compression.fold``). Here every remaining ``Conv2d`` becomes one oneDNN call with its
weights packed once and the ReLU behind it, and a residual addition in between, inside that call: what a compiler makes
of it, without the compiler. A fused basis convolution has the same in its own kernel, so no side pays for memory
traffic that another is spared.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.packed_max_pool2d import PackedMaxPool2d
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

_RELU = {torch.relu, torch.relu_, F.relu, F.relu_}
# Layers that are called as they are.
OWN = (BasisConv2d, TuckerConv2d, TernaryConv2d, StackedBinaryConv2d, BinaryConv2d, PackedMaxPool2d)
_ADD = {operator.add, operator.iadd, torch.add}


class PackedConv2d(nn.Module):
    """``relu(conv2d(input) + residual)`` in one oneDNN call; ReLU and residual as the network has them.

    Args:
        conv (Conv2d): float32 on the CPU, zero padding given as numbers.
        input_shape: of the input that the weights are packed for; other shapes give the same values.
        relu (bool): whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, input_shape: tuple[int, ...], *, relu: bool) -> None:
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.relu = "relu" if relu else None
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(input_shape))
        self.bias = None if conv.bias is None else conv.bias.detach()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map [N, C, H, W] to [N, K, OH, OW]; ``residual`` has the output's shape."""
        call = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return call(input, self.packed, self.bias, *self.geometry, self.relu or "none", [], "")
        arguments = (input, residual, self.packed, self.bias, *self.geometry)
        return call.binary(*arguments, "add", None, self.relu, [], "")


def packing_available() -> bool:
    """Whether this PyTorch has the oneDNN calls; without them convolution and ReLU run one after the other."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def channels_last(images: Tensor) -> Tensor:
    """The images [N, C, H, W] with channels as the fastest dimension, in the strides too where C = 1.

    With one channel both layouts are the same memory, and only strides of (…, 1, …) tell PyTorch which one is meant.
    """
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, OWN) or super().is_leaf_module(module, name)


@torch.no_grad()
def inference_form(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a folded network in eval mode, its plain convolutions packed for inputs shaped like ``example``.

    Those of a network that takes signs of its activations stay as they are: packed they round differently in the last
    bit, which turns a sign now and then.

    Args:
        network (Module): traceable by ``torch.fx``; BatchNorms already folded.
        example (Tensor[N, C, H, W]): channels_last.

    Raises:
        RuntimeError: the copy does not compute what the network computes.
    """
    target = copy.deepcopy(network).eval()
    for parameter in target.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    expected = target(example)
    if not packing_available() or any(isinstance(module, BinaryConv2d) for module in target.modules()):
        return target
    graph = fx.GraphModule(target, _Tracer().trace(target))
    shapes = _input_shapes(graph, example)
    for node in list(graph.graph.nodes):
        conv = _module(graph, node)
        if type(conv) is nn.Conv2d and not isinstance(conv.padding, str) and conv.padding_mode == "zeros":
            node = _take_addition(graph, node)
            relu = _take_relu(graph, node)
            parent, _, name = str(node.target).rpartition(".")
            setattr(graph.get_submodule(parent), name, PackedConv2d(conv, shapes[conv], relu=relu))
    graph.graph.lint()
    graph.recompile()
    found = graph(example)
    scale = float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=1e-4 * max(scale, 1.0)):
        raise RuntimeError("inference_form: packing the convolutions changed the results; this is a bug")
    return graph


def _input_shapes(graph: fx.GraphModule, example: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shapes[module] = tuple(arguments[0].shape)

    hooks = [m.register_forward_pre_hook(note) for m in graph.modules() if type(m) is nn.Conv2d]
    try:
        graph(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _module(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _take_addition(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Move ``conv(x) + other`` into one call at the place of the addition; the node of the call."""
    addition = _only_user(node)
    if addition is None or addition.op != "call_function" or addition.target not in _ADD:
        return node
    others = [argument for argument in addition.args if argument is not node]
    # In the demo's networks every addition is of two maps of one shape; the comparison at the end proves it.
    if len(addition.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node) or addition.kwargs:
        return node
    with graph.graph.inserting_before(addition):
        joined = graph.graph.call_module(str(node.target), (*node.args, others[0]))
    addition.replace_all_uses_with(joined)
    graph.graph.erase_node(addition)
    graph.graph.erase_node(node)
    return joined


def _take_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a ReLU, and nobody else, reads the node; it is removed then."""
    following = _only_user(node)
    if following is None:
        return False
    is_function = following.op == "call_function" and following.target in _RELU
    if not is_function and type(_module(graph, following)) is not nn.ReLU:
        return False
    following.replace_all_uses_with(node)
    graph.graph.erase_node(following)
    return True
