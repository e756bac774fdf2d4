"""``save`` and ``load``: compressed networks as safetensors files with a recipe, without pickle.

The format is in docs/model_files.md; ``container`` holds its bytes, ``recipe`` what they say about the network.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from basisconv_kernels.compression import (
    container,
    recipe_binary,  # noqa: F401  (registers layer kinds, like those below)
    recipe_graphs,
    recipe_layers,  # noqa: F401  (registers the layer kinds)
    recipe_stacked,  # noqa: F401  (and one more)
    recipe_ternary,  # noqa: F401
)
from basisconv_kernels.compression.narrow import narrowed
from basisconv_kernels.compression.recipe import Recipe
from basisconv_kernels.compression.recipe_network import Network, describe, refuse_difference, refuse_empty, some
from basisconv_kernels.compression.restructure import Transaction, find, new_graphs, new_layers, same_bits
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state and the structure that ``compress`` and ``fold_batchnorm`` gave it into one file.

    The file holds every entry of the ``state_dict`` in its own dtype, a tensor shared by several modules once, and a
    JSON recipe; never packed weights, code or pickles. Equal networks give equal bytes. The training flags, gradients
    and ``requires_grad`` of the network, and the ``backend`` of its layers, are not stored.

    Args:
        model (Module): on any device, in any mode; it is not changed.
        path: of the file, usually ``*.safetensors``; an old file is replaced at the very end, all at once.

    Raises:
        TypeError: the state holds something else than dense tensors of the usual dtypes, a layer is a subclass of one
            of this package's, or a graph has arguments that the format has no form for.
        ValueError: a tensor has no values yet (meta or lazy), or the recipe exceeds a limit of the format.
        OSError: the file could not be written; an old file of that name is as it was.

    Example:
        >>> import tempfile, torch
        >>> from basisconv_kernels.compression.config import BasisConfig
        >>> from basisconv_kernels.compression.files import load, save
        >>> from basisconv_kernels.compression.model import compress
        >>> def network():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU())
        >>> image = torch.randn(1, 3, 16, 16)
        >>> small, _ = compress(network(), BasisConfig(fraction=0.25), example_inputs=image)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(small, f"{folder}/small.safetensors")
        ...     again = load(f"{folder}/small.safetensors", network())
        >>> torch.equal(again(image), small(image))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be a torch.nn.Module, got {type(model).__name__}")
    recipe, tensors = describe(model, "save")
    contiguous = {"memory_format": torch.contiguous_format}
    stored = {name: tensor.detach().to("cpu").clone(**contiguous) for name, tensor in tensors.items()}
    try:
        content = container.encode(recipe.to_document(), stored)
        _decode(content, "what would be written")  # what could not be read again is not written
    except (FileFormatError, UnicodeEncodeError) as error:
        raise ValueError(f"save: the format cannot hold this network: {error}") from error
    write_atomically(path, content)


def load(path: str | os.PathLike[str], model: nn.Module, *, pruned: bool = False) -> nn.Module:
    """Give a network the structure and the state in a file that ``save`` wrote.

    Everything is read and checked first. On success ``model`` is changed in place; on any error its modules, tensors
    and flags are what they were. Training flags, devices, and ``requires_grad`` of what stays dense are the model's
    own; replaced layers take those of the dense layers. The random number generators are not touched.

    Args:
        path: of the file.
        model (Module): freshly built, of the architecture that was compressed, in the dtype that was saved; or already
            of the file's structure.
        pruned (bool): the file may have fewer channels than the model, as ``PruneConfig`` leaves it. The result is then
            a new module, and ``model`` is not changed.

    Returns:
        Module: ``model`` itself, unless ``pruned``, or the whole network is one replaced module: a convolution alone,
        or a network that ``fold_batchnorm`` traced as a whole. Then it is a new module, and ``model`` is not changed.

    Raises:
        FileFormatError: the file is truncated, edited, foreign or of a newer version; names file and problem.
        ArchitectureError: the file is intact, but the model lacks a layer, has another one, or other shapes, dtypes
            or shared tensors; names them.
        ValueError: the model has no memory for values yet (meta or lazy), or is one of inference tensors.
        OSError: the file could not be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be a torch.nn.Module, got {type(model).__name__}")
    source = f"load: {os.fspath(path)}"
    stored = _decode(Path(path).read_bytes(), source)
    _refuse_unwritable(model)
    if pruned:
        model = narrowed(model, stored, source)
    layers, graphs = new_layers(stored, model, source), new_graphs(stored, model, source)
    target = copy.deepcopy(model) if any("" in graph.names for graph, _ in graphs) else model
    with Transaction() as transaction:
        for layer, module in layers:
            target = transaction.put(target, layer.names, module)
        try:
            for graph, bound in graphs:
                dense, prefix = find(target, graph.names[0]), f"{graph.names[0]}.".lstrip(".")
                made = recipe_graphs.make_module(bound, dense or target, prefix, stored.tensors)
                target = transaction.put(target, graph.names, made)
            refuse_difference(stored, describe(target, "load"))
            owned = {id(t) for t in (*model.parameters(), *model.buffers())}
            transaction.remember(t for t in (*target.parameters(), *target.buffers()) if id(t) in owned)
            _fill(target, stored)
        except ArchitectureError as error:
            raise ArchitectureError(f"{source}: {error}") from error
    return target


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says about its network, without the network; the whole file is verified.

    Returns:
        dict: ``version`` (int); ``layers``, ``graphs`` and ``shared`` as in docs/model_files.md; ``tensors``:
        {name: {"dtype": "float32", "shape": [...]}}; ``bytes`` (int): the file's size.

    Raises:
        FileFormatError: as for ``load``.
        OSError: the file could not be read.
    """
    content = Path(path).read_bytes()
    recipe, stored = _decode(content, f"read_recipe: {os.fspath(path)}")
    tensors = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in sorted(stored.items())
    }
    return {"version": container.VERSION, **recipe.to_document(), "tensors": tensors, "bytes": len(content)}


def _decode(content: bytes, source: str) -> Network:
    document, tensors = container.decode(content, source)
    recipe = Recipe.from_document(document, tensors, source)
    for graph in recipe.graphs:
        recipe_graphs.check_graph(graph, source)
    return Network(recipe, tensors)


def _refuse_unwritable(model: nn.Module) -> None:
    """Refuse tensors that have no memory, or that PyTorch would write first and complain about then."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    refuse_empty(tensors, "load")
    for name, tensor in tensors:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"load: {name} was made in torch.inference_mode(); load there too, or build the model elsewhere"
            )


def _fill(network: nn.Module, stored: Network) -> None:
    """Load the values, and see that they have arrived: modules may have their own ways of loading."""
    recipe, tensors = stored
    state = OrderedDict({**tensors, **{name: tensors[first] for name, first in recipe.shared.items()}})
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ArchitectureError(f"the model does not take the values: {error}") from error
    lost = {name for name, value in network.state_dict().items() if not same_bits(value, state[name])}
    if lost:
        raise ArchitectureError(f"the model's memory does not hold the values of {some(lost)}")
