"""Which channels of a network must go together: one label a channel, tied through the graph that ``torch.fx`` traces.

Every convolution gives its outputs new labels; what keeps channels apart (activations, pools, BatchNorms) passes them
on; additions and products tie those of their operands; concatenation strings them together, flattening repeats them.
What is not understood here pins the labels that reach it, with the reason: a channel is removed exactly or not at all.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from basisconv_kernels.compression.fold import TRACE_ERRORS
from basisconv_kernels.layers.conversion import foreign_hooks, refusal

_ARITHMETIC = {
    operator.add, operator.iadd, torch.add, operator.sub, torch.sub, operator.mul, operator.imul, torch.mul,
    "add", "add_", "sub", "sub_", "mul", "mul_",
}  # fmt: skip
_SAME_CHANNELS = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish,
    F.hardsigmoid, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.clamp, torch.neg, operator.neg,
    "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "to", "float",
}  # fmt: skip
_SAME_CHANNELS_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.Tanh, nn.Mish, nn.Softplus, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Upsample, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
# Of those, what keeps a positive factor of a channel: f(c·z) = c·f(z) for c > 0.
_HOMOGENEOUS = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "relu", "relu_", "contiguous", "clone",
}  # fmt: skip
_HOMOGENEOUS_MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout2d, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm)
# What asks for sizes: the answers are numbers. A view that uses them is looked at by itself.
_SIZES = {"size", "dim", getattr, torch._assert}


@dataclass
class Member:
    """One module with weights along channels: the labels of what it reads and of what it gives."""

    name: str
    module: nn.Module
    reads: list[int]
    gives: list[int]


@dataclass
class ChannelGraph:
    """The labels of a network, and which belong together.

    Attributes:
        members: convolutions, BatchNorms, PReLUs and linear layers by the name of their first call.
        pinned: {class of labels: why it stays}.
        balanced: each entry is the groups of labels of which equally many must go: of a grouped convolution.
        bent: labels on whose way stands more than what keeps a positive factor.
        norms: {convolution: the BatchNorm that alone reads it}.
    """

    members: dict[nn.Module, Member] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    balanced: list[list[list[int]]] = field(default_factory=list)
    bent: set[int] = field(default_factory=set)
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)

    def new(self, count: int) -> list[int]:
        """Labels that nobody has."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return list(range(first, first + count))

    def root(self, label: int) -> int:
        """The name of the class of a label."""
        while self._parents[label] != label:
            self._parents[label] = label = self._parents[self._parents[label]]
        return label

    def tie(self, first: list[int], second: list[int]) -> None:
        """Put the labels of two lists into one class each, place by place."""
        for a, b in zip(first, second, strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[b] = a
                if b in self.pinned:
                    self.pinned.setdefault(a, self.pinned[b])

    def pin(self, labels: list[int], reason: str) -> None:
        """Let these labels stay."""
        for label in labels:
            self.pinned.setdefault(self.root(label), reason)

    def why_pinned(self, label: int) -> str | None:
        """Why a label stays; None where it may go."""
        return self.pinned.get(self.root(label))

    def convolutions(self) -> list[Member]:
        """The members that are convolutions, in the order of the calls."""
        return [member for member in self.members.values() if isinstance(member.module, nn.Conv2d)]


def channel_graph(model: nn.Module, inputs: tuple[Any, ...]) -> ChannelGraph:
    """Trace a network in eval mode and label its channels; the network is not changed.

    Args:
        model: its modules keep their names.
        inputs: positional, for the sizes between the layers.

    Raises:
        ValueError: ``torch.fx`` cannot trace it.
    """
    try:
        graph = fx.GraphModule(model, fx.Tracer().trace(model))
    except TRACE_ERRORS as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"compress: torch.fx cannot trace this network, so its filters cannot be removed: {first}"
        ) from error
    labels = _Labeller(graph)
    with torch.no_grad():
        labels.run(*inputs)
    return labels.found


class _Labeller(fx.Interpreter):
    """Runs a traced network and labels the channels of every value on the way."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found = ChannelGraph()
        self._labels: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then label what it gave."""
        value = super().run_node(n)
        sources = [node for node in n.all_input_nodes if node in self._labels]
        if n.op == "output":
            for node in sources:
                self.found.pin(self._labels[node], "an output of the network")
        elif isinstance(value, Tensor) and value.dim() >= 2:
            self._labels[n] = self._given(n, value, sources)
        elif sources and n.target not in _SIZES:
            self._stop(sources, n)
        return value

    def _stop(self, sources: list[fx.Node], n: fx.Node) -> None:
        what = type(self.fetch_attr(str(n.target))).__name__ if n.op == "call_module" else _name(n.target)
        for node in sources:
            self.found.pin(self._labels[node], f"read by {what}, through which channels cannot be followed")

    def _fresh(self, n: fx.Node, value: Tensor, sources: list[fx.Node]) -> list[int]:
        """Labels of a value whose channels have nothing to do with those before: all of them stay."""
        self._stop(sources, n)
        made = self.found.new(value.shape[1])
        self.found.pin(made, f"given by {_name(n.target)}")
        return made

    def _given(self, n: fx.Node, value: Tensor, sources: list[fx.Node]) -> list[int]:
        if n.op == "placeholder":
            made = self.found.new(value.shape[1])
            self.found.pin(made, "an input of the network")
            return made
        first = self._labels[sources[0]] if sources else []
        if n.op == "call_module":
            return self._module(n, self.fetch_attr(str(n.target)), value, sources)
        if n.op == "get_attr" or not sources:
            return self._fresh(n, value, sources)
        if n.target in _SAME_CHANNELS and len(sources) == 1 and value.shape[1] == len(first):
            if n.target not in _HOMOGENEOUS:
                self.found.bent.update(first)
            return first
        if n.target in ("mean", torch.mean) and len(sources) == 1 and _over_pixels(n):
            return first
        if n.target in _ARITHMETIC:
            return self._arithmetic(n, value, sources)
        if n.target in (torch.cat, torch.concat) and _dimension(n) == 1:
            tensors = n.args[0] if n.args else n.kwargs["tensors"]
            if all(node in self._labels for node in tensors):  # type: ignore[union-attr]
                return [label for node in tensors for label in self._labels[node]]  # type: ignore[union-attr,index]
        if _flattens(n) and value.dim() == 2 and value.shape[1] % len(first) == 0:
            return _repeated(first, value.shape[1] // len(first))
        return self._fresh(n, value, sources)

    def _arithmetic(self, n: fx.Node, value: Tensor, sources: list[fx.Node]) -> list[int]:
        many = [self._labels[node] for node in sources]
        operands = [arg for arg in n.args if isinstance(arg, (fx.Node, Tensor))]
        if any(len(labels) != value.shape[1] for labels in many) or any(
            isinstance(arg, Tensor) or arg not in self._labels for arg in operands
        ):
            return self._fresh(n, value, sources)
        for labels in many[1:]:
            self.found.tie(many[0], labels)
        for labels in many:
            self.found.bent.update(labels)
        return many[0]

    def _module(self, n: fx.Node, module: nn.Module, value: Tensor, sources: list[fx.Node]) -> list[int]:
        if len(sources) != 1:
            return self._fresh(n, value, sources)
        reads = self._labels[sources[0]]
        if isinstance(module, _SAME_CHANNELS_MODULES) and value.shape[1] == len(reads):
            if not isinstance(module, _HOMOGENEOUS_MODULES):
                self.found.bent.update(reads)
            return reads
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and value.dim() == 2:
            return _repeated(reads, value.shape[1] // len(reads))
        changes = foreign_hooks(module) or parametrize.is_parametrized(module) or module._forward_pre_hooks
        if type(module) in _NORMS and not changes:
            before = sources[0]
            conv = self.fetch_attr(str(before.target)) if before.op == "call_module" else None
            if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and conv not in self.found.norms:
                self.found.norms[conv] = module
            else:
                self.found.bent.update(reads)
            return self._member(n, module, reads, lambda: reads).gives
        if type(module) is nn.PReLU and not changes:
            self.found.bent.update(reads)
            return reads if module.num_parameters == 1 else self._member(n, module, reads, lambda: reads).gives
        if type(module) is nn.Linear and not changes and value.dim() == 2:
            gives = self._member(n, module, reads, lambda: self.found.new(module.out_features)).gives
            self.found.pin(gives, "given by a linear layer")
            return gives
        if refusal(module) is None and not changes and isinstance(module, nn.Conv2d):
            return self._convolution(n, module, reads)
        return self._fresh(n, value, sources)

    def _convolution(self, n: fx.Node, conv: nn.Conv2d, reads: list[int]) -> list[int]:
        C, K, G = conv.in_channels, conv.out_channels, conv.groups
        if G > 1:
            self.found.bent.update(reads)
        if G > 1 and G == C:  # each channel has filters of its own, which go with it
            return self._member(n, conv, reads, lambda: _repeated(reads, K // C)).gives
        known = conv in self.found.members
        member = self._member(n, conv, reads, lambda: self.found.new(K))
        if G > 1 and not known:
            for labels in (member.reads, member.gives):
                size = len(labels) // G
                self.found.balanced.append([labels[g * size : (g + 1) * size] for g in range(G)])
        return member.gives

    def _member(self, n: fx.Node, module: nn.Module, reads: list[int], give: Any) -> Member:
        """The record of a module; one that is called again reads and gives the same channels."""
        known = self.found.members.get(module)
        if known is None:
            known = self.found.members[module] = Member(str(n.target), module, reads, give())
        else:
            self.found.tie(known.reads, reads)
            self.found.bent.update((*known.reads, *reads, *known.gives))
        return known


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _repeated(labels: list[int], times: int) -> list[int]:
    return [label for label in labels for _ in range(times)]


def _dimension(n: fx.Node) -> Any:
    return n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)


def _flattens(n: fx.Node) -> bool:
    """Whether a node is ``flatten(x, 1)``, or a view that names no number of channels."""
    if n.target in (torch.flatten, "flatten"):
        start: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("start_dim", 0)
        return bool(start == 1) and len(n.args) < 3 and "end_dim" not in n.kwargs
    last: Any = n.args[-1]
    return n.target in ("view", "reshape") and len(n.args) == 3 and bool(last == -1)


def _over_pixels(n: fx.Node) -> bool:
    """Whether a mean is over rows and columns alone."""
    dims = _dimension(n)
    return isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]


# --- removal ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def remove(graph: ChannelGraph, gone: set[int]) -> None:
    """Take the channels of these classes out of every module, in place; shapes and counts of the modules follow."""
    for member in graph.members.values():
        module: Any = member.module
        reads, gives = ([i for i, label in enumerate(labels) if graph.root(label) not in gone]
                        for labels in (member.reads, member.gives))  # fmt: skip
        if len(reads) == len(member.reads) and len(gives) == len(member.gives):
            continue
        if isinstance(module, nn.Conv2d):
            _replace(module, "weight", conv_weight(module, reads, gives))
            _replace(module, "bias", None if module.bias is None else module.bias[gives])
            module.groups = len(reads) if module.groups > 1 and module.groups == module.in_channels else module.groups
            module.in_channels, module.out_channels = len(reads), len(gives)
        elif isinstance(module, nn.Linear):
            _replace(module, "weight", module.weight[:, reads])
            module.in_features = len(reads)
        elif isinstance(module, nn.PReLU):
            _replace(module, "weight", module.weight[gives])
            module.num_parameters = len(gives)
        else:
            for name in ("weight", "bias"):
                value = getattr(module, name)
                _replace(module, name, None if value is None else value[gives])
            for name in ("running_mean", "running_var"):
                value = getattr(module, name)
                setattr(module, name, None if value is None else value[gives].clone())
            module.num_features = len(gives)


def conv_weight(conv: nn.Conv2d, reads: list[int], gives: list[int]) -> Tensor:
    """The filters that remain, each with the channels of its own group that remain."""
    if conv.groups == 1:
        return conv.weight[gives][:, reads]
    if conv.groups == conv.in_channels:
        return conv.weight[gives]
    per, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    rows = [conv.weight[k, [c % per for c in reads if c // per == k // outputs]] for k in gives]
    return torch.stack(rows)


def _replace(module: nn.Module, name: str, value: Tensor | None) -> None:
    """A parameter of another shape; whoever optimises the old one must be told."""
    old = getattr(module, name)
    if old is not None and value is not None:
        setattr(module, name, nn.Parameter(value.contiguous().clone(), requires_grad=old.requires_grad))


def conv_costs(graph: ChannelGraph, gone: set[int], member: Member) -> tuple[int, int, int]:
    """(K, C, weights) of a convolution after a removal."""
    conv: Any = member.module
    reads, gives = (sum(graph.root(label) not in gone for label in labels) for labels in (member.reads, member.gives))
    groups = reads if conv.groups > 1 and conv.groups == conv.in_channels else conv.groups
    return gives, reads, gives * (reads // groups) * math.prod(conv.kernel_size)
