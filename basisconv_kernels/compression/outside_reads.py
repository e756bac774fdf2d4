"""Which layers of a network are more than called: code outside them reads what no replacement has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from basisconv_kernels.compression.survey import REFUSALS, evaluating, run, substitute
from basisconv_kernels.layers.conversion import refusal
from basisconv_kernels.layers.ternary_linear import linear_refusal

# What all layers of this package have with the meaning that it has in Conv2d or Linear. Not ``padding``, of which some
# keep four numbers, nor ``weight``, which in some is a latent from which the filters are made.
SHARED = frozenset((
    "bias", "dilation", "groups", "in_channels", "in_features", "kernel_size", "out_channels", "out_features",
    "padding_mode", "stride",
))  # fmt: skip
FAILURES = (*REFUSALS, AttributeError, AssertionError)


class _StandIn(nn.Module):
    """Another module in the place of a layer: passes calls on, and notes what else is asked of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stood_for = layer
        self.read: dict[str, None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.stood_for(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols, such as that of copying, which no layer answers itself
            raise AttributeError(name)
        layer = self.__dict__["_modules"]["stood_for"]
        if name == "stood_for":
            return layer
        value = getattr(layer, name)  # an AttributeError where the layer has none either
        if name not in SHARED:
            self.read[name] = None
        return value


def outside_reads(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """{first name of a Conv2d or Linear: why nothing can stand in its place}, as one run in eval mode shows.

    That run has a stand-in for every such layer, which answers what it is asked, so that it shows all reads at once.
    Where the network does not run with them at all (it looks at the class of a layer, say), each layer has its turn.
    The network is as it was afterwards.

    Args:
        model: the network.
        example_inputs: of the network; where it does not take them, nothing is found.
    """
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if refusal(module) is None or linear_refusal(module) is None:
            names[module] = name
    modules = list(names)
    with torch.compiler.set_stance("force_eager"):  # nothing is worth compiling with stand-ins
        found, failure = _replaced(model, modules, example_inputs)
        if failure is not None:
            if _replaced(model, [], example_inputs)[1] is not None:
                return {}
            for module in modules:
                alone, failure = _replaced(model, [module], example_inputs)
                if failure is not None:
                    alone[module] = f"the network does not run with another module in its place: {failure}"
                found |= alone
    return {names[module]: reason for module, reason in found.items()}


def _replaced(
    model: nn.Module, modules: Sequence[nn.Module], example_inputs: Any
) -> tuple[dict[nn.Module, str], Exception | None]:
    """What a run with stand-ins for these modules shows of them, and how it failed, if it did."""
    stand_ins = {module: _StandIn(module) for module in modules}
    failure: Exception | None = None
    model = substitute(model, stand_ins)
    try:
        with evaluating(model):
            run(model, example_inputs)
    except FAILURES as error:
        failure = error
    finally:
        substitute(model, {stand_in: module for module, stand_in in stand_ins.items()})
    read = {module: list(stand_in.read) for module, stand_in in stand_ins.items() if stand_in.read}
    return {module: f"code outside it reads its {' and '.join(names)}" for module, names in read.items()}, failure
