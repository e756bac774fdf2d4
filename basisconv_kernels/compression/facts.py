"""What can be said of a network's layers after any method: what stands there now, its bytes, its measured time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.report import CompressionReport, LayerReport
from basisconv_kernels.compression.survey import evaluating, run, watching
from basisconv_kernels.compression.timing import measure_ms, random_like
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.ternary import TernaryLayer


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors in a model file; of stacked binary and ternary layers in their frozen, packed form.

    Args:
        layer (Module): with everything inside it; a BatchNorm between the stages counts too.
    """
    if isinstance(layer, StackedBinaryConv2d):
        return layer.payload_bytes + sum(_bytes(t) for t in (layer.scale, layer.bias) if t is not None)
    if isinstance(layer, TernaryLayer):
        bias = getattr(layer, "bias", None)
        return -(-layer.packed_bits() // 8) + (0 if bias is None else _bytes(bias))
    return sum(_bytes(tensor) for tensor in layer.state_dict().values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Before:
    """What has to be known of the convolutions before anything is changed.

    Args:
        model: the network.
        names: of its convolutions.
        keep: whether copies of them are kept, to time them with.
    """

    def __init__(self, model: nn.Module, names: list[str], keep: bool) -> None:
        modules = {name: model.get_submodule(name) for name in names}
        self.bytes = {name: stored_bytes(module) for name, module in modules.items()}
        self.modules = {name: copy.deepcopy(module).eval() for name, module in modules.items()} if keep else {}
        self.inputs: dict[str, Tensor] = {}


def first_inputs(model: nn.Module, names: list[str], example_inputs: Any) -> dict[str, Tensor]:
    """{name: shape, dtype, device and memory format of the module's first input}, of those that are reached."""
    found: dict[str, Tensor] = {}

    def watcher_for(name: str) -> Callable[[Tensor, Tensor], None]:
        def watch(input: Tensor, output: Tensor) -> None:
            found.setdefault(name, torch.empty_like(input, device="meta"))

        return watch

    modules = {model.get_submodule(name): watcher_for(name) for name in names}
    with evaluating(model), watching(modules):
        run(model, example_inputs)
    return found


class _Fed(nn.Module):
    """A module with an input of its own, so that modules of different input shapes can take turns."""

    def __init__(self, module: nn.Module, input: Tensor) -> None:
        super().__init__()
        self.module, self.input = module, input

    def forward(self, ignored: Tensor) -> Any:
        return self.module(self.input)


def side_by_side(modules: list[nn.Module], examples: list[Tensor]) -> list[float]:
    """Median milliseconds a call of each module at random input of the shape of its example, taken in turn."""
    fed: list[nn.Module] = []
    device = torch.device("cpu")
    for module, example in zip(modules, examples, strict=True):
        held = next(iter((*module.parameters(), *module.buffers())), None)
        device = device if held is None else held.device
        fed.append(_Fed(module, random_like(example, device)))
    return measure_ms(fed, torch.zeros((), device=device))


def complete(
    report: CompressionReport, before: Before, model: nn.Module, example_inputs: Any, measure: bool
) -> CompressionReport:
    """The report with method and bytes of every layer, and with times where asked for."""
    rows = {row.name: _stated(row, before, model) for row in report.layers}
    if measure:
        changed = [name for name, row in rows.items() if row.verdict != "kept"]
        after = first_inputs(model, changed, example_inputs)
        for name in changed:
            if name in after and name in before.inputs:
                pair = [before.modules[name], model.get_submodule(name)]
                dense_ms, basis_ms = side_by_side(pair, [before.inputs[name], after[name]])
                rows[name] = replace(rows[name], dense_ms=dense_ms, basis_ms=basis_ms)
    return replace(report, layers=tuple(rows.values()))


def _stated(row: LayerReport, before: Before, model: nn.Module) -> LayerReport:
    module = model.get_submodule(row.name)
    method = type(module).__name__ if row.replaced else ("pruned" if row.channels_after is not None else "")
    return replace(row, method=method, bytes_before=before.bytes[row.name], bytes_after=stored_bytes(module))


def accuracy_of(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    """What the user's function says of a network in eval mode; None without a function."""
    if evaluate is None:
        return None
    with evaluating(model):
        return float(evaluate(model))
