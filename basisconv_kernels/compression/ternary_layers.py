"""The layers of a network that may become ternary: found, pruned as a whole, put in order, replaced and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.survey import substitute
from basisconv_kernels.layers import conversion
from basisconv_kernels.layers.ternary import TernaryLayer
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear, linear_refusal


@dataclass(frozen=True)
class Weighted:
    """A convolution or linear layer; used several times, under several names, it is one."""

    name: str
    names: tuple[str, ...]
    module: nn.Module
    against: str | None  # why it cannot become ternary

    @property
    def weights(self) -> int:
        """How many weights it has."""
        weight = getattr(self.module, "weight", None)
        return 0 if weight is None else weight.numel()


def weighted_layers(model: nn.Module, read: Mapping[str, str], *, linear: bool = True) -> list[Weighted]:
    """The convolutions and linear layers of a network, in the order of its modules.

    Args:
        model: the network.
        read: of ``outside_reads``: layers that nothing can stand in the place of, by first name.
        linear: whether linear layers count.
    """
    places: dict[nn.Module, list[str]] = {}
    kinds = (nn.modules.conv._ConvNd, nn.Linear) if linear else (nn.modules.conv._ConvNd,)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            places.setdefault(module, []).append(name)
    owners: dict[int, str] = {}
    found = []
    for module, names in places.items():
        against = _against(module)
        weight = module._parameters.get("weight")
        first = owners.setdefault(id(weight), names[0]) if weight is not None else names[0]
        if against is None and first != names[0]:
            against = f"shares its weight parameter with {first}"
        against = against or read.get(names[0])
        found.append(Weighted(names[0], tuple(names), module, against))
    return found


def _against(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return linear_refusal(module)
    against = conversion.refusal(module)
    if against is None and (conversion.foreign_hooks(module) or module._forward_pre_hooks):
        return "carries hooks, which a conversion would lose"
    if against is None and "weight" not in module._parameters:
        return "has a parametrised weight; remove the parametrisation first"
    return against


def prune_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The masks that set exactly ``round(sparsity·n)`` of all n weights to 0, the smallest by magnitude.

    Equal magnitudes go in the order of the mapping and of the elements, so the count is exact and the choice the same
    in every run.
    """
    flat = torch.cat([w.detach().to("cpu", torch.float64).abs().reshape(-1) for w in weights.values()])
    order = torch.argsort(flat, stable=True)
    kept = torch.ones(flat.numel(), dtype=torch.bool)
    kept[order[: math.floor(sparsity * flat.numel() + 0.5)]] = False
    pieces = kept.split([w.numel() for w in weights.values()])
    return {name: piece.reshape(w.shape).to(w.device) for (name, w), piece in zip(weights.items(), pieces, strict=True)}


def order_of(masks: Mapping[str, Tensor]) -> list[str]:
    """Names by falling sparsity within the layer: the least significant first; of equals the one with more weights."""

    def key(name: str) -> tuple[float, int]:
        mask = masks[name]
        return (int(mask.sum()) / mask.numel(), -mask.numel())

    return sorted(masks, key=key)  # stable: then the order of the network


def ternary_of(
    module: nn.Module, rule: str, mask: Tensor | None, scale_per_output: bool, threshold: float | None
) -> TernaryLayer:
    """The ternary layer of a dense one."""
    settings = {"rule": rule, "mask": mask, "scale_per_output": scale_per_output, "threshold": threshold}
    if isinstance(module, nn.Linear):
        return TernaryLinear.from_linear(module, **settings)  # type: ignore[arg-type]
    return TernaryConv2d.from_conv(module, **settings)  # type: ignore[arg-type]


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The network with one module in the place of another, wherever that stood."""
    return substitute(model, {old: new})
