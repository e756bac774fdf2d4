"""A network gets the structure of a recipe: new layers, new graphs, and a change that is undone if anything fails."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from basisconv_kernels.compression import recipe_graphs
from basisconv_kernels.compression.container import refuse
from basisconv_kernels.compression.recipe import Graph, Layer, kind_named
from basisconv_kernels.compression.recipe_network import Network, refuse_other_dtype
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError


def find(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of this name; None where there is none."""
    module: nn.Module | None = model
    for step in name.split(".") if name else ():
        module = None if module is None else module._modules.get(step)
    return module


def new_layers(stored: Network, model: nn.Module, source: str) -> list[tuple[Layer, nn.Module]]:
    """The layers of a file that the model does not have yet, with memory but without values.

    Args:
        stored: what the file holds.
        model: stays as it is.
        source: the file's name, for messages.

    Raises:
        ArchitectureError, FileFormatError: as for ``load``.
    """
    made: list[tuple[Layer, nn.Module]] = []
    memory: dict[tuple[str, bool], Tensor] = {}
    for layer in stored.recipe.layers:
        name, kind = layer.names[0], kind_named(layer.kind)
        modules = [_module(model, each, source) for each in layer.names]
        if any(module is not modules[0] for module in modules):
            others = ", ".join(layer.names[1:])
            raise ArchitectureError(f"{source}: layer {name!r} is one with {others} in the file, not in the model")
        if type(modules[0]) is kind.module_type and kind.describe(modules[0]) == layer.description:
            continue
        try:
            new = kind.rebuild(layer.description, modules[0])
            device = next((p.device for p in modules[0].parameters()), torch.device("cpu"))
            _give_memory(new, name, device, stored, memory, source)
        except ArchitectureError as error:
            raise ArchitectureError(f"{source}: layer {name!r}: {error}") from error
        except FileFormatError:
            raise
        except (TypeError, ValueError) as error:  # of the layer's constructor
            raise FileFormatError(f"{source}: layer {name!r}: {error}") from error
        made.append((layer, new))
    return made


def new_graphs(stored: Network, model: nn.Module, source: str) -> list[tuple[Graph, fx.Graph]]:
    """The graphs of a file that the model does not have yet, calling what the model's modules call.

    Raises:
        ArchitectureError: as for ``load``.
    """
    made = []
    for graph in stored.recipe.graphs:
        module = _module(model, graph.names[0], source)
        if isinstance(module, fx.GraphModule) and recipe_graphs.describe_graph(module, graph.names) == graph:
            continue
        try:
            made.append((graph, recipe_graphs.bind_graph(graph, module, source)))
        except ArchitectureError as error:
            raise ArchitectureError(f"{source}: graph {graph.names[0]!r}: {error}") from error
    return made


def _module(model: nn.Module, name: str, source: str) -> nn.Module:
    found = find(model, name)
    if found is None:
        close = difflib.get_close_matches(name, [n for n, _ in model.named_modules()], n=3)
        hint = f"; it has {', '.join(close)}" if close else ""
        raise ArchitectureError(f"{source}: the model has no module {name!r}, which the file needs{hint}")
    return found


def _give_memory(
    layer: nn.Module,
    name: str,
    device: torch.device,
    stored: Network,
    memory: dict[tuple[str, bool], Tensor],
    source: str,
) -> None:
    """Replace the meta tensors of a new layer; what new layers share in the file, they share again."""
    for prefix, module in layer.named_modules():
        slots: tuple[tuple[bool, dict[str, Any]], ...] = ((True, module._parameters), (False, module._buffers))
        for trained, slot in slots:
            for key, empty in slot.items():
                if empty is None or not empty.is_meta:
                    continue
                full = ".".join(part for part in (name, prefix, key) if part)
                first = stored.recipe.shared.get(full, full)
                values = stored.tensors.get(first)
                if values is None or values.shape != empty.shape:
                    got = "none" if values is None else list(values.shape)
                    refuse(source, f"layer {name!r}: tensor {full!r} must be {list(empty.shape)}, got {got}")
                refuse_other_dtype(full, values, empty)
                made = torch.empty(empty.shape, dtype=empty.dtype, device=device)
                if trained:
                    made = nn.Parameter(made, requires_grad=empty.requires_grad)
                slot[key] = memory.setdefault((first, trained), made)


class Transaction:
    """Changes of a network that are undone, last first, when the block is left by an exception, whatever it is."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            for step in reversed(self._undo):
                step()

    def put(self, network: nn.Module, names: tuple[str, ...], module: nn.Module) -> nn.Module:
        """Put a module under its names; the network, or the module itself where it is the whole network."""
        for name in names:
            parent, _, child = name.rpartition(".")
            holder = find(network, parent)
            if name and holder is not None:
                slot = holder._modules
                self._undo.append(functools.partial(slot.__setitem__, child, slot[child]))
                slot[child] = module
        return module if "" in names else network

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Keep copies of tensors that will be written."""
        kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._undo.append(functools.partial(_restore, kept))


@torch.no_grad()
def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in kept:
        if not same_bits(tensor, values):  # what was not written might not be writable either
            tensor.copy_(values)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaN and the sign of zero included."""
    a, b = (t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(a, b)
