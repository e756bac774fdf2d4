"""``pack_activations``: what stands between consecutive binary layers becomes one comparison, and bits are handed on.

The chains are found in the graph that ``torch.fx`` traces, as in ``fold``; what cannot be traced keeps real numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from basisconv_kernels.compression.fold import NORMS, TRACE_ERRORS, _called, _only_user, _skip, _Tracer
from basisconv_kernels.compression.report import FoldedChain, FoldReport
from basisconv_kernels.compression.stacked_binary import freeze_bits
from basisconv_kernels.compression.survey import run, watching
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.layers import folding
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.binary_conv2d_conversion import Monotone
from basisconv_kernels.layers.packed_max_pool2d import PackedMaxPool2d, pool_refusal

_RELU = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}


def pack_activations(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, FoldReport]:
    """A copy of a network for inference, in which activations stay bits from binary layer to binary layer.

    ``BinaryConv2d → any of BatchNorm2d, ReLU, ReLU6, MaxPool2d → BinaryConv2d`` (with a BatchNorm in front or not): the
    first gives bits, by one whole-number comparison a channel that stands for scale, bias, BatchNorms, activations and
    the second one's sign; a max-pool in between runs on bits, as their union where the following sign rises with the
    number, as their intersection where it falls. Only chains whose links are used nowhere else become bits. Every layer
    is frozen.

    Args:
        model (Module): trained; it stays as it is.
        example_inputs: as for ``compress``. The result must give exactly what the network gives for them in eval mode,
            in the same layouts; else all activations stay real, and the report says so.

    Returns:
        (Module, FoldReport): the network, in eval mode, as ``fold_batchnorm`` gives it, which may fold its dense
        convolutions before or after. Its chains are named after their first layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from basisconv_kernels import BinaryConv2d, pack_activations
        >>> net = nn.Sequential(BinaryConv2d(8, 32, 3), nn.BatchNorm2d(32), nn.MaxPool2d(2), BinaryConv2d(32, 16, 3))
        >>> image = torch.randn(1, 8, 12, 12)
        >>> packed, report = pack_activations(net, image)
        >>> [(chain.name, chain.absorbed) for chain in report.chains]
        [('0', ('1', '2'))]
        >>> torch.equal(packed(image), net.eval()(image))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack_activations: model must be a torch.nn.Module, got {type(model).__name__}")
    target = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected, layouts = _watched(target, example_inputs)
        packer = _Packer(layouts)
        packed = freeze_bits(packer.pack(copy.deepcopy(target), "").eval())
        try:
            found: Any = run(packed, example_inputs)
        except TRACE_ERRORS as error:
            return freeze_bits(target), FoldReport((), (("", f"the packed network does not run: {error}"),))
    if not _identical(expected, found):
        return freeze_bits(target), FoldReport(
            (), (("", "the packed network gives other results; nothing was packed"),)
        )
    return packed, FoldReport(tuple(packer.chains), tuple(packer.left_alone))


def _watched(target: nn.Module, example_inputs: Any) -> tuple[Any, dict[str, torch.memory_format]]:
    """The results, and the memory format that each binary layer gives."""
    layouts: dict[str, torch.memory_format] = {}

    def watcher_for(name: str) -> Any:
        def watch(input: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                layouts[name] = memory_format(output)

        return watch

    layers: dict[nn.Module, Any] = {
        m: watcher_for(name) for name, m in target.named_modules() if isinstance(m, BinaryConv2d)
    }
    with watching(layers):
        return run(target, example_inputs), layouts


def _identical(expected: Any, found: Any) -> bool:
    """Equal structures of tensors, value by value; NaN equals NaN."""
    (first, spec), (second, other) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if spec != other:
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else isinstance(a, Tensor) == isinstance(b, Tensor)
        for a, b in zip(first, second, strict=True)
    )


class _Packer:
    """Traces a network, or the parts of it that can be traced, and packs their chains."""

    def __init__(self, layouts: dict[str, torch.memory_format]) -> None:
        self.layouts = layouts
        self.chains: list[FoldedChain] = []
        self.left_alone: list[tuple[str, str]] = []

    def pack(self, module: nn.Module, name: str) -> nn.Module:
        """The module with its chains packed."""
        if isinstance(module, BinaryConv2d) or sum(isinstance(m, BinaryConv2d) for m in module.modules()) < 2:
            return module
        try:
            graph = fx.GraphModule(module, _Tracer().trace(module), type(module).__name__)
        except TRACE_ERRORS as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.left_alone.append((name, f"cannot be traced as a whole: {reason}"))
            for child_name, child in module.named_children():
                setattr(module, child_name, self.pack(child, f"{name}.{child_name}".lstrip(".")))
            return module
        before = len(self.chains)
        for node in list(graph.graph.nodes):
            if isinstance(node.type, str):
                node.type = None  # an annotation kept as text (PEP 563) would make the graph impossible to pickle
            if isinstance(_called(graph, node), BinaryConv2d):
                self._pack_chain(graph, node, name)
        if len(self.chains) == before:
            return module
        graph.graph.lint()
        graph.delete_all_unused_submodules()
        graph.recompile()
        return graph

    def _pack_chain(self, graph: fx.GraphModule, node: fx.Node, prefix: str) -> None:
        name = f"{prefix}.{node.target}".lstrip(".")
        first = _called(graph, node)
        links, last = _follow(graph, node)
        second = _called(graph, last)
        if last is None or not isinstance(first, BinaryConv2d) or not isinstance(second, BinaryConv2d):
            return
        reason = _why_not(graph, node, links, last)
        if reason is not None:
            self.left_alone.append((name, reason))
            return
        steps = [_step(graph, link) for link in links if not isinstance(_called(graph, link), nn.MaxPool2d)]
        if second.input_norm is not None:
            steps.append(second.input_norm)
        first.pack_output(*steps)
        falling = torch.zeros(first.out_channels, dtype=torch.bool)
        falling ^= _falls(second.input_norm, falling)
        for link in reversed(links):  # of what follows each pool
            module = _called(graph, link)
            if isinstance(module, nn.MaxPool2d):
                pool = PackedMaxPool2d.from_pool(module, falling)
                graph.set_submodule(str(link.target), pool.to(_device(first)))
            else:
                falling ^= _falls(module, falling)
        layout = self.layouts.get(f"{prefix}.{last.target}".lstrip("."))
        second.take_bits(contiguous=layout is torch.contiguous_format)
        for link in links:
            if not isinstance(_called(graph, link), PackedMaxPool2d):
                _skip(graph, link, link.all_input_nodes[0])
        self.chains.append(FoldedChain(name, tuple(_name(link) for link in links)))


def _follow(graph: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes behind a layer that handle each channel alone and keep the order of its numbers, and what reads them.

    The second is None where a link is read by more than one node, or by none.
    """
    links: list[fx.Node] = []
    user = _only_user(graph, node)
    while user is not None and (isinstance(_called(graph, user), nn.MaxPool2d) or _is_step(graph, user)):
        links.append(user)
        user = _only_user(graph, user)
    return links, user


def _is_step(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = _called(graph, node)
    if module is None:
        return node.op in ("call_function", "call_method") and node.target in _RELU
    return (type(module) in NORMS and folding.has_statistics(module)) or type(module) in (nn.ReLU, nn.ReLU6)


def _step(graph: fx.GraphModule, link: fx.Node) -> Monotone:
    """What a link computes; never in place."""
    module = _called(graph, link)
    if module is None or type(module) is nn.ReLU:
        return F.relu
    return F.relu6 if type(module) is nn.ReLU6 else module


def _why_not(graph: fx.GraphModule, node: fx.Node, links: list[fx.Node], last: fx.Node) -> str | None:
    """Why a chain between two binary layers cannot be packed; None where it can."""
    first, second = _called(graph, node), _called(graph, last)
    if not isinstance(first, BinaryConv2d) or not isinstance(second, BinaryConv2d):
        return "is not followed by a binary layer"
    if first.input_scale or second.input_scale:
        return "input_scale needs real activations"
    if first.threshold_value is not None or second.input_threshold_value is not None:
        return "was frozen before; pack a network whose layers still have latent weights"
    for link in (node, *links, last):
        module = _called(graph, link)
        changes = isinstance(module, (BinaryConv2d, nn.MaxPool2d))
        if changes and sum(_called(graph, n) is module for n in graph.graph.nodes) > 1:
            return f"{link.target} is called more than once"
        if len(link.args) + len(link.kwargs) > 1 and module is not None:
            return f"{link.target} is called with further arguments"
        against = pool_refusal(module) if isinstance(module, nn.MaxPool2d) else None
        if against is not None:
            return f"{link.target} {against}"
    return None


def _falls(module: nn.Module | None, like: Tensor) -> Tensor:
    """The channels in which a step turns the order of numbers round: those of a BatchNorm with a negative weight."""
    weight = getattr(module, "weight", None)
    return torch.zeros_like(like) if weight is None else (weight < 0).to(like.device)


def _device(layer: BinaryConv2d) -> torch.device:
    return next(t for t in (layer.weight, layer.words) if t is not None).device


def _name(link: fx.Node) -> str:
    return link.target if isinstance(link.target, str) else "relu"
