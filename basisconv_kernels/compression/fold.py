"""Folding of whole networks: convolution → BatchNorm → (+ residual) → ReLU become one layer where that is the same.

The chains are found in the graph that ``torch.fx`` traces. What cannot be traced is left as it is, and reported.
"""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from basisconv_kernels.compression.methods import own_layers
from basisconv_kernels.compression.report import FoldedChain, FoldReport
from basisconv_kernels.compression.survey import run
from basisconv_kernels.layers import folding
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.packed_max_pool2d import PackedMaxPool2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_IN_PLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.iand,
    operator.ior,
    operator.setitem,
}
Fused = BasisConv2d | TuckerConv2d
FUSED = (BasisConv2d, TuckerConv2d)  # layers that take in what follows them
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# What a network that fx cannot trace may raise: its own code meets stand-ins instead of tensors.
TRACE_ERRORS = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError,
)  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*own_layers(), PackedMaxPool2d)) or super().is_leaf_module(module, name)


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, FoldReport]:
    """A copy of a network for inference, with BatchNorms, residual additions and activations inside its convolutions.

    ``Conv2d → BatchNorm2d`` becomes the Conv2d with other weights; ``BasisConv2d → BatchNorm2d → (+ residual) → ReLU``
    or ``ReLU6`` becomes one BasisConv2d, and so with TuckerConv2d. A BatchNorm inside a BasisConv2d is folded too. Only
    chains whose links are used nowhere else are folded, and only additions of equal shapes.

    Args:
        model (Module): stays as it is.
        example_inputs: as for ``compress``; the folded network must give what the network gives in eval mode, to half
            the digits of the dtype, or it is given up.

    Returns:
        (Module, FoldReport): the folded network, in eval mode. It is a ``torch.fx.GraphModule`` where the whole network
        could be traced; else parts of it are, or, where nothing could be done, it is a plain copy.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from basisconv_kernels.compression.fold import fold_batchnorm
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> folded, report = fold_batchnorm(net, torch.randn(1, 3, 8, 8))
        >>> [(chain.name, chain.absorbed) for chain in report.chains]
        [('0', ('1',))]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_batchnorm: model must be a torch.nn.Module, got {type(model).__name__}")
    target = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = run(target, example_inputs)
        folder = _Folder()
        folded = folder.fold(copy.deepcopy(target), "", example_inputs).eval()
        try:
            found: Any = run(folded, example_inputs)
        except TRACE_ERRORS as error:
            return target, FoldReport((), (("", f"the folded network does not run: {error}"),))
    if not _same(expected, found):
        return target, FoldReport((), (("", "the folded network gives other results, so nothing was folded"),))
    return folded, FoldReport(tuple(folder.chains), tuple(folder.left_alone))


def _same(expected: Any, found: Any) -> bool:
    """Equal structures of tensors, to half the digits of their dtype."""
    (first, spec), (second, other) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if spec != other:
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and isinstance(b, Tensor) and a.shape == b.shape:
            scale = float(a.abs().max()) if a.numel() else 0.0
            if not torch.allclose(a, b, rtol=0, atol=scale * math.sqrt(torch.finfo(a.dtype).eps), equal_nan=True):
                return False
        elif isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
    return True


class _Folder:
    """Traces a network, or the parts of it that can be traced, and folds their chains."""

    def __init__(self) -> None:
        self.chains: list[FoldedChain] = []
        self.left_alone: list[tuple[str, str]] = []

    def fold(self, module: nn.Module, name: str, inputs: Any = None) -> nn.Module:
        """The module with its chains folded; ``inputs``, where known, give the shapes that residual additions need."""
        if not any(isinstance(m, (nn.Conv2d, *FUSED)) for m in module.modules()):
            return module
        for part in module.modules():
            if isinstance(part, BasisConv2d) and folding.has_statistics(part.basis_norm or part):
                part.fold()
        if isinstance(module, (nn.Conv2d, *FUSED)):
            return module
        try:
            graph = fx.GraphModule(module, _Tracer().trace(module), type(module).__name__)
            if inputs is not None:
                _propagate_shapes(graph, inputs)
        except TRACE_ERRORS as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.left_alone.append((name, f"cannot be traced as a whole: {reason}"))
            for child_name, child in module.named_children():
                setattr(module, child_name, self.fold(child, f"{name}.{child_name}".lstrip(".")))
            return module
        for node in list(graph.graph.nodes):
            if isinstance(node.type, str):
                node.type = None  # an annotation kept as text (PEP 563) would make the graph impossible to pickle
            if node.op == "call_module" and self._called_once(graph, node):
                self._fold_chain(graph, node, f"{name}.{node.target}".lstrip("."))
        graph.graph.lint()
        graph.delete_all_unused_submodules()
        graph.recompile()
        return graph

    @staticmethod
    def _called_once(graph: fx.GraphModule, node: fx.Node) -> bool:
        module = graph.get_submodule(str(node.target))
        calls = [n for n in graph.graph.nodes if n.op == "call_module"]
        return sum(graph.get_submodule(str(n.target)) is module for n in calls) == 1

    def _fold_chain(self, graph: fx.GraphModule, node: fx.Node, name: str) -> None:
        conv = graph.get_submodule(str(node.target))
        if type(conv) is not nn.Conv2d and not isinstance(conv, FUSED):
            return
        absorbed: list[str] = []
        following = _only_user(graph, node)
        norm = _called(graph, following)
        if any(user.target is F.batch_norm for user in node.users):
            self.left_alone.append((name, "is followed by a BatchNorm that is no torch.nn.BatchNorm2d module"))
        if following is not None and norm is not None and type(norm) in NORMS and folding.has_statistics(norm):
            if isinstance(conv, FUSED) and (conv.activation is not None or len(node.all_input_nodes) > 1):
                self.left_alone.append((name, "has an activation or a residual before its BatchNorm"))
                return
            _absorb_norm(conv, norm)
            _skip(graph, following, node)
            absorbed.append(str(following.target))
        if isinstance(conv, FUSED):
            node, addition = _absorb_residual(graph, node, conv)
            absorbed += [addition] if addition else []
            following = _only_user(graph, node)
            kind = _activation(graph, following)
            if following is not None and kind is not None and conv.activation is None:
                conv.activation = kind
                _skip(graph, following, node)
                absorbed.append(following.target if isinstance(following.target, str) else kind)
        if absorbed:
            self.chains.append(FoldedChain(name, tuple(absorbed)))


def _propagate_shapes(graph: fx.GraphModule, inputs: Any) -> None:
    """Give every node the shape and dtype that it has for the example inputs."""
    if isinstance(inputs, dict):
        names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
        if set(names) != set(inputs):
            return  # defaults of the others are unknown here: fold without residuals
        inputs = [inputs[name] for name in names]
    ShapeProp(graph).propagate(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))


def _only_user(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, identities passed over; None where there are more, or none."""
    while len(node.users) == 1:
        (user,) = node.users
        if not isinstance(_called(graph, user), nn.Identity):
            return user
        _skip(graph, user, node)
    return None


def _called(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _skip(graph: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    """Let everyone who read ``node`` read ``source``, and remove the node."""
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


@torch.no_grad()
def _absorb_norm(conv: nn.Module, norm: nn.Module) -> None:
    if isinstance(conv, FUSED):
        conv.fold(norm)
    elif isinstance(conv, nn.Conv2d):
        weight, bias = folding.fold_after(conv.weight, conv.bias, *folding.scale_and_offset(norm))
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def _activation(graph: fx.GraphModule, node: fx.Node | None) -> str | None:
    """Which activation the node is: relu, relu6 or None."""
    if node is None:
        return None
    module = _called(graph, node)
    if type(module) in (nn.ReLU, nn.ReLU6):
        return "relu" if type(module) is nn.ReLU else "relu6"
    if node.op in ("call_function", "call_method") and node.target in _RELU:
        return "relu"
    return "relu6" if node.op == "call_function" and node.target is F.relu6 else None


def _absorb_residual(graph: fx.GraphModule, node: fx.Node, conv: Fused) -> tuple[fx.Node, str]:
    """Turn ``conv(x) + other`` into ``conv(x, other)`` where both have one shape; the node of the call, and what it
    took.

    The call moves to the place of the addition, so ``other`` is known there, and nothing in between may write in place.
    """
    addition = _only_user(graph, node)
    if addition is None or addition.op not in ("call_function", "call_method") or addition.target not in _ADDITIONS:
        return node, ""
    if len(addition.args) != 2 or addition.kwargs or conv.activation is not None or len(node.all_input_nodes) > 1:
        return node, ""
    first, second = addition.args
    other = second if first is node else first
    if not isinstance(other, fx.Node) or other is node or _shape(other) is None or _shape(other) != _shape(node):
        return node, ""
    if _writes_in_place(graph, addition) and first is other and len(other.users) > 1:
        return node, ""
    between, walker = [], node.next
    while walker is not addition:
        between.append(walker)
        walker = walker.next
    if any(_writes_in_place(graph, n) for n in between):
        return node, ""
    with graph.graph.inserting_before(addition):
        fused = graph.graph.call_module(str(node.target), (*node.args, other), dict(node.kwargs))
    fused.meta = dict(addition.meta)
    _skip(graph, addition, fused)
    graph.graph.erase_node(node)
    return fused, "add"


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    found: Any = node.meta.get("tensor_meta")
    return (tuple(found.shape), found.dtype) if hasattr(found, "shape") else None


def _writes_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = _called(graph, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or name.endswith("_") or bool(node.kwargs.get("inplace", False))


def _read_instead(node: fx.Node, replacement: fx.Node) -> None:
    """Let everyone but the replacement itself read the replacement."""
    node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user is not replacement)


def separate_residuals(model: nn.Module) -> None:
    """Undo ``conv(x, residual)`` in the graphs inside a network, in place: addition and activation stand alone."""
    for graph in [m for m in model.modules() if isinstance(m, fx.GraphModule)]:
        for node in list(graph.graph.nodes):
            conv = _called(graph, node)
            if not isinstance(conv, FUSED) or len(node.args) + len(node.kwargs) < 2:
                continue
            residual = node.args[1] if len(node.args) > 1 else node.kwargs["residual"]
            node.args = node.args[:1]
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "residual"}
            with graph.graph.inserting_after(node):
                out = graph.graph.call_function(torch.add, (node, residual))
            _read_instead(node, out)
            if conv.activation is not None:
                with graph.graph.inserting_after(out):
                    active = graph.graph.call_function(F.relu if conv.activation == "relu" else F.relu6, (out,))
                _read_instead(out, active)
                conv.activation = None
        graph.graph.lint()
        graph.recompile()
