"""Every method on a whole network: a layer is converted or refused by name, and the outputs are those of an oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels import testing
from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.chains import pack_activations
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig, freeze_bits
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.ternary import TernaryLayer
from bench.audit import checks


def energy(model: nn.Module, batch: Any) -> Tensor:
    """A loss for the Taylor criterion."""
    return model(batch).square().mean()


CONFIGS: dict[str, Any] = {
    "tucker": TuckerConfig(fraction=1.0, keep_dense="never", rounds=0, merge=False),
    "prune, L1": PruneConfig(fraction=0.25),
    "prune, Taylor": PruneConfig(criterion="taylor", macs=0.7, loss=energy),
    "ternary, TWN": TernaryConfig(method="twn"),
    "ternary, TTQ": TernaryConfig(method="ttq"),
    "ternary, layer-wise": None,  # it trains, so its configuration has the images
    "stacked": StackedBinaryConfig(splits=2, bank=0.25, rounds=1),
    "stacked, signs": StackedBinaryConfig(splits=2, bank=0.25, rounds=1, binarize_input=True),
    "binary": BinaryConfig(),
}


def check(method: str, dense: nn.Module, fresh: nn.Module, image: Tensor, path: Path) -> checks.Row:
    """One method on one network. Raises AssertionError where something is wrong."""
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = CONFIGS[method] or layerwise(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks that had to be lowered, say
        small, report = compress(dense, config, example_inputs=image)
    if not all(torch.equal(value, before[name]) for name, value in dense.state_dict().items()):
        raise AssertionError("the network that was given is changed")
    row = checks.verdicts(dense, small, report)
    with torch.no_grad():
        row["off"] = OFF[method.partition(",")[0]](dense, small.eval(), image)
        if not small(image).isfinite().all():
            raise AssertionError("the outputs are not finite")
        checks.same_again(small, fresh, image, path, pruned=method.startswith("prune"))
    return row


def layerwise(image: Tensor) -> TernaryConfig:
    """Layer-wise training of one step a layer, on labels that say nothing."""
    labels = torch.zeros(len(image), dtype=torch.int64)
    return TernaryConfig(loader=[(image, labels)], evaluate=lambda model: 1.0, sparsity=0.5, lr=1e-5, prune_lr=1e-5)


def _dense(dense: nn.Module, small: nn.Module, image: Tensor) -> float:
    exact = copy.deepcopy(dense).double()(image.double())
    testing.check_same_network(small(image), exact)
    testing.check_same_network(to_plain(small)(image), exact)
    return checks.off(small(image), exact)


def _zeroed(dense: nn.Module, small: nn.Module, image: Tensor) -> float:
    exact = checks.without_what_went(dense, small).double()(image.double())
    got = copy.deepcopy(small).double()(image.double())
    testing.check_same_network(got, exact)
    return checks.off(got, exact)


def _ternary(dense: nn.Module, small: nn.Module, image: Tensor) -> float:
    """Dense weights that are ternary by the rules of the papers, with the scales of the layers."""
    if any(layer.is_packed for layer in small.modules() if isinstance(layer, TernaryLayer)):
        return _same(small, to_plain(small), image)  # it was trained: the dense weights are others by now
    expected = copy.deepcopy(dense)
    for name, layer in small.named_modules():
        if isinstance(layer, TernaryLayer):
            expected.get_submodule(name).weight.copy_(_ternary_weight(layer, dense.get_submodule(name).weight))
            layer.pack()
    return _same(small, expected, image)


def _ternary_weight(layer: Any, weight: Tensor) -> Tensor:
    across = tuple(range(1, weight.dim()))
    if layer.rule == "twn":
        delta = 0.75 * weight.abs().mean(across, keepdim=True)
        large = weight.abs() > delta
        scale = (weight.abs() * large).sum(across, keepdim=True) / large.sum(across, keepdim=True)
        return torch.where(large, scale * weight.sign(), torch.zeros_like(weight))
    delta = 0.05 * weight.abs().max()
    return layer.scale * (weight > delta) - layer.negative_scale * (weight < -delta)


def _stacked(dense: nn.Module, small: nn.Module, image: Tensor) -> float:
    """Filters put together from bank and index; with signs of the input layer by layer, as there is no such network."""
    freeze_bits(small)
    expected, of_signs = copy.deepcopy(dense), {}
    for name, layer in small.named_modules():
        if isinstance(layer, StackedBinaryConv2d):
            bank, index = layer.filters()
            weight = torch.cat([bank[index[:, i]] for i in range(layer.splits)], 1)
            weight = weight if layer.scale is None else weight * layer.scale[:, None, None, None]
            expected.get_submodule(name).weight.copy_(weight)
            if layer.binarize_input:
                of_signs[name] = weight
    return _layers(dense, small, of_signs, image) if of_signs else _same(small, expected, image)


def _binary(dense: nn.Module, small: nn.Module, image: Tensor) -> float:
    """Every layer against a convolution of signs; then bits from layer to layer, which change nothing."""
    weights = {}
    for name, layer in small.named_modules():
        if isinstance(layer, BinaryConv2d):
            real = dense.get_submodule(name).weight
            size = real.abs().double().mean((1, 2, 3), keepdim=True)
            weights[name] = torch.where(real >= 0, size, -size)
    worst = _layers(dense, small, weights, image)
    packed, _ = pack_activations(small, image)
    if not torch.equal(packed(image), small(image)):
        raise AssertionError("pack_activations changed the outputs")
    return worst


def _layers(dense: nn.Module, small: nn.Module, weights: dict[str, Tensor], image: Tensor) -> float:
    """Every layer of ``weights`` beside a convolution of signs; the largest difference."""
    shares = [0.0]
    hooks = [
        small.get_submodule(name).register_forward_hook(
            checks.contract_of_signs(dense.get_submodule(name), weight, shares)
        )
        for name, weight in weights.items()
    ]
    small(image)
    for hook in hooks:
        hook.remove()
    return max(shares)


def _same(small: nn.Module, expected: nn.Module, image: Tensor) -> float:
    testing.check_same_network(small(image), expected(image))
    return checks.off(small(image), expected(image))


OFF: dict[str, Callable[[nn.Module, nn.Module, Tensor], float]] = {
    "tucker": _dense,
    "prune": _zeroed,
    "ternary": _ternary,
    "stacked": _stacked,
    "binary": _binary,
}
