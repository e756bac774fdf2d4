"""What a whole network is: its recipe and its tensors, and how it differs from what a file says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from basisconv_kernels.compression import container, recipe_graphs
from basisconv_kernels.compression.recipe import Layer, Recipe, difference, kind_of
from basisconv_kernels.core.errors import ArchitectureError


class Network(NamedTuple):
    """A recipe, and the tensors that it belongs to by their first names."""

    recipe: Recipe
    tensors: dict[str, Tensor]

    @property
    def names(self) -> set[str]:
        """All names of all tensors: the keys of the state_dict."""
        return {*self.tensors, *self.recipe.shared}


def describe(model: nn.Module, op: str) -> Network:
    """The recipe of a network, and the tensors of its state_dict themselves.

    Args:
        model: stays as it is.
        op: for messages.

    Raises:
        TypeError: something that a file cannot hold.
        ValueError: a tensor without values.
    """
    places: dict[nn.Module, list[str]] = {}
    inside: set[str] = set()  # names of described layers and of all that they contain
    for name, module in model.named_modules(remove_duplicate=False):
        within = name != "" and name.rpartition(".")[0] in inside
        if within or _kind(module, name, op) is not None:
            inside.add(name)
        if not within and (name in inside or isinstance(module, fx.GraphModule)):
            places.setdefault(module, []).append(name)
    layers, graphs = [], []
    for module, found in places.items():
        names, kind = tuple(sorted(found)), kind_of(module)
        try:
            if kind is not None:
                layers.append(Layer(kind.name, names, kind.describe(module)))
            elif isinstance(module, fx.GraphModule):
                graphs.append(recipe_graphs.describe_graph(module, names))
        except TypeError as error:
            raise TypeError(f"{op}: {names[0]!r}: {error}") from error
    tensors, shared = _state(model, op)
    layers.sort(key=lambda layer: layer.names)
    graphs.sort(key=lambda graph: graph.names)
    return Network(Recipe(tuple(layers), tuple(graphs), shared), tensors)


def refuse_empty(tensors: Iterable[tuple[str, Any]], op: str) -> None:
    """Refuse tensors without memory, by a ValueError."""
    for name, tensor in tensors:
        if is_lazy(tensor) or (isinstance(tensor, Tensor) and tensor.is_meta):
            raise ValueError(
                f"{op}: {name} has no values yet; build the network on a real device, and run lazy modules once"
            )


def refuse_difference(stored: Network, found: Network) -> None:
    """Refuse a network that has another structure, or tensors of other shapes and dtypes, than the one in a file.

    Raises:
        ArchitectureError: the first difference, in words.
    """
    layers = {layer.names: layer for layer in found.recipe.layers}
    for layer in stored.recipe.layers:
        same = layers.pop(layer.names, None)
        if same is None:
            raise ArchitectureError(f"layer {layer.names[0]!r} is shared under other names in the model")
        if same != layer:
            raise ArchitectureError(f"layer {layer.names[0]!r}: {difference(layer.description, same.description)}")
    for extra in layers.values():
        raise ArchitectureError(f"the model has a layer {extra.names[0]!r} ({extra.kind}), the file has none there")
    if stored.recipe.graphs != found.recipe.graphs:
        first, second = ([graph.names[0] for graph in n.recipe.graphs] for n in (stored, found))
        raise ArchitectureError(f"the graphs differ: the file has {first}, the model {second}")
    if stored.names != found.names:
        lacking, extra_names = some(stored.names - found.names), some(found.names - stored.names)
        raise ArchitectureError(f"tensors that the model lacks: {lacking}; that the file lacks: {extra_names}")
    if stored.recipe.shared != found.recipe.shared:
        differing = some({name for name, _ in stored.recipe.shared.items() ^ found.recipe.shared.items()})
        raise ArchitectureError(f"other tensors are one in the file than in the model: {differing}")
    for name, tensor in found.tensors.items():
        if stored.tensors[name].shape != tensor.shape:
            shapes = f"{list(stored.tensors[name].shape)} in the file, {list(tensor.shape)} in the model"
            raise ArchitectureError(f"{name} is {shapes}")
        refuse_other_dtype(name, stored.tensors[name], tensor)


def refuse_other_dtype(name: str, stored: Tensor, found: Tensor) -> None:
    """Refuse a tensor that would have to be converted."""
    if stored.dtype != found.dtype:
        raise ArchitectureError(
            f"{name} is {stored.dtype} in the file, {found.dtype} in the model; "
            f"convert the model first: model.to({stored.dtype})"
        )


def some(names: set[str]) -> str:
    """A few of the names, and how many more there are."""
    shown = sorted(names)[:5]
    return (", ".join(shown) or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _kind(module: nn.Module, name: str, op: str) -> str | None:
    try:
        kind = kind_of(module)
    except TypeError as error:
        raise TypeError(f"{op}: {name!r}: {error}") from error
    return None if kind is None else kind.name


def _state(model: nn.Module, op: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state_dict by their first names, and {further name: first name}."""
    state = model.state_dict(keep_vars=True)
    refuse_empty(state.items(), op)
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for name, value in sorted(state.items()):
        usual = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
        if not usual or value.dtype not in container.DTYPES.values():
            what = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: {name} must be a dense tensor of a usual dtype, got {what}")
        memory = (value.device, value.dtype, value.data_ptr(), value.shape, value.stride())
        owner = owners.setdefault(memory if value.numel() else id(value), name)
        if owner == name:
            tensors[name] = value
        else:
            shared[name] = owner
    return tensors, shared
