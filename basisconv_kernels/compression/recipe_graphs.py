"""Graphs of ``torch.fx`` in a recipe: what ``fold_batchnorm`` leaves of a network, as JSON, and back.

A node is ``{"op", "target", "args", "kwargs"}``; empty args and kwargs are left out. Nodes refer to each other by
position. A file never names a function to be looked up: what a graph calls must be among the functions, the methods and
the modules that the given network itself calls when it is traced, so a file can choose no code of its own.
"""

from __future__ import annotations

import copy
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from basisconv_kernels.compression.container import refuse, shown
from basisconv_kernels.compression.fold import TRACE_ERRORS
from basisconv_kernels.compression.recipe import FOLDABLE, MAX_INT, NAME, Graph, described_types
from basisconv_kernels.core.errors import ArchitectureError

OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
MAX_NODES = 50_000

_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FORMATS = {str(f): f for f in vars(torch).values() if isinstance(f, torch.memory_format)}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_CONSTANT = re.compile(r"_tensor_constant\d{1,4}")  # how the tracer names tensors that it meets in a forward


def function_name(function: Callable[..., Any]) -> str:
    """How a file calls a function: module and name, ``torch.nn.functional.relu``."""
    module = getattr(function, "__module__", None) or "torch"
    return f"{'operator' if module == '_operator' else module}.{getattr(function, '__name__', type(function).__name__)}"


# --- to JSON ----------------------------------------------------------------------------------------------------------


def describe_graph(module: fx.GraphModule, names: tuple[str, ...]) -> Graph:
    """The graph as JSON values.

    Raises:
        TypeError: an argument that the format has no form for, or inputs and outputs that are not plain ones.
    """
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise TypeError(f"the graph of {names[0]!r} has its own calling convention, which a file cannot hold")
    position: dict[fx.Node, int] = {}
    nodes = []
    for node in module.graph.nodes:
        target = node.target if isinstance(node.target, str) else function_name(node.target)
        entry: dict[str, Any] = {"op": node.op, "target": target}
        if node.args:
            entry["args"] = [_to_json(value, position, node) for value in node.args]
        if node.kwargs:
            entry["kwargs"] = {key: _to_json(value, position, node) for key, value in node.kwargs.items()}
        nodes.append(entry)
        position[node] = len(position)
    return Graph(names, nodes)


def _to_json(value: Any, position: dict[fx.Node, int], node: fx.Node) -> Any:
    def inner(part: Any) -> Any:
        return _to_json(part, position, node)

    if isinstance(value, fx.Node):
        return {"node": position[value]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):  # torch.Size and named tuples too: as arguments they mean the same
        return {"tuple": [inner(part) for part in value]}
    if isinstance(value, list):
        return [inner(part) for part in value]
    if isinstance(value, slice):
        return {"slice": [inner(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {key: inner(part) for key, part in value.items()}}
    for kind, known in (("dtype", torch.dtype), ("device", torch.device), ("memory_format", torch.memory_format)):
        if isinstance(value, known):
            return {kind: str(value)}
    if value is Ellipsis:
        return {"ellipsis": None}
    raise TypeError(f"node {node.name!r} of the graph has an argument of {type(value)}, which a file cannot hold")


# --- from JSON --------------------------------------------------------------------------------------------------------


def check_graph(graph: Graph, source: str) -> None:
    """Refuse nodes that are malformed, whatever network they may belong to.

    Raises:
        FileFormatError: names the graph and the node.
    """
    nodes = graph.nodes
    if not 1 <= len(nodes) <= MAX_NODES:
        refuse(source, f"graph {shown(graph.names[0])} must have 1..{MAX_NODES} nodes, got {len(nodes)}")
    body = False
    for index, node in enumerate(nodes):
        what = f"graph {shown(graph.names[0])}, node {index}"
        if type(node) is not dict or not {"op", "target"} <= node.keys() <= {"op", "target", "args", "kwargs"}:
            refuse(source, f"{what} must hold op, target, args and kwargs, got {shown(node)}")
        op, args, kwargs = node["op"], node.get("args", []), node.get("kwargs", {})
        if type(op) is not str or op not in OPS or not NAME.check(node["target"]):
            refuse(source, f"{what} must have one of the ops {', '.join(OPS)} and a target, got {shown(node)}")
        if type(args) is not list or type(kwargs) is not dict:
            refuse(source, f"{what}: args must be a list and kwargs an object, got {shown(node)}")
        if not all(key.isidentifier() and not keyword.iskeyword(key) for key in kwargs):
            refuse(source, f"{what}: kwargs must have names, got {shown(list(kwargs))}")
        for value in (*args, *kwargs.values()):
            _from_json(value, range(index), what, source)
        simple = op in ("placeholder", "get_attr", "output")
        most = {"placeholder": 1, "get_attr": 0, "output": 1}.get(op, MAX_INT)
        least = 1 if op in ("output", "call_method") else 0
        if not least <= len(args) <= most or (simple and kwargs):
            refuse(source, f"{what}: {op} cannot have the arguments {shown((args, kwargs))}")
        if (op == "output") != (index == len(nodes) - 1) or (op == "placeholder" and body):
            refuse(source, f"{what}: inputs come first and one output last, got {op}")
        body = op != "placeholder"


def _from_json(value: Any, nodes: Sequence[Any], what: str, source: str) -> Any:
    """The argument that a JSON value stands for; ``nodes`` are those before it."""

    def inner(part: Any) -> Any:
        return _from_json(part, nodes, what, source)

    if value is None or type(value) in (bool, str, float) or (type(value) is int and abs(value) <= 2**63):
        return value
    if type(value) is list:
        return [inner(part) for part in value]
    if type(value) is dict and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "node" and type(content) is int and 0 <= content < len(nodes):
            return nodes[content]
        if kind == "tuple" and type(content) is list:
            return tuple(map(inner, content))
        if kind == "slice" and type(content) is list and len(content) == 3:
            return slice(*map(inner, content))
        if kind == "dict" and type(content) is dict:
            return {key: inner(part) for key, part in content.items()}
        if kind == "ellipsis" and content is None:
            return Ellipsis
        if kind == "device" and type(content) is str and _DEVICE.fullmatch(content):
            return torch.device(content)
        tables: dict[str, Mapping[str, Any]] = {"float": _FLOATS, "dtype": _DTYPES, "memory_format": _FORMATS}
        if type(content) is str and content in tables.get(kind, {}):
            return tables[kind][content]
    return refuse(source, f"{what}: {shown(value)} is no argument")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in described_types() or super().is_leaf_module(module, name)


def bind_graph(graph: Graph, network: nn.Module, source: str) -> fx.Graph:
    """The graph with the functions that ``network`` calls; the network stays as it is.

    Args:
        graph: checked by ``check_graph``.
        network: what stands in the graph's place.
        source: the file's name, for messages.

    Raises:
        ArchitectureError: the network cannot be traced, has other inputs, or calls other modules or functions.
    """
    try:
        # A copy, since tracing runs the forward and may leave attributes behind.
        with torch.random.fork_rng(devices=()):
            traced = _Tracer().trace(copy.deepcopy(network).eval())
        inputs = [(n.target, _to_json(list(n.args), {}, n)) for n in traced.nodes if n.op == "placeholder"]
    except TRACE_ERRORS as error:
        raise ArchitectureError(f"torch.fx cannot trace the model's module: {error}") from error
    functions: dict[str, Callable[..., Any]] = {}
    for node in traced.nodes:
        if node.op == "call_function" and callable(node.target):
            name = function_name(node.target)
            if functions.setdefault(name, node.target) is not node.target:
                raise ArchitectureError(f"the model calls two functions that are both named {name}")
    methods = {node.target for node in traced.nodes if node.op == "call_method"}
    found = [(node["target"], node.get("args", [])) for node in graph.nodes if node["op"] == "placeholder"]
    if found != inputs:
        raise ArchitectureError(f"its inputs are {shown(found)} in the file, {shown(inputs)} in the model")
    used = {node["target"] for node in graph.nodes if node["op"] == "call_module"}
    for node in traced.nodes:
        name = str(node.target)
        if node.op == "call_module" and name not in used and not isinstance(network.get_submodule(name), FOLDABLE):
            raise ArchitectureError(f"the model calls {name!r}, the graph does not")
    bound = fx.Graph()
    nodes: list[fx.Node] = []
    for index, entry in enumerate(graph.nodes):
        op, target = entry["op"], entry["target"]
        what = f"node {index}"
        known = {"call_function": functions, "call_method": methods}.get(op, (target,))
        if target not in known:
            raise ArchitectureError(f"it calls {shown(target)}, which the model does not call")
        args = tuple(_from_json(value, nodes, what, source) for value in entry.get("args", []))
        kwargs = {key: _from_json(value, nodes, what, source) for key, value in entry.get("kwargs", {}).items()}
        nodes.append(bound.create_node(op, functions[target] if op == "call_function" else target, args, kwargs))
    return bound


def make_module(bound: fx.Graph, network: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A GraphModule that calls the submodules of ``network``, which is not changed.

    Args:
        bound: from ``bind_graph``.
        network: where modules and attributes are taken from; converted layers are in their places already.
        prefix: of the network's names in the file, ``""`` or ending in a dot.
        tensors: the file's, for constants that only the graph holds.

    Raises:
        ArchitectureError: a module or attribute of the graph is missing, or its nodes make no program.
    """
    registered = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    parts: dict[str, Any] = {}
    for node in bound.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in parts:
            continue
        found: Any = network
        for step in target.split("."):
            found = _attribute(found, step)
        if found is None and _CONSTANT.fullmatch(target) and prefix + target in tensors:
            device = next((p.device for p in network.parameters()), None)
            found = torch.empty_like(tensors[prefix + target], device=device)
        wanted: Any = nn.Module if node.op == "call_module" else Tensor
        if not isinstance(found, wanted):
            raise ArchitectureError(f"it uses {shown(target)}, which the model does not have")
        # The graph registers every tensor, so a plain attribute would be written where nobody undoes it.
        parts[target] = found.clone() if wanted is Tensor and id(found) not in registered else found
    try:
        made = fx.GraphModule(parts, bound, type(network).__name__)
    except (*TRACE_ERRORS, SyntaxError) as error:  # whatever the code generator meets first: too few operands, say
        raise ArchitectureError(f"torch.fx makes no program of it: {error}") from error
    made.training = network.training
    for name, module in made.named_modules():
        if type(module) is nn.Module:  # the containers between the graph and its modules
            module.training = network.get_submodule(name).training
    return made


def _attribute(module: Any, name: str) -> Any:
    """What a module holds under a name; no properties, which would run code."""
    if not isinstance(module, nn.Module):
        return None
    holders: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers, vars(module))
    return next((holder[name] for holder in holders if name in holder), None)
