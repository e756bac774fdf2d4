"""SGD on a pruned and partly ternary network, epoch by epoch, that can be left and entered again at any step."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression import epochs
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.ternary_state import Position
from basisconv_kernels.layers.ternary import TernaryLayer


class Trainer:
    """One stage of a run: masks held, momentum kept by parameter name, and a save now and then.

    Args:
        model: the network as it is in this stage.
        masks: {layer: mask} of all pruned layers; that of a ternary one lies in the layer itself.
        config: of the run.
        lr: learning rate of this stage.
        save: (momentum by parameter) → nothing; writes the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        config: TernaryConfig,
        lr: float,
        save: Callable[[dict[str, Tensor]], None],
    ) -> None:
        self.model, self.config, self.save = model, config, save
        modules = dict(model.named_modules())
        self.masked = [
            (module.weight, mask)
            for name, mask in masks.items()
            if not isinstance(module := modules[name], TernaryLayer) and isinstance(module.weight, Tensor)
        ]
        self.ternary = [m for m in model.modules() if isinstance(m, TernaryLayer)]
        for layer in self.ternary:
            if layer.scale is not None:
                layer.scale.requires_grad_(config.scale == "gradient")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = {
            id(m.weight) for m in modules.values() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, TernaryLayer))
        }
        groups = [
            {"params": [p for p in self.parameters.values() if id(p) in decayed], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters.values() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=config.momentum)
        self.loss_of = config.loss_function or nn.CrossEntropyLoss()

    def momentum(self) -> dict[str, Tensor]:
        """{parameter: its momentum} of those that have one yet."""
        state = self.optimizer.state
        held = {name: state[p].get("momentum_buffer") for name, p in self.parameters.items() if p in state}
        return {name: buffer for name, buffer in held.items() if buffer is not None}

    def take_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Go on with the momentum of an interrupted stage."""
        for name, buffer in momentum.items():
            p = self.parameters[name]
            self.optimizer.state[p]["momentum_buffer"] = buffer.to(p.device, copy=True)

    def run(self, position: Position, count: int, random_state: Tensor | None) -> None:
        """Do the epochs of the stage that ``position`` has not done; it moves on with every step.

        Args:
            position: changed in place.
            count: epochs of the stage.
            random_state: of PyTorch's generator at ``position``, where that lies within an epoch.
        """
        place = next(self.model.parameters()).device
        with self._training():
            last = time.monotonic()
            while position.epoch < count:
                batches: Iterator[Any] = iter(self._batches(position))
                for _ in itertools.islice(batches, position.step):
                    pass  # done before the run was interrupted
                if position.step and random_state is not None:
                    torch.set_rng_state(random_state)
                for inputs, targets in batches:
                    self._step(moved(inputs, place), moved(targets, place), position)
                    if position.step == self.config.max_steps:
                        break
                    if time.monotonic() - last >= self.config.save_every:
                        self.save(self.momentum())
                        last = time.monotonic()
                steps, total = position.losses
                if not steps:
                    raise ValueError(
                        "layerwise: the loader gave no batch; it must be one that can be run through again"
                    )
                position.history.append([position.stage, position.epoch, steps, total / steps])
                position.epoch, position.step, position.losses = position.epoch + 1, 0, [0, 0.0]
                self.save(self.momentum())

    def _batches(self, position: Position) -> Iterable[Any]:
        """One epoch of the loader, whose order depends on the seed and the position alone."""
        seed = epochs.seed_of(self.config.seed, position.stage, position.epoch)
        return epochs.begin(self.config.loader, seed)

    def _step(self, inputs: Any, targets: Any, position: Position) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(self.model(inputs), targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"layerwise: the loss is {value} at step {position.step + 1} of epoch {position.epoch + 1}; lower lr "
                "or prune_lr, and look for NaN in the data"
            )
        loss.backward()
        for weight, mask in self.masked:  # with weights of 0 a gradient of 0 keeps them there, momentum and decay too
            if weight.grad is not None:
                weight.grad *= mask
        self.optimizer.step()
        if self.config.scale == "recompute":
            for layer in self.ternary:
                layer.fit_scales()
        position.step += 1
        position.losses = [position.losses[0] + 1, position.losses[1] + value]

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        try:
            with torch.enable_grad():
                yield
        finally:
            for module, flag in flags:
                module.training = flag


def moved(value: Any, device: torch.device) -> Any:
    """A batch, or part of one, on a device, if it is of a kind that moves."""
    return value.to(device) if hasattr(value, "to") else value
