"""``compress``: the convolutions of a network become ``BasisConv2d`` layers; ``to_plain``: and ordinary ones again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from basisconv_kernels.compression import plan
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.fold import separate_residuals
from basisconv_kernels.compression.names import resolve, resolve_exact
from basisconv_kernels.compression.report import CompressionReport, LayerReport
from basisconv_kernels.compression.survey import ConvLayer, evaluating, run, substitute, survey, watching
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.calibration import ChannelMoments
from basisconv_kernels.layers.conversion import foreign_hooks, refusal
from basisconv_kernels.layers.decompose import break_even

FilterFunction = Callable[[str, nn.Module], bool]


def compress(
    model: nn.Module,
    config: BasisConfig,
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    filter_fn: FilterFunction | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    inplace: bool = False,
) -> tuple[nn.Module, CompressionReport]:
    """Replace convolutions of a network by basis convolutions, truncated by the rule of ``config``.

    Each replaced ``W ≈ A·F``: Q shared filters F and coefficients A. Fine-tune the result: truncation costs accuracy.

    A convolution is replaced if it is a Conv2d itself (parametrised weights are applied first), was reached by the
    example inputs, is allowed by ``only``, ``skip`` and ``filter_fn``, carries no hooks, shares its weight with no
    other module, and, with ``keep_dense="auto"``, gains by it. A module that is used several times is replaced once and
    stays shared. Linear layers and transposed convolutions stay. Everything is checked before anything is changed.

    Args:
        model (Module): in any mode; the training flags of its modules are kept.
        config (BasisConfig): the rule for Q and when to keep a layer dense.
        example_inputs: a Tensor, a tuple or list of positional, or a mapping of keyword arguments of the network; run
            once, in eval mode without gradients, to see the size of every layer's input.
        calibration (iterable, optional): more of the same kind, for ``data_aware`` and ``basis_norm``; default: the
            example inputs alone.
        filter_fn (function, optional): (name, module) → whether the layer may be replaced.
        only (iterable of str): names of layers, or of modules that contain them, to take alone; empty takes all.
        skip (iterable of str): names of the same kind to leave out.
        inplace (bool): change ``model`` itself instead of a deep copy. Where ``model`` is itself a convolution, the
            result is a new module either way.

    Returns:
        (Module, CompressionReport): the network, and for every convolution what was done and why.

    Raises:
        ValueError: an unknown layer name, NaN or infinite weights, example inputs that the network does not take, or a
            rule that cannot be met; nothing was changed.
        TypeError: arguments of a wrong kind.

    Source: Tayyab, Mahalanobis 2019, arXiv 1906.04509; Tayyab, Khan, Mahalanobis 2021, arXiv 2105.10436.

    Example:
        >>> import torch
        >>> from basisconv_kernels.compression.config import BasisConfig
        >>> from basisconv_kernels.compression.model import compress
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3))
        >>> small, report = compress(net, BasisConfig(fraction=0.25), example_inputs=torch.randn(1, 3, 16, 16))
        >>> [layer.basis_channels for layer in report.layers]
        [8, 16]
        >>> small(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 64, 14, 14])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, BasisConfig):
        raise TypeError(f"compress: config must be a BasisConfig, got {type(config).__name__}")
    only_names, skip_names = resolve(model, "only", only), resolve(model, "skip", skip)
    named_by_rule = resolve_exact(model, config.rule, config.named_layers() or ())
    batches = [example_inputs] if calibration is None else list(calibration)

    target = model if inplace else copy.deepcopy(model)
    layers = survey(target, example_inputs)
    reasons: dict[str, str] = {}
    for layer in layers:
        reason = _why_not(layer, only_names, skip_names, filter_fn)
        if reason is None and config.named_layers() is not None and layer.name not in named_by_rule:
            reason = f"not named in {config.rule}"
        if reason is not None:
            reasons[layer.name] = reason
    open_layers = [layer for layer in layers if layer.name not in reasons]
    before = network_parameters(target)
    decisions = plan.decide(target, layers, open_layers, config, named_by_rule, batches)

    replaced = {layer.module: d.basis for layer in open_layers if (d := decisions[layer.name]).basis is not None}
    for layer in open_layers:
        reasons[layer.name] = decisions[layer.name].reason
    rows = tuple(_report(layer, decisions.get(layer.name), reasons[layer.name]) for layer in layers)
    target = substitute(target, replaced)
    if config.basis_norm:
        _insert_norms(target, list(replaced.values()), batches)
    return target, CompressionReport(str(config), rows, before, network_parameters(target))


def to_plain(model: nn.Module, *, collapse: bool = False, inplace: bool = False) -> nn.Module:
    """Replace every ``BasisConv2d`` of a network by ordinary modules, for other tools and formats.

    Args:
        model (Module): any network, also one that ``fold_batchnorm`` gave.
        collapse (bool): one dense convolution a layer instead of two.
        inplace (bool): change ``model`` itself instead of a deep copy.

    Returns:
        Module: the network, without any class of this package; a layer that was shared stays shared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_plain: model must be a torch.nn.Module, got {type(model).__name__}")
    target = model if inplace else copy.deepcopy(model)
    separate_residuals(target)
    layers = [m for m in target.modules() if isinstance(m, BasisConv2d)]
    return substitute(target, {layer: layer.to_plain(collapse=collapse) for layer in layers})


def network_parameters(model: nn.Module) -> int:
    """Parameters of a network, each counted once, and its frozen bases."""
    frozen = [m.basis_weight for m in model.modules() if isinstance(m, BasisConv2d) and not m.trains_basis]
    return sum(p.numel() for p in model.parameters()) + sum(basis.numel() for basis in frozen)


def _why_not(
    layer: ConvLayer, only: frozenset[str] | None, skip: frozenset[str] | None, filter_fn: FilterFunction | None
) -> str | None:
    """Why a layer is out of the question, whatever its filters hold; None where it is not."""
    against = refusal(layer.module)
    if against is not None:
        return against
    names = set(layer.names)
    if only is not None and not names & only:
        return "not in only"
    if skip is not None and names & skip:
        return "in skip"
    if filter_fn is not None and not filter_fn(layer.name, layer.module):
        return "refused by filter_fn"
    if layer.tied_to is not None:
        return f"shares its weight parameter with {layer.tied_to}"
    if foreign_hooks(layer.module):
        return "carries hooks, which a conversion would lose"
    if layer.calls == 0:
        return "not reached by example_inputs"
    return None


def _insert_norms(model: nn.Module, layers: list[BasisConv2d], batches: list[Any]) -> None:
    """A calibrated BatchNorm between the stages of each layer, from the maps of the compressed network."""
    moments = {layer: ChannelMoments(layer.basis_channels) for layer in layers}

    def watcher_for(layer: BasisConv2d) -> Callable[[Any, Any], None]:
        return lambda input, output: moments[layer].add(layer.basis_maps(input))

    with evaluating(model), watching({layer: watcher_for(layer) for layer in layers}):
        for batch in batches:
            run(model, batch)
    for layer, found in moments.items():
        layer.set_basis_norm(found)


def _report(layer: ConvLayer, decision: plan.Decision | None, reason: str) -> LayerReport:
    K, C, R, S, G = layer.shape
    per_group = None if decision is None or decision.basis is None else decision.per_group
    replaced = decision is not None and per_group is not None
    return LayerReport(
        name=layer.name,
        verdict="replaced" if replaced else "kept",
        reason=reason,
        K=K,
        C=C,
        R=R,
        S=S,
        groups=G,
        break_even=break_even(K, layer.taps, G),
        basis_channels=None if per_group is None else per_group * G,
        energy_kept=decision.energy_kept if decision is not None and replaced else None,
        relative_error=decision.relative_error if decision is not None and replaced else None,
        macs_before=layer.dense_macs,
        macs_after=layer.dense_macs if per_group is None else layer.basis_macs(per_group),
        parameters_before=layer.dense_parameters,
        parameters_after=layer.dense_parameters if per_group is None else layer.basis_parameters(per_group),
        dense_ms=None if decision is None else decision.dense_ms,
        basis_ms=None if decision is None else decision.basis_ms,
    )
