"""A dense network with the channel counts of a file: what ``load`` needs to give it a pruned structure."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basisconv_kernels.compression.recipe_network import Network
from basisconv_kernels.core.errors import ArchitectureError

COUNTS = ("in_channels", "out_channels", "groups")


def narrowed(model: nn.Module, stored: Network, source: str) -> nn.Module:
    """A copy of a network whose modules have the channels that a file states; their values mean nothing yet.

    Convolutions follow the recipe; linear layers, BatchNorms and PReLUs the shapes of their tensors. Only fewer
    channels are taken over; anything else is left to the comparison that follows.

    Raises:
        ArchitectureError: the file has more channels somewhere than the network.
    """
    target = copy.deepcopy(model)
    modules = dict(target.named_modules(remove_duplicate=False))
    for layer in stored.recipe.layers:
        module = modules.get(layer.names[0])
        wished = {key: layer.description[key] for key in COUNTS if key in layer.description}
        if isinstance(module, nn.Conv2d) and {"in_channels", "out_channels"} <= wished.keys():
            _narrow_convolution(layer.names[0], module, wished, source)
    done = set()
    for name, module in modules.items():
        if module in done:
            continue
        done.add(module)
        weight = stored.tensors.get(f"{name}.weight".lstrip("."))
        if isinstance(module, nn.Linear) and weight is not None and weight.dim() == 2:
            _refuse_more(name, tuple(weight.shape), tuple(module.weight.shape), source)
            module.out_features, module.in_features = weight.shape
            _cut(module, tuple(weight.shape))
        elif isinstance(module, (_BatchNorm, nn.PReLU)):
            mean = stored.tensors.get(f"{name}.running_mean".lstrip("."))
            shape = next((tuple(t.shape) for t in (weight, mean) if t is not None), None)
            if shape is not None and len(shape) == 1:
                _narrow_channels(name, module, shape[0], source)
    return target


def _narrow_convolution(name: str, module: nn.Conv2d, wished: dict[str, Any], source: str) -> None:
    K, C, groups = wished["out_channels"], wished["in_channels"], wished.get("groups", module.groups)
    _refuse_more(name, (K, C), (module.out_channels, module.in_channels), source)
    if (K, C, groups) == (module.out_channels, module.in_channels, module.groups) or C % groups or K % groups:
        return
    module.out_channels, module.in_channels, module.groups = K, C, groups
    _cut(module, (K, C // groups, *module.kernel_size))


def _narrow_channels(name: str, module: Any, count: int, source: str) -> None:
    attribute = "num_features" if isinstance(module, _BatchNorm) else "num_parameters"
    _refuse_more(name, (count,), (getattr(module, attribute),), source)
    setattr(module, attribute, count)
    _cut(module, (count,))
    for buffer in ("running_mean", "running_var"):
        held = getattr(module, buffer, None)
        if isinstance(held, Tensor):
            setattr(module, buffer, held[:count].clone())


def _cut(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Weight and bias of a smaller shape, from the first values of the larger."""
    for name, sizes in (("weight", shape), ("bias", shape[:1])):
        held = module._parameters.get(name)
        if held is not None and tuple(held.shape) != sizes:
            part = held.detach()[tuple(slice(0, size) for size in sizes)]
            if tuple(part.shape) != sizes:  # a depthwise convolution that became an ordinary one, say
                part = held.new_zeros(sizes)
            setattr(module, name, nn.Parameter(part.clone(), requires_grad=held.requires_grad))


def _refuse_more(name: str, wished: tuple[int, ...], found: tuple[int, ...], source: str) -> None:
    if any(w > f for w, f in zip(wished, found, strict=True)):
        raise ArchitectureError(f"{source}: {name} has channels {list(wished)} in the file, {list(found)} in the model")
