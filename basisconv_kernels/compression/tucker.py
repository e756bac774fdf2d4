"""The method of ``TuckerConfig``: convolutions become ``TuckerConv2d``, or ``BasisConv2d`` where that is no dearer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from basisconv_kernels.compression import ranks
from basisconv_kernels.compression.methods import Method, Task, register_method
from basisconv_kernels.compression.names import resolve_exact
from basisconv_kernels.compression.ranks import Option
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.survey import ConvLayer, substitute, survey
from basisconv_kernels.compression.timing import measure_ms, random_like
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.conversion import dense_parameters
from basisconv_kernels.layers.decompose import FilterSpectrum, break_even, decompose
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
from basisconv_kernels.layers.tucker_decompose import TuckerSpectrum, tucker_spectrum

RANKS_TRIED = 24  # of each mode, by the rules that compare many pairs of ranks
LATENCY_STEPS = 8  # forms of a layer that the latency rule times
VECTOR = 8  # and the multiple that it rounds ranks up to
BUDGETS = {"macs": "dense_macs", "parameters": "dense_parameters"}


class Form(NamedTuple):
    """One way to replace a layer: both ranks, or Q = rank_out alone for a basis (rank_in is None then)."""

    rank_in: int | None
    rank_out: int


@dataclass
class Facts:
    """What the rules need to know of a layer.

    Attributes:
        layer: the convolution.
        basis: its filters by the output mode, per group.
        tucker: by both modes; None where only a basis is possible (groups, 1×1).
        pixels_in: Σ over its calls of H·W of the padded input, an image: where the first 1×1 runs.
    """

    layer: ConvLayer
    basis: FilterSpectrum
    tucker: TuckerSpectrum | None
    pixels_in: int

    def cost(self, form: Form, what: str) -> int:
        """Multiply-accumulates an image, or parameters with the bias."""
        layer = self.layer
        K, C, R, S, G = layer.shape
        if form.rank_in is None:
            per_group = form.rank_out // G
            return layer.basis_macs(per_group) if what == "macs" else layer.basis_parameters(per_group)
        behind = form.rank_out * (form.rank_in * R * S + K)
        if what == "macs":
            return self.pixels_in * C * form.rank_in + layer.pixels * behind
        return C * form.rank_in + behind + layer.bias_parameters

    def pays(self, form: Form) -> bool:
        """Whether the form costs fewer MACs and fewer parameters than the dense convolution."""
        fewer_macs = self.cost(form, "macs") < self.layer.dense_macs
        return fewer_macs and self.cost(form, "parameters") < self.layer.dense_parameters

    def kept(self, form: Form) -> float:
        """Share of the filters' energy that the truncation keeps, before HOOI."""
        if form.rank_in is None:
            return self.basis.kept_energy(form.rank_out // self.basis.groups)
        return 1.0 if self.tucker is None else self.tucker.kept_energy(form.rank_in, form.rank_out)

    def settle(self, rank_in: int, rank_out: int, config: TuckerConfig) -> Form:
        """The form for two wished ranks: in multiples, within the caps, and a basis where that costs no more MACs."""
        G, step = self.basis.groups, config.multiple_of
        rank_in, rank_out = (max(1, math.ceil(rank / step) * step) for rank in (rank_in, rank_out))
        basis = Form(None, min(math.ceil(rank_out / G), self.basis.cap) * G)
        if self.tucker is None:
            return basis
        form = Form(*self.tucker.within_caps(rank_in, rank_out))
        merges = config.merge and self.cost(basis, "macs") <= self.cost(form, "macs")
        return basis if merges and basis.rank_out == form.rank_out else form

    def forms(self, config: TuckerConfig, tried: int = RANKS_TRIED) -> list[Form]:
        """Forms over the whole range of ranks, for the rules that compare them."""
        G = self.basis.groups
        found: dict[Form, None] = {}
        if self.tucker is None or config.merge:
            for per_group in _spaced(self.basis.cap, tried, config.multiple_of):
                found[Form(None, per_group * G)] = None
        if self.tucker is not None:
            most_in, most_out = self.tucker.caps
            for rank_in in _spaced(most_in, tried, config.multiple_of):
                for rank_out in _spaced(most_out, tried, config.multiple_of):
                    found[self.settle(rank_in, rank_out, config)] = None
        return list(found)

    def build(self, form: Form, rounds: int) -> nn.Module:
        """The replacement, decomposed."""
        conv = self.layer.conv
        if form.rank_in is None or self.tucker is None:
            trained = any(p.requires_grad for p in conv.parameters())
            return BasisConv2d.from_conv(conv, basis_channels=form.rank_out, spectrum=self.basis, train_basis=trained)
        pair = (form.rank_in, form.rank_out)
        return TuckerConv2d.from_conv(conv, ranks=pair, spectrum=self.tucker, rounds=rounds)


def _spaced(cap: int, count: int, step: int) -> list[int]:
    """At most ``count`` numbers up to ``cap``, in multiples of ``step`` but for the cap itself."""
    return sorted({min(cap, math.ceil(cap * i / count / step) * step) for i in range(1, count + 1)})


@dataclass
class Decision:
    """What becomes of one layer; ``made`` is its replacement, None where it stays dense for the ``reason``."""

    form: Form | None
    reason: str = ""
    made: nn.Module | None = None
    dense_ms: float | None = None
    ms: float | None = None


# --- the rules --------------------------------------------------------------------------------------------------------


def _decide(
    layers: list[ConvLayer], facts: dict[str, Facts], config: TuckerConfig, named: dict[str, str]
) -> dict[str, Decision]:
    if config.rule in BUDGETS:
        decisions = _by_budget(layers, facts, config)
    elif config.rule == "latency":
        decisions = _by_latency(facts, config)
    else:
        decisions = {name: Decision(_one_layer(name, of, config, named)) for name, of in facts.items()}
    for name, decision in decisions.items():
        _build(decision, facts[name], config)
    return decisions


def _one_layer(name: str, facts: Facts, config: TuckerConfig, named: dict[str, str]) -> Form:
    """The rules that look at one layer alone."""
    value: Any = getattr(config, config.rule)
    value = value[named[name]] if isinstance(value, dict) else value
    K, C, _, _, G = facts.layer.shape
    if config.rule == "ranks":
        return facts.settle(value[0], value[1], config)
    if config.rule == "fraction":
        # 0.55·20 is 11.000000000000002 in binary: what is whole up to rounding counts as whole.
        return facts.settle(math.ceil(round(value * C, 9)), math.ceil(round(value * K, 9)), config)
    if config.rule == "evbmf":
        if facts.tucker is not None:
            return facts.settle(*facts.tucker.evbmf_ranks(value), config)
        found = max(ranks.evbmf_per_group(facts.basis, value), 1)
        return facts.settle(C, found * G, config)
    basis = Form(None, facts.basis.channels_for_energy(value) * G)
    if facts.tucker is None:
        return facts.settle(C, basis.rank_out, config)
    reads = facts.pixels_in / facts.layer.pixels
    form = facts.settle(*facts.tucker.ranks_for_energy(value, reads), config)
    cheaper = config.merge and facts.cost(basis, "macs") <= facts.cost(form, "macs")
    return facts.settle(C, basis.rank_out, config) if cheaper else form


def _by_budget(layers: list[ConvLayer], facts: dict[str, Facts], config: TuckerConfig) -> dict[str, Decision]:
    """The budget is of all convolutions together: what stays dense is paid for first."""
    rule, value = config.rule, getattr(config, config.rule)
    total = sum(getattr(layer, BUDGETS[rule]) for layer in layers)
    absolute = value * total if isinstance(value, float) and value <= 1 else value
    fixed = sum(getattr(layer, BUDGETS[rule]) for layer in layers if layer.name not in facts)
    forms: dict[str, list[Form]] = {}
    options: dict[str, list[Option]] = {}
    for name, of in facts.items():
        forms[name] = [f for f in of.forms(config) if config.keep_dense == "never" or of.pays(f)]
        options[name] = [Option(of.cost(f, rule), of.kept(f), i) for i, f in enumerate(forms[name])]
        if config.keep_dense == "auto":
            options[name].append(Option(getattr(of.layer, BUDGETS[rule]), 1.0, None))
    chosen = ranks.within(options, absolute - fixed)
    if chosen is None:
        least = fixed + sum(min(option.ms for option in many) for many in options.values())
        raise ValueError(
            f"compress: a budget of {absolute:.0f} {rule} for the convolutions is less than their least, {least:.0f}; "
            "raise the budget"
        )
    return {
        name: Decision(None, "the budget keeps it dense") if index is None else Decision(forms[name][index])
        for name, index in chosen.items()
    }


def _by_latency(facts: dict[str, Facts], config: TuckerConfig) -> dict[str, Decision]:
    """A few forms of each layer are timed, each the cheapest that keeps its share of the energy."""
    keep = config.keep_dense == "auto"
    forms: dict[str, list[Form]] = {}
    options: dict[str, list[Option]] = {}
    for name, of in facts.items():
        candidates = [f for f in of.forms(config) if of.pays(f)] or ([] if keep else of.forms(config))
        levels = {i / LATENCY_STEPS for i in range(1, LATENCY_STEPS)} | {0.95, 0.99}
        cheapest = {
            min(enough, key=lambda f, of=of: of.cost(f, "macs"))  # type: ignore[misc]
            for level in levels
            if (enough := [f for f in candidates if of.kept(f) >= level])
        }
        rounded = {of.settle(*_in_vectors(form), config) for form in cheapest}
        forms[name] = sorted(rounded, key=lambda f, of=of: of.cost(f, "macs"))  # type: ignore[misc]
        dense_ms, *times = _times(of.layer, [of.build(form, 0) for form in forms[name]])
        options[name] = [Option(dense_ms, 1.0, None)]
        options[name] += [Option(ms, of.kept(f), i) for i, (ms, f) in enumerate(zip(times, forms[name], strict=True))]
    share = 1.0 if config.latency is None else config.latency
    chosen = ranks.by_latency(options, share, keep_dense=keep)
    decisions = {}
    for name, index in chosen.items():
        dense_ms = options[name][0].ms
        if index is None:
            decisions[name] = Decision(None, "measured: dense keeps most energy for its time", dense_ms=dense_ms)
        else:
            decisions[name] = Decision(forms[name][index], dense_ms=dense_ms, ms=options[name][index + 1].ms)
    return decisions


def _in_vectors(form: Form) -> tuple[int, int]:
    """Both ranks rounded up to whole vectors."""
    return math.ceil((form.rank_in or 1) / VECTOR) * VECTOR, math.ceil(form.rank_out / VECTOR) * VECTOR


def _times(layer: ConvLayer, made: list[nn.Module]) -> list[float]:
    """Milliseconds of the dense layer and of its replacements, at the layer's own input shape."""
    if layer.example is None:
        raise RuntimeError(f"compress: layer {layer.name!r} was never called, so there is no input shape to time it at")
    return measure_ms([layer.module, *made], random_like(layer.example, next(layer.module.parameters()).device))


def _build(decision: Decision, facts: Facts, config: TuckerConfig) -> None:
    """Keep the layer dense where that is no worse, else build the replacement."""
    form = decision.form
    if form is None:
        return
    if config.keep_dense == "auto" and not facts.pays(form):
        decision.reason = f"{_shown(form)}: dense costs no more MACs or parameters"
        return
    made = facts.build(form, config.rounds)
    if config.measure and decision.ms is None:
        decision.dense_ms, decision.ms = _times(facts.layer, [made])
        if decision.ms >= decision.dense_ms and config.keep_dense == "auto" and config.rule not in BUDGETS:
            decision.reason = f"measured: no faster with {_shown(form)}"
            return
    decision.made = made


def _shown(form: Form) -> str:
    return f"Q = {form.rank_out}" if form.rank_in is None else f"ranks {form.rank_in}, {form.rank_out}"


# --- the converter ----------------------------------------------------------------------------------------------------


def check(model: nn.Module, config: TuckerConfig) -> None:
    """Refuse a mapping that names what is no convolution of the network."""
    resolve_exact(model, config.rule, config.named_layers() or ())


def convert(target: nn.Module, config: TuckerConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Decide for every convolution, then replace; the network, and a row for every convolution."""
    named = resolve_exact(target, config.rule, config.named_layers() or ())
    layers = survey(target, task.example_inputs)
    reasons: dict[str, str] = {}
    for layer in layers:
        reason = task.why_not(layer)
        if reason is None and config.named_layers() is not None and layer.name not in named:
            reason = f"not named in {config.rule}"
        if reason is not None:
            reasons[layer.name] = reason
    facts = {layer.name: _facts(layer) for layer in layers if layer.name not in reasons}
    decisions = _decide(layers, facts, config, named)
    rows = tuple(
        _report(layer, facts.get(layer.name), decisions.get(layer.name), reasons.get(layer.name, ""))
        for layer in layers
    )
    replaced = {facts[name].layer.module: d.made for name, d in decisions.items() if d.made is not None}
    return substitute(target, replaced), rows


def _facts(layer: ConvLayer) -> Facts:
    weight = dense_parameters(layer.conv)[0]
    name = f"compress: layer {layer.name!r}"
    basis = decompose(weight, layer.module.groups, name=name)
    _, _, R, S, G = layer.shape
    both = tucker_spectrum(weight, name=name) if G == 1 and R * S > 1 else None
    return Facts(layer, basis, both, layer.pixels_in)


def _report(layer: ConvLayer, facts: Facts | None, decision: Decision | None, reason: str) -> LayerReport:
    K, C, R, S, G = layer.shape
    form = decision.form if decision is not None and decision.made is not None else None
    made = decision.made if decision is not None else None
    energy = _energy(facts, made) if facts is not None and made is not None else None
    costs = {what: getattr(layer, attribute) for what, attribute in BUDGETS.items()}
    after = costs if form is None or facts is None else {what: facts.cost(form, what) for what in BUDGETS}
    return LayerReport(
        name=layer.name,
        verdict="kept" if made is None else "replaced",
        reason=reason or (decision.reason if decision is not None else ""),
        K=K,
        C=C,
        R=R,
        S=S,
        groups=G,
        break_even=break_even(K, layer.taps, G),
        basis_channels=None if form is None else form.rank_out,
        rank_in=None if form is None else form.rank_in,
        energy_kept=energy,
        relative_error=None if energy is None else math.sqrt(1 - energy),
        macs_before=costs["macs"],
        macs_after=after["macs"],
        parameters_before=costs["parameters"],
        parameters_after=after["parameters"],
        dense_ms=None if decision is None else decision.dense_ms,
        basis_ms=None if decision is None else decision.ms,
    )


def _energy(facts: Facts, made: nn.Module) -> float:
    """Share of the filters' energy in the layer that was made: ``‖core‖² / ‖W‖²`` after HOOI."""
    if isinstance(made, TuckerConv2d) and facts.tucker is not None:
        total = float(facts.tucker.weight.square().sum())
        return min(1.0, float(made.core.detach().double().square().sum()) / total) if total else 1.0
    return facts.basis.kept_energy(getattr(made, "basis_channels", 1) // facts.basis.groups)


register_method(Method(TuckerConfig, convert, (TuckerConv2d, BasisConv2d), check))
