"""Ternary compression: the greedy layer-wise loop, and the method of ``TernaryConfig`` for ``compress``."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression import epochs, ternary_layers, ternary_report, ternary_state
from basisconv_kernels.compression.methods import Method, Task, register_method
from basisconv_kernels.compression.outside_reads import outside_reads
from basisconv_kernels.compression.report import LayerReport
from basisconv_kernels.compression.survey import ConvLayer, evaluating, survey
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.ternary_report import TernaryReport
from basisconv_kernels.compression.ternary_state import Position, State
from basisconv_kernels.compression.ternary_train import Trainer, moved
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers.decompose import break_even
from basisconv_kernels.layers.ternary import TernaryLayer
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear


def train_layerwise(
    model: nn.Module, config: TernaryConfig, *, inplace: bool = False
) -> tuple[nn.Module, TernaryReport]:
    """Prune a trained network and make its layers ternary one by one, training in between, within a bound on accuracy.

    1. The smallest weights of all convolutions and linear layers together become 0 for good (``sparsity``), and the
       network is fine-tuned. If that alone breaks the bound, no layer is constrained and the report says so.
    2. Layer by layer, the sparsest first: its weights become ``σ·sign(w)`` where they are not 0, and the whole network
       is trained, the constrained layers with straight-through gradients. If accuracy is then below
       ``baseline − bound``, everything is put back as it was before that layer, which keeps its float weights.

    Layers that the code of the network reads beside calling them, as a first batch shows, keep theirs too. With
    ``config.state`` the run can be killed at any moment and goes on with the next call, to the same bits.

    Args:
        model (Module): trained, dense.
        config (TernaryConfig): of ``method="layerwise"``.
        inplace (bool): change ``model`` itself instead of a deep copy.

    Returns:
        (Module, TernaryReport): the network, its constrained layers packed unless ``config.pack`` is False.

    Raises:
        ValueError: nothing to constrain, or another method.
        ArchitectureError: the state file is of another configuration or network.
        FileFormatError: the state file is damaged.
        FloatingPointError: the loss is no longer a finite number.

    Source: Grimaldi, Tenace, Calimera 2019 (Future Internet 11(1), 7); the accuracies here are our own.
    """
    if not isinstance(config, TernaryConfig) or config.method != "layerwise":
        raise ValueError("train_layerwise: config must be a TernaryConfig with method='layerwise'")
    kept = torch.get_rng_state(), random.getstate()
    try:
        target = model if inplace else copy.deepcopy(model)
        run = _Run(target, config, None, outside_reads(target, _one_batch(target, config)))
        run.go()
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
    return run.model, run.report()


def _one_batch(model: nn.Module, config: TernaryConfig) -> Any:
    """Inputs of the first batch, as one positional argument; none where the loader gives none, which training says."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    for inputs, _ in epochs.begin(config.loader, config.seed):
        return (moved(inputs, place),)
    return ()


class _Run:
    """One run: the network, its masks and where it is."""

    def __init__(
        self, model: nn.Module, config: TernaryConfig, allowed: frozenset[str] | None, read: Mapping[str, str]
    ) -> None:
        self.model, self.config = model, config
        self.layers = ternary_layers.weighted_layers(model, read, linear=config.linear)
        self.open = [
            layer for layer in self.layers if layer.against is None and (allowed is None or set(layer.names) & allowed)
        ]
        if not self.open:
            raise ValueError("layerwise: the network has no convolution or linear layer that could become ternary")
        self.modules = {layer.name: layer.module for layer in self.layers}  # as they stand in the network now
        self.position = Position()
        self.masks: dict[str, Tensor] = {}
        self.snapshot: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}
        self.random_state: Tensor | None = None
        self.fixed = config.fixed() | {"layers": [layer.name for layer in self.open]}

    # --- the loop -----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Begin, or go on where the state file says, to the end."""
        at, config = self.position, self.config
        if not self._resume():
            at.baseline = self._accuracy() if config.baseline is None else config.baseline
            self._say(f"dense: accuracy {at.baseline:.4f}")
            self._prune()
            self._save({})
        at = self.position
        if at.stage < 0:
            self._train(config.prune_epochs, config.prune_lr)
            at.pruned = self._accuracy()
            self._say(f"pruned to density {1 - config.sparsity:.3f}: accuracy {at.pruned:.4f}")
            if at.pruned < self._least():
                at.stopped = f"pruning alone loses more than bound = {config.bound}"
                at.stage = len(at.order)
            else:
                self._next_stage()
        while at.stage < len(at.order):
            self._one_layer(at.order[at.stage])
        if not at.done:
            at.final, at.done = self._accuracy(), True
            self._save({})
        if config.pack:
            for module in self.model.modules():
                if isinstance(module, TernaryLayer):
                    module.pack()

    def _one_layer(self, name: str) -> None:
        """Constrain a layer, train, and take it back if that cost too much."""
        at, config = self.position, self.config
        if not isinstance(self.modules[name], TernaryLayer):
            self._constrain(name)
        self._train(config.epochs, config.lr)
        accuracy = self._accuracy()
        if accuracy >= self._least():
            at.accepted[name] = accuracy
        else:
            at.rejected[name] = accuracy
            self._restore(name)
            if config.on_failure == "stop":
                at.stopped = f"constraining {name} loses more than bound = {config.bound}"
        verdict = "constrained" if name in at.accepted else "taken back"
        self._say(f"layer {at.stage + 1} of {len(at.order)}, {name}: accuracy {accuracy:.4f}, {verdict}")
        if at.stopped:
            at.stage = len(at.order) - 1
        self._next_stage()

    def _next_stage(self) -> None:
        at = self.position
        at.stage, at.epoch, at.step, at.losses = at.stage + 1, 0, 0, [0, 0.0]
        self.momentum, self.random_state = {}, None
        self.snapshot = {k: t.detach().clone() for k, t in self.model.state_dict().items()}
        self._save({})

    def _train(self, epochs: int, lr: float) -> None:
        trainer = Trainer(self.model, self.masks, self.config, lr, self._save)
        trainer.take_momentum(self.momentum)
        trainer.run(self.position, epochs, self.random_state)

    def _accuracy(self) -> float:
        if self.config.evaluate is None:
            raise ValueError("layerwise: config.evaluate is missing")
        with evaluating(self.model):
            return float(self.config.evaluate(self.model))

    def _least(self) -> float:
        return self.position.baseline - self.config.bound

    def _say(self, text: str) -> None:
        if self.config.progress is not None:
            self.config.progress(text)

    # --- layers -------------------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        weights = {layer.name: self._weight(layer.name) for layer in self.open}
        broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
        if broken:
            raise ValueError(f"layerwise: layer {broken[0]!r} has NaN or infinite weights")
        self.masks = ternary_layers.prune_masks(weights, self.config.sparsity)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(self.masks[name])
        self.position.order = ternary_layers.order_of(self.masks)

    def _weight(self, name: str) -> Tensor:
        weight: Any = self.modules[name].weight
        return weight

    def _constrain(self, name: str) -> None:
        config = self.config
        made = ternary_layers.ternary_of(
            self.modules[name], "layerwise", self.masks[name], config.scale_per_output, config.threshold
        )
        self._swap(name, made)

    def _swap(self, name: str, made: nn.Module) -> None:
        self.model = ternary_layers.put(self.model, self.modules[name], made)
        self.modules[name] = made

    @torch.no_grad()
    def _restore(self, name: str) -> None:
        """The network as it was before the layer was constrained: its module, and every value."""
        made: Any = self.modules[name]
        self._swap(name, made.to_plain())
        self.model.load_state_dict(self.snapshot)

    # --- the state ----------------------------------------------------------------------------------------------------

    def _save(self, momentum: dict[str, Tensor]) -> None:
        if self.config.state is None:
            return
        tensors = {
            "model": dict(self.model.state_dict()),
            "snapshot": self.snapshot,
            "mask": self.masks,
            "momentum": momentum,
        }
        ternary_state.write(self.config.state, self.fixed, State(self.position, tensors, torch.get_rng_state()))

    def _resume(self) -> bool:
        """Take over what the state file holds, if there is one."""
        stored = None if self.config.state is None else ternary_state.read(self.config.state, self.fixed)
        if stored is None:
            return False
        at = self.position = stored.position
        self.masks, self.snapshot = stored.tensors["mask"], stored.tensors["snapshot"]
        self.momentum, self.random_state = stored.tensors["momentum"], stored.random
        state = stored.tensors["model"]
        try:
            device = next(self.model.parameters()).device
            self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
            for name in self.masks:
                if f"{name}.mask".lstrip(".") in state:
                    self._constrain(name)
            self.model.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError, StopIteration) as error:
            raise ArchitectureError(f"layerwise: {self.config.state} belongs to another network: {error}") from error
        where = "done" if at.done else f"stage {at.stage + 1} of {len(at.order)}, epoch {at.epoch + 1}, step {at.step}"
        self._say(f"going on at {where}")
        return True

    def report(self) -> TernaryReport:
        """What became of every layer."""
        at = self.position
        rows = []
        for layer in self.layers:
            accuracy = at.accepted.get(layer.name, at.rejected.get(layer.name))
            reason = layer.against or self._reason(layer.name)
            module = self.modules[layer.name]
            rows.append(ternary_report.row_of(layer.name, module, reason, accuracy, self.masks))
        other = ternary_report.other_bits(self.model, set(self.modules.values()))
        history = tuple(tuple(entry) for entry in at.history)
        return TernaryReport(
            str(self.config), tuple(rows), at.baseline, at.pruned, at.final, other, at.stopped, history
        )

    def _reason(self, name: str) -> str:
        at = self.position
        if name in at.rejected:
            return f"constrained, accuracy fell to {at.rejected[name]:.4f}, below {self._least():.4f}"
        if name not in at.order:
            return "not asked for"
        return "" if name in at.accepted else f"not tried: {at.stopped}"


# --- compress ---------------------------------------------------------------------------------------------------------


def convert(target: nn.Module, config: TernaryConfig, task: Task) -> tuple[nn.Module, tuple[LayerReport, ...]]:
    """Make layers ternary; the network, and a row for every convolution. Linear layers follow ``filter_fn`` alone."""
    layers = survey(target, task.example_inputs)
    reasons = {layer.name: task.why_not(layer) for layer in layers}
    linear = config.linear and task.named is None and task.only is None
    found = {layer.name: layer for layer in ternary_layers.weighted_layers(target, task.read, linear=linear)}
    allowed = {
        name
        for name, layer in found.items()
        if layer.against is None
        and reasons.get(name) is None
        and (task.filter_fn is None or name in reasons or task.filter_fn(name, layer.module))
        and not (task.skip is not None and name not in reasons and set(layer.names) & task.skip)
    }
    if config.method == "layerwise":
        run = _Run(target, config, frozenset(allowed), task.read)
        run.go()
        target = run.model
        notes = {row.name: _note(row.reason, row.density, row.scale) for row in run.report().layers}
        constrained = {row.name for row in run.report().constrained}
    else:
        notes, constrained = {}, allowed
        for name in sorted(allowed):
            made = ternary_layers.ternary_of(
                found[name].module, config.method, None, config.scale_per_output, config.threshold
            )
            target = ternary_layers.put(target, found[name].module, made)
            notes[name] = _note("", made.density, float(made.scales()[0].mean()))
    rows = tuple(
        _row(layer, layer.name in constrained, reasons[layer.name] or notes.get(layer.name) or "cannot become ternary")
        for layer in layers
    )
    return target, rows


def _note(reason: str, density: float, scale: float | None) -> str:
    return reason or f"density {density:.3f}" + ("" if scale is None else f", scale {scale:.4g}")


def _row(layer: ConvLayer, replaced: bool, reason: str) -> LayerReport:
    K, C, R, S, G = layer.shape
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
        basis_channels=None,
        energy_kept=None,
        relative_error=None,
        macs_before=layer.dense_macs,
        macs_after=layer.dense_macs,
        parameters_before=layer.dense_parameters,
        parameters_after=layer.dense_parameters,
    )


register_method(Method(TernaryConfig, convert, (TernaryConv2d, TernaryLinear)))
