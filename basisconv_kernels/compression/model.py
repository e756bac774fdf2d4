"""``compress``: the convolutions of a network are replaced, method by method; ``to_plain``: and ordinary ones again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from basisconv_kernels.compression import basis_method, prune, ternary, tucker  # noqa: F401  (they register)
from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.facts import Before, accuracy_of, complete, first_inputs
from basisconv_kernels.compression.fold import separate_residuals
from basisconv_kernels.compression.methods import FilterFunction, Task, method_of, own_layers
from basisconv_kernels.compression.names import resolve
from basisconv_kernels.compression.outside_reads import FAILURES, outside_reads
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.report import CompressionReport
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig
from basisconv_kernels.compression.survey import convolutions, evaluating, run, substitute
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig

# One step, or several by name pattern: {"layer1.*": BasisConfig(...), "*": None}. None leaves the layers as they are.
Config = BasisConfig | TuckerConfig | PruneConfig | BinaryConfig | StackedBinaryConfig | TernaryConfig
Step = Config | Mapping[str, Config | None]


def compress(
    model: nn.Module,
    config: Step | Sequence[Step],
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    filter_fn: FilterFunction | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    inplace: bool = False,
    measure: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Replace convolutions of a network by cheaper ones, as ``config`` says.

    ``BasisConfig``: each replaced ``W ≈ A·F``, Q shared filters F and coefficients A. ``TuckerConfig``: each
    ``W ≈ U_out·core·U_in``. ``PruneConfig``: filters are removed. ``StackedBinaryConfig``: each
    ``W[k] ≈ scale[k]·concat_i B[index[k, i]]``, a bank B of ±1 filters. ``BinaryConfig``: each
    ``W[k] ≈ scale[k]·sign(W[k])``, on the signs of the input. ``TernaryConfig``: weights become −σ, 0 and +σ, those of
    Linear layers too. Fine-tune the result: it costs accuracy.

    A convolution is replaced if it is a Conv2d itself (parametrised weights are applied first), was reached by the
    example inputs, is allowed by ``only``, ``skip`` and ``filter_fn``, carries no hooks, shares its weight with no
    other module, is called alone and not read (a parent that takes ``conv.weight`` keeps it dense), and, with
    ``keep_dense="auto"``, gains by it. A module that is used several times is replaced once and stays shared. Linear
    layers and transposed convolutions stay. Everything is checked before anything is changed; in a list, each step by
    itself.

    Args:
        model (Module): in any mode; the training flags of its modules are kept.
        config (BasisConfig, TuckerConfig, PruneConfig, BinaryConfig, StackedBinaryConfig or TernaryConfig, or a list or
            mapping of such): what to do, to
            which layers. A list is a pipeline, one step after the other on what the steps before left. A mapping
            {pattern: configuration} chooses by layer: patterns are those of ``fnmatch`` on layer names
            (``"layer1.*"``), the first that matches counts, None leaves its layers as they are, and so are layers that
            none matches.
        example_inputs: a Tensor, a tuple or list of positional, or a mapping of keyword arguments of the network; run
            in eval mode without gradients, to see the size of every layer's input, which layers are read from outside,
            and that the result runs.
        calibration (iterable, optional): more of the same kind, for ``data_aware`` and ``basis_norm``; default: the
            example inputs alone.
        filter_fn (function, optional): (name, module) → whether the layer may be replaced.
        only (iterable of str): names of layers, or of modules that contain them, to take alone; empty takes all.
        skip (iterable of str): names of the same kind to leave out.
        inplace (bool): change ``model`` itself instead of a deep copy. Where ``model`` is itself a convolution, the
            result is a new module either way.
        measure (bool): time every layer that was changed, before and after, at the shapes of the example inputs.
        evaluate (function, optional): network in eval mode → accuracy; called before and after, for the report.

    Returns:
        (Module, CompressionReport): the network, and for every convolution what was done and why; of several steps the
        whole, with the reports of the steps in ``steps``.

    Raises:
        ValueError: an unknown layer name, NaN or infinite weights, example inputs that the network does not take, or a
            rule that cannot be met; nothing was changed.
        TypeError: arguments of a wrong kind.
        RuntimeError: the result does not run on the example inputs.

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
    only_names, skip_names = resolve(model, "only", only), resolve(model, "skip", skip)
    steps = [step for part in _listed(config) for step in _steps(model, part)]
    for each, _ in steps:
        method = method_of(each)
        if method.check is not None:
            method.check(model, each)
    batches = [example_inputs] if calibration is None else list(calibration)
    target = model if inplace else copy.deepcopy(model)
    if any(is_lazy(p) for p in target.parameters()):
        with evaluating(target):
            run(target, example_inputs)  # which gives them their sizes
    read = outside_reads(target, example_inputs)
    task = Task(example_inputs, batches, only_names, skip_names, filter_fn, read=read)
    convs = [layer.name for layer in convolutions(target)]
    before = Before(target, convs, measure)
    if measure:
        before.inputs = first_inputs(target, convs, example_inputs)
    accuracy = accuracy_of(target, evaluate)
    reports = []
    for each, named in steps:
        count = network_parameters(target)
        target, rows = method_of(each).convert(target, each, task if named is None else task.narrowed(named))
        reports.append(CompressionReport(str(each), rows, count, network_parameters(target)))
    _verify(target, example_inputs)
    report = reports[0] if len(reports) == 1 else CompressionReport.joined(reports)
    report = complete(report, before, target, example_inputs, measure)
    return target, replace(report, accuracy_before=accuracy, accuracy_after=accuracy_of(target, evaluate))


def _verify(model: nn.Module, example_inputs: Any) -> None:
    """Run the compressed network once."""
    try:
        with evaluating(model):
            run(model, example_inputs)
    except FAILURES as error:
        raise RuntimeError(
            f"compress: the compressed network does not run on example_inputs: {error}; leave out with skip= the layer "
            "where it fails"
        ) from error


def _listed(config: Any) -> list[Any]:
    """The steps of a pipeline; one step alone is one."""
    if not isinstance(config, Sequence) or isinstance(config, str):
        return [config]
    if not config:
        raise ValueError("compress: the list of steps is empty; give at least one configuration")
    return list(config)


def _steps(model: nn.Module, part: Any) -> list[tuple[Any, frozenset[str] | None]]:
    """(configuration, names of the layers it is for) of one step; None means all layers.

    A layer belongs to the first pattern that one of its names matches. Equal configurations are one, so that a budget
    is of all their layers together.
    """
    if not isinstance(part, Mapping):
        method_of(part)
        return [(part, None)]
    wanted = dict.fromkeys(part, False)
    found: list[tuple[Any, set[str]]] = []
    for layer in convolutions(model):
        pattern = next((p for p in part if any(fnmatchcase(name, p) for name in layer.names)), None)
        if pattern is None:
            continue
        wanted[pattern] = True
        if part[pattern] is None:
            continue
        names = next((names for config, names in found if config == part[pattern]), None)
        if names is None:
            method_of(part[pattern])
            found.append((part[pattern], names := set()))
        names.update(layer.names)
    for pattern, matched in wanted.items():
        if not matched:
            raise ValueError(
                f"compress: the pattern {pattern!r} is the first to match no convolution of this network; patterns are "
                "those of fnmatch, as in 'layer1.*', and an earlier one may have taken its layers"
            )
    if not found:
        raise ValueError("compress: every pattern stands for None, so nothing is left to do")
    return [(config, frozenset(names)) for config, names in found]


def to_plain(model: nn.Module, *, collapse: bool = False, inplace: bool = False) -> nn.Module:
    """Replace every layer of this package in a network by ordinary modules, for other tools and formats.

    Args:
        model (Module): any network, also one that ``fold_batchnorm`` gave.
        collapse (bool): one dense convolution a layer instead of its stages.
        inplace (bool): change ``model`` itself instead of a deep copy.

    Returns:
        Module: the network, without any class of this package; a layer that was shared stays shared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_plain: model must be a torch.nn.Module, got {type(model).__name__}")
    target = model if inplace else copy.deepcopy(model)
    separate_residuals(target)
    layers: list[Any] = [m for m in target.modules() if isinstance(m, own_layers())]
    return substitute(target, {layer: layer.to_plain(collapse=collapse) for layer in layers})


def network_parameters(model: nn.Module) -> int:
    """Parameters of a network, each counted once, and the frozen weights of this package's layers."""
    ours = [m for m in model.modules() if isinstance(m, own_layers())]
    frozen = [buffer for layer in ours for buffer in layer.buffers(recurse=False)]
    return sum(p.numel() for p in model.parameters()) + sum(buffer.numel() for buffer in frozen)
