"""``search``: each layer's method and size, under a budget of time, bytes or MACs, by measurement and sensitivity."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.facts import Before, complete, first_inputs, side_by_side, stored_bytes
from basisconv_kernels.compression.model import Config, compress, network_parameters
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.ranks import Option, within
from basisconv_kernels.compression.report import CompressionReport, LayerReport
from basisconv_kernels.compression.survey import evaluating, run, substitute, survey
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig

BUDGETS = ("latency", "size", "macs")
FRACTIONS = (0.75, 0.5, 0.35, 0.25, 0.15)
DENSE = "dense"


def default_candidates() -> tuple[Config, ...]:
    """``BasisConfig`` and ``TuckerConfig`` at five sizes each."""
    basis = [BasisConfig(fraction=f) for f in FRACTIONS]
    return (*basis, *(TuckerConfig(fraction=f) for f in FRACTIONS))


@dataclass(frozen=True)
class LayerOption:
    """One way to run one layer.

    Attributes:
        layer: its first name in the network.
        way: the configuration in words, ``"dense"`` for the convolution as it is.
        macs, bytes: of the layer that way; ms: measured milliseconds a call, None under another budget than latency.
        loss: what the network loses when this layer alone goes this way: accuracy, or, without ``evaluate``, the share
            ``‖y' − y‖²/‖y‖²`` of its output.
        chosen: whether the result has the layer this way.
    """

    layer: str
    way: str
    macs: int
    bytes: int
    ms: float | None
    loss: float
    chosen: bool = False

    def cost(self, budget: str) -> float:
        """In the unit of a budget."""
        return float({"latency": self.ms or 0.0, "size": self.bytes, "macs": self.macs}[budget])


@dataclass(frozen=True)
class SearchReport:
    """What ``search`` looked at, and the report of what it made.

    Attributes:
        budget: ``"latency"``, ``"size"`` or ``"macs"``; ``limit`` in milliseconds, bytes or MACs of all convolutions.
        spent, dense: what the result takes of it, and what the dense network takes.
        options: of every layer, the dense one first.
        report: as ``compress`` gives it.
    """

    budget: str
    limit: float
    spent: float
    dense: float
    options: tuple[LayerOption, ...]
    report: CompressionReport = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        own = {name: getattr(self, name) for name in ("budget", "limit", "spent", "dense")}
        return own | {"options": [asdict(option) for option in self.options], "report": self.report.to_dict()}

    def to_table(self) -> str:
        """A line an option, the chosen ones marked."""
        lines = [f"{self.budget}: {self.dense:.4g} dense, at most {self.limit:.4g}, {self.spent:.4g} chosen"]
        for o in self.options:
            ms = "" if o.ms is None else f"{o.ms:.3f} ms"
            mark = "→" if o.chosen else " "
            lines.append(f"{mark} {o.layer:<24} {o.way:<34} {o.macs:>12} {o.bytes:>10} B {ms:>10}  loss {o.loss:+.4f}")
        return "\n".join(lines)


def search(
    model: nn.Module,
    *,
    example_inputs: Any,
    latency: float | None = None,
    size: float | None = None,
    macs: float | None = None,
    candidates: Sequence[Config] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    progress: Callable[[str], None] | None = None,
) -> tuple[nn.Module, SearchReport]:
    """Find for each convolution the method and size that cost least accuracy within a budget of the whole network.

    1. Every candidate converts every layer that it can; each layer so made has a cost: milliseconds measured here, on
       this device and thread count, side by side with the dense layer; or bytes in a file, or MACs.
    2. Its loss is measured with this layer alone converted, without fine-tuning. Losses of layers are taken to add up.
    3. From the cheapest option of each layer on, the step that wins back most loss a cost is taken, along the hull of
       the layer's options, while the budget holds. Dense is an option like the others, at no loss: a layer whose
       conversions are no cheaper, as measured, stays dense whatever its MACs say.

    Fine-tune the result, and judge it again.

    Args:
        model (Module): stays as it is.
        example_inputs: as for ``compress``; times are taken at these shapes.
        latency, size, macs (float): exactly one; the share, 0..1, of what all convolutions take now.
        candidates (sequence of configurations, optional): of methods that convert layer by layer and without training;
            default: ``BasisConfig`` and ``TuckerConfig`` at five sizes each.
        evaluate (function, optional): network in eval mode → accuracy on a calibration or validation split; called once
            for each layer and candidate. Default: the change of the network's output on the example inputs.
        only, skip (iterable of str): as for ``compress``.
        progress (function, optional): called with a line of text for each candidate.

    Returns:
        (Module, SearchReport): a new network.

    Raises:
        ValueError: no budget or several, one that the cheapest options exceed, or a candidate that needs training or
            more than one layer at a time.

    Example:
        >>> import torch
        >>> from basisconv_kernels.compression.search import search
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3))
        >>> small, found = search(net, example_inputs=torch.randn(1, 3, 16, 16), macs=0.4)
        >>> found.spent <= found.limit == 0.4 * found.dense
        True
    """
    budget, share = _budget(latency, size, macs)
    wished = list(default_candidates() if candidates is None else candidates)
    _check_candidates(wished)
    loss_of = _Loss(model, example_inputs, evaluate)
    layers = [layer for layer in survey(model, example_inputs) if layer.calls]
    inputs = first_inputs(model, [layer.name for layer in layers], example_inputs)
    dense = {
        layer.name: LayerOption(layer.name, DENSE, layer.dense_macs, stored_bytes(layer.module), None, 0.0)
        for layer in layers
    }
    calls = {layer.name: layer.calls for layer in layers}
    ways: dict[str, list[_Way]] = {layer.name: [] for layer in layers}
    for config in wished:
        if progress is not None:
            progress(f"search: {config}")
        converted, report = compress(model, config, example_inputs=example_inputs, only=only, skip=skip)
        for row in report.layers:
            if not row.replaced or row.name not in ways:
                continue
            made = converted.get_submodule(row.name)
            loss = loss_of.with_layer(model.get_submodule(row.name), made)
            option = LayerOption(row.name, str(config), row.macs_after, stored_bytes(made), None, loss)
            ways[row.name].append(_Way(option, made, row))
    if budget == "latency":
        for name, many in ways.items():
            modules = [copy.deepcopy(model.get_submodule(name)), *(way.module for way in many)]
            times = side_by_side(modules, [inputs[name]] * len(modules))
            dense[name] = replace(dense[name], ms=times[0] * calls[name])
            for way, ms in zip(many, times[1:], strict=True):
                way.option = replace(way.option, ms=ms * calls[name])
    return _choose(model, example_inputs, budget, share, dense, ways, loss_of)


@dataclass
class _Way:
    """A converted layer beside what it costs."""

    option: LayerOption
    module: nn.Module
    row: LayerReport


def _choose(
    model: nn.Module,
    example_inputs: Any,
    budget: str,
    share: float,
    dense: dict[str, LayerOption],
    ways: dict[str, list[_Way]],
    loss_of: _Loss,
) -> tuple[nn.Module, SearchReport]:
    """The options that lose least within the budget, and the network that has them."""
    total = sum(option.cost(budget) for option in dense.values())
    priced = {
        name: [
            Option(dense[name].cost(budget), 0.0, None),
            *(Option(w.option.cost(budget), -w.option.loss, number) for number, w in enumerate(many)),
        ]
        for name, many in ways.items()
    }
    chosen = within(priced, share * total)
    if chosen is None:
        least = sum(min(option.ms for option in many) for many in priced.values())
        raise ValueError(
            f"search: {budget}={share} asks for {share * total:.4g} of {total:.4g}, but the cheapest options of all "
            f"layers take {least:.4g}; ask for more, or give smaller candidates"
        )
    target = copy.deepcopy(model)
    replacements, rows, options = {}, {}, []
    for name, many in ways.items():
        number = chosen[name]
        options.append(replace(dense[name], chosen=number is None))
        options += [replace(way.option, chosen=number == i) for i, way in enumerate(many)]
        if number is not None:
            rows[name] = many[number].row
            replacements[target.get_submodule(name)] = copy.deepcopy(many[number].module)
    count = network_parameters(target)
    before = Before(target, list(ways), keep=False)
    target = substitute(target, replacements)
    kept = [rows.get(name) or _kept(model, name, dense[name], ways[name], budget) for name in ways]
    rule = f"search: {budget}={share}"
    report = CompressionReport(rule, tuple(kept), count, network_parameters(target))
    report = complete(report, before, target, example_inputs, measure=False)
    if loss_of.evaluate is not None:
        report = replace(report, accuracy_before=loss_of.baseline, accuracy_after=loss_of.accuracy(target))
    spent = sum(option.cost(budget) for option in options if option.chosen)
    return target, SearchReport(budget, share * total, spent, total, tuple(options), report)


def _kept(model: nn.Module, name: str, dense: LayerOption, many: list[_Way], budget: str) -> LayerReport:
    """The row of a layer that stays dense, and why."""
    if not many:
        reason = "no candidate converts it"
    elif min(way.option.cost(budget) for way in many) >= dense.cost(budget):
        measured = ", as measured" if budget == "latency" else ""
        reason = f"no candidate costs less{measured}"
    else:
        reason = "the budget leaves it dense"
    module: Any = model.get_submodule(name)
    K, C, (R, S) = module.out_channels, module.in_channels, module.kernel_size
    parameters = sum(p.numel() for p in module.parameters())
    macs = dense.macs
    return LayerReport(
        name, "kept", reason, K, C, R, S, module.groups, math.inf, None, None, None, macs, macs, parameters, parameters
    )


class _Loss:
    """What a network loses against the dense one."""

    def __init__(self, model: nn.Module, inputs: Any, evaluate: Callable[[nn.Module], float] | None) -> None:
        self.model, self.inputs, self.evaluate = model, inputs, evaluate
        self.baseline = 0.0 if evaluate is None else self.accuracy(model)
        self.output = self._output(model) if evaluate is None else torch.zeros(())

    def accuracy(self, network: nn.Module) -> float:
        """As the user's function says."""
        if self.evaluate is None:
            raise ValueError("search: evaluate is missing")
        with evaluating(network):
            return float(self.evaluate(network))

    def with_layer(self, old: nn.Module, new: nn.Module) -> float:
        """The loss with one layer in another's place; the network is as before afterwards."""
        network = substitute(self.model, {old: new})
        try:
            if self.evaluate is not None:
                return max(0.0, self.baseline - self.accuracy(network))
            change = (self._output(network) - self.output).square().sum()
            return float(change / self.output.square().sum().clamp_min(torch.finfo(self.output.dtype).tiny))
        finally:
            substitute(network, {new: old})

    def _output(self, network: nn.Module) -> Tensor:
        with evaluating(network):
            out = run(network, self.inputs)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"search: the network gives a {type(out).__name__}, so the change of its output is not defined; give "
                "evaluate"
            )
        return out.double()


def _budget(latency: float | None, size: float | None, macs: float | None) -> tuple[str, float]:
    given = {k: v for k, v in (("latency", latency), ("size", size), ("macs", macs)) if v is not None}
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise ValueError(f"search: exactly one budget of {', '.join(BUDGETS)} must be given, got {found}")
    ((budget, share),) = given.items()
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"search: {budget} must lie in 0..1, above 0, got {share!r}")
    return budget, float(share)


def _check_candidates(candidates: Sequence[Config]) -> None:
    if not candidates:
        raise ValueError("search: candidates is empty")
    for config in candidates:
        trains = isinstance(config, TernaryConfig) and config.method == "layerwise"
        if isinstance(config, PruneConfig) or trains:
            why = "trains the network" if trains else "changes the layers around the one it prunes"
            raise ValueError(f"search: {config} {why}; run it before the search")
