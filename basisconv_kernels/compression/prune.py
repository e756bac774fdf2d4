"""The method of ``PruneConfig``: filters are scored, chosen by classes of tied channels, and removed from all modules.

Why not a library for the graph: see docs/pruning.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.methods import Method, Task, register_method
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.prune_graph import ChannelGraph, Member, channel_graph, conv_costs, remove
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.survey import ConvLayer, evaluating, survey
from basisconv_kernels.layers import folding
from basisconv_kernels.layers.decompose import break_even


def convert(target: nn.Module, config: PruneConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Score, choose and remove; the network itself, changed in place, and a row for every convolution."""
    layers = survey(target, task.example_inputs)
    with evaluating(target):
        graph = channel_graph(target, _positional(task.example_inputs))
    stays = _pin_excluded(graph, layers, task)
    scores = _scores(target, graph, config, task)
    gone = _chosen(graph, layers, config, scores)
    costs = {id(m.module): conv_costs(graph, gone, m) for m in graph.convolutions()}
    rows = tuple(_report(layer, costs.get(id(layer.module)), stays.get(layer.name), graph) for layer in layers)
    if config.criterion == "duplicate":
        _hand_over(graph, gone, config)
    remove(graph, gone)
    return target, rows


def _positional(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, Mapping):
        raise ValueError("compress: PruneConfig needs example_inputs by position, a Tensor or a tuple, not by name")
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _pin_excluded(graph: ChannelGraph, layers: list[ConvLayer], task: Task) -> dict[str, str]:
    """Let the outputs of the layers stay that must not be pruned; {name: why}."""
    stays = {}
    for layer in layers:
        reason = task.why_not(layer)
        member = graph.members.get(layer.module)
        if reason is None and member is None:
            reason = "not found in the graph that torch.fx traced"
        if reason is not None:
            stays[layer.name] = reason
            if member is not None:
                graph.pin(member.gives, reason)
                if layer.tied_to is not None or layer.name in task.read:  # something else reads the same weight
                    graph.pin(member.reads, reason)
    return stays


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(model: nn.Module, graph: ChannelGraph, config: PruneConfig, task: Task) -> dict[int, float]:
    """{class of channels that may go: the sum of the scores of its filters}; small ones go first."""
    members = graph.convolutions()
    if config.criterion == "taylor":
        of = _taylor(model, members, config, task)
    elif config.criterion == "l1":
        of = {id(m): _over_mean(_filters(m.module).abs().sum(1)) for m in members}
    else:
        of = {id(m): _uniqueness(m.module, graph, config) for m in members}
    total: dict[int, float] = {}
    for member in members:
        for label, score in zip(member.gives, of[id(member)].tolist(), strict=True):
            root = graph.root(label)
            if root not in graph.pinned:
                total[root] = total.get(root, 0.0) + score
    return total


def _filters(conv: Any, bias: bool = False) -> Tensor:
    """[K, D], or [K, D + 1] with the bias, in float64 on the CPU."""
    rows = conv.weight.detach().to("cpu", torch.float64).flatten(1)
    if bias and conv.bias is not None:
        rows = torch.cat([rows, conv.bias.detach().to("cpu", torch.float64)[:, None]], 1)
    return rows


def _over_mean(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if float(mean) > 0 else values


def _duplicates(conv: nn.Module, graph: ChannelGraph, config: PruneConfig) -> dict[int, tuple[int, float]]:
    """{filter: (the earlier one that stays in its place, c)}: its row is c times the other's, as nearly as can be.

    Rows are filters and bias, the BatchNorm that alone reads the convolution folded in.
    """
    rows = _filters(conv, bias=True)
    norm = graph.norms.get(conv)
    if norm is not None and folding.has_statistics(norm):
        scale, offset = (t.detach().to("cpu", torch.float64) for t in folding.scale_and_offset(norm))
        with_bias = rows if getattr(conv, "bias", None) is not None else torch.nn.functional.pad(rows, (0, 1))
        rows = with_bias * scale[:, None]
        rows[:, -1] += offset
    unit = torch.nn.functional.normalize(rows, dim=1)
    # Products of rounded units may miss 1 by a few roundings.
    alike = unit @ unit.mT >= min(1.0 if config.threshold is None else config.threshold, 1 - 1e-12)
    found: dict[int, tuple[int, float]] = {}
    for k in range(1, len(rows)):
        first = next((i for i in range(k) if i not in found and alike[k, i]), None)
        if first is not None:
            found[k] = first, float(rows[k] @ rows[first] / rows[first].square().sum())
    return found


def _uniqueness(conv: nn.Module, graph: ChannelGraph, config: PruneConfig) -> Tensor:
    """[K]: 0 for a filter that repeats an earlier one that stays, else 1."""
    scores = torch.ones(len(_filters(conv)), dtype=torch.float64)
    scores[list(_duplicates(conv, graph, config))] = 0
    return scores


@torch.no_grad()
def _hand_over(graph: ChannelGraph, gone: set[int], config: PruneConfig) -> None:
    """``W_next[:, r] += c·W_next[:, p]`` where filter p goes and r stays in its place, and c survives up to W_next."""
    # All of them before the first is handed over: that changes the filters behind.
    found = [(member, _duplicates(member.module, graph, config)) for member in graph.convolutions()]
    for member, duplicates in found:
        for p, (r, factor) in duplicates.items():
            going, staying = member.gives[p], member.gives[r]
            if graph.root(going) not in gone or graph.root(staying) in gone or {going, staying} & graph.bent:
                continue
            for reader in graph.members.values():
                module: Any = reader.module
                if isinstance(module, (nn.Conv2d, nn.Linear)) and going in reader.reads:
                    from_, to = ([i for i, label in enumerate(reader.reads) if label == wanted]
                                 for wanted in (going, staying))  # fmt: skip
                    module.weight[:, to] += factor * module.weight[:, from_]


def _taylor(model: nn.Module, members: list[Member], config: PruneConfig, task: Task) -> dict[int, Tensor]:
    """Mean over the samples of |mean over the pixels of dL/dz·z|, each layer's scores at length 1."""
    found = {id(m): torch.zeros(len(m.gives), dtype=torch.float64) for m in members}
    outputs: dict[int, list[Tensor]] = {}

    def keep_for(member: Member) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.setdefault(id(member), []).append(output)

        return hook

    flags = [(module, module.training) for module in model.modules()]
    asks = [(p, p.requires_grad) for p in model.parameters()]
    handles = [m.module.register_forward_hook(keep_for(m)) for m in members]
    model.eval()
    try:
        for parameter, _ in asks:
            parameter.requires_grad_(True)  # a frozen network has no graph otherwise
        for batch in task.batches:
            outputs.clear()
            with torch.enable_grad():
                loss = config.loss(model, batch) if config.loss is not None else None
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise TypeError(f"compress: the loss of PruneConfig must give one number, got {loss!r}")
                flat = [(key, z) for key, many in outputs.items() for z in many]
                slopes = torch.autograd.grad(loss, [z for _, z in flat], allow_unused=True)
            for (key, z), slope in zip(flat, slopes, strict=True):
                if slope is not None:
                    product = (slope * z).detach().to("cpu", torch.float64)
                    found[key] += product.flatten(2).mean(2).abs().sum(0)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, asked in asks:
            parameter.requires_grad_(asked)
        for module, flag in flags:
            module.training = flag
    return {key: scores / (float(scores.norm()) or 1.0) for key, scores in found.items()}


# --- choice -----------------------------------------------------------------------------------------------------------


def _chosen(graph: ChannelGraph, layers: list[ConvLayer], config: PruneConfig, scores: dict[int, float]) -> set[int]:
    """The classes that go."""
    order = sorted(scores, key=lambda root: (scores[root], root))
    if config.criterion == "duplicate":
        return _allowed(graph, [root for root in order if scores[root] == 0], scores, config)
    if config.rule == "fraction":
        sets: dict[frozenset[str], list[int]] = {}
        producers: dict[int, set[str]] = {}
        for member in graph.convolutions():
            for label in member.gives:
                producers.setdefault(graph.root(label), set()).add(member.name)
        for root in order:
            sets.setdefault(frozenset(producers[root]), []).append(root)
        going = []
        for roots in sets.values():
            staying = len(roots) - math.floor(round((config.fraction or 0.0) * len(roots), 9))
            staying = math.ceil(staying / config.multiple_of) * config.multiple_of
            going += roots[: max(0, len(roots) - staying)]
        return _allowed(graph, going, scores, config)
    pixels = {id(layer.module): layer.pixels for layer in layers}
    known = {id(m.module): m for m in graph.convolutions()}

    def cost(gone: set[int]) -> int:
        total = 0
        for layer in layers:
            member = known.get(id(layer.module))
            if member is None:
                total += layer.dense_macs if config.rule == "macs" else layer.dense_parameters
                continue
            K, _, weights = conv_costs(graph, gone, member)
            bias = K if layer.module.bias is not None else 0
            total += pixels[id(layer.module)] * weights if config.rule == "macs" else weights + bias
        return total

    budget = getattr(config, config.rule)
    absolute = budget * cost(set()) if isinstance(budget, float) and budget <= 1 else budget
    least, most = 0, len(order)
    smallest = cost(_allowed(graph, order, scores, config))
    if smallest > absolute:
        raise ValueError(
            f"compress: a budget of {absolute:.0f} {config.rule} for the convolutions is less than the {smallest} that "
            "remain when all channels go that may; raise the budget"
        )
    while least < most:  # the fewest of the least classes whose removal meets the budget
        middle = (least + most) // 2
        if cost(_allowed(graph, order[:middle], scores, config)) <= absolute:
            most = middle
        else:
            least = middle + 1
    return _allowed(graph, order[:most], scores, config)


def _allowed(graph: ChannelGraph, going: list[int], scores: dict[int, float], config: PruneConfig) -> set[int]:
    """The classes that may go together: layers keep enough channels, and groups lose equally many.

    Those with the highest scores stay where some must; each round only brings back, so it ends.
    """
    gone = set(going)
    while True:
        back: set[int] = set()
        for member in graph.members.values():
            for labels in (member.reads, member.gives):
                roots = dict.fromkeys(graph.root(label) for label in labels)
                leaving = [root for root in roots if root in gone]
                short = config.min_channels - (len(roots) - len(leaving))
                if short > 0 and leaving:
                    back |= set(sorted(leaving, key=lambda root: -scores[root])[:short])
        for groups in graph.balanced:
            leaving_of = [[graph.root(label) for label in labels if graph.root(label) in gone] for labels in groups]
            fewest = min(map(len, leaving_of))
            for leaving in leaving_of:
                back |= set(sorted(leaving, key=lambda root: -scores[root])[: len(leaving) - fewest])
        if not back & gone:
            return gone
        gone -= back


def _report(
    layer: ConvLayer, costs: tuple[int, int, int] | None, reason: str | None, graph: ChannelGraph
) -> LayerReport:
    K, C, R, S, G = layer.shape
    left, reads, weights = (K, C, layer.weights) if costs is None else costs
    pruned = (left, reads) != (K, C)
    member = graph.members.get(layer.module)
    if reason is None and left == K and member is not None:
        reason = next((why for label in member.gives if (why := graph.why_pinned(label))), None)
        if reason is None and not pruned:
            reason = "equally many of every group must go" if G > 1 else "none of its filters was among the least"
    row = LayerReport(
        name=layer.name, verdict="pruned" if pruned else "kept", reason=reason or "", K=K, C=C, R=R, S=S, groups=G,
        break_even=break_even(K, layer.taps, G), basis_channels=None, energy_kept=None, relative_error=None,
        macs_before=layer.dense_macs, macs_after=layer.dense_macs,
        parameters_before=layer.dense_parameters, parameters_after=layer.dense_parameters,
    )  # fmt: skip
    if not pruned:
        return row
    bias = left if layer.module.bias is not None else 0
    return replace(
        row, channels_after=(left, reads), macs_after=layer.pixels * weights, parameters_after=weights + bias
    )


register_method(Method(PruneConfig, convert))
