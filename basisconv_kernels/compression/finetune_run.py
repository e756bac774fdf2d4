"""One run of ``finetune``: the loop, what it chooses by validation, and what a checkpoint holds of it."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression import distributed, epochs, finetune_state
from basisconv_kernels.compression.basis import orthogonality_loss
from basisconv_kernels.compression.finetune_parts import EpochRecord, Tally, held_by, moved, training
from basisconv_kernels.compression.finetune_state import Position, State
from basisconv_kernels.compression.survey import evaluating
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers.basis_conv2d import BasisConv2d


class Run:
    """Everything that ``finetune`` was given, and where it is.

    Args:
        model: what is called; possibly wrapped for several processes.
        loader, optimizer, scheduler, loss_of: as ``finetune`` takes or makes them.
        settings: what else decides the result, as JSON values; a checkpoint states them.
        validate, checkpoint, save_every, compiled: as ``finetune`` takes them.
        report: called with the record so far after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loss_of: Callable[[Any, Any], Tensor],
        settings: dict[str, Any],
        *,
        validate: Callable[[nn.Module], float] | None,
        checkpoint: Any,
        save_every: float,
        compiled: bool,
        report: Callable[[EpochRecord], None],
    ) -> None:
        self.model, self.loader, self.optimizer, self.scheduler = model, loader, optimizer, scheduler
        self.loss_of, self.settings, self.validate, self.report = loss_of, settings, validate, report
        self.checkpoint, self.save_every = checkpoint, save_every
        self.inner = distributed.unwrapped(model)
        self.group = distributed.Group(model)
        self.place = next(model.parameters()).device
        self.call: Callable[..., Any] = torch.compile(model) if compiled else model
        dtype = settings["autocast"]
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.place.type, enabled=self.dtype is torch.float16)
        self.at = Position()
        self.best: dict[str, Tensor] = {}
        self.random: Tensor | None = None
        self.last_save = time.monotonic()

    def go(self) -> list[EpochRecord]:
        """Begin, or go on where the checkpoint says, to the end; the records of all epochs."""
        seed = self.settings["seed"]
        with _own_random_numbers() if seed is not None else contextlib.nullcontext():
            self._resume()
            with training(self.model, self.optimizer):
                while not self.at.done:
                    self._epoch()
            if self.best:
                self.inner.load_state_dict(self.best)
        return [EpochRecord(**record) for record in self.at.history]

    def _epoch(self) -> None:
        at, most = self.at, self._steps_left()
        tally = Tally(at.epoch + 1)
        if at.tally:
            tally.take(at.tally)
        for inputs, targets in self._batches():
            if at.step >= most:
                break
            self._step(moved(inputs, self.place), moved(targets, self.place), tally)
            at.step += 1
            self.report(tally.record())
            if self._time_to_save():
                at.tally = tally.sums()
                self._save()
        if at.step == 0 and at.epoch == 0:
            raise ValueError("finetune: the loader gave no batch, or max_steps is 0")
        if at.step:
            self._close(tally)
        at.epoch, at.step, at.tally, self.random = at.epoch + 1, 0, {}, None
        at.done = at.epoch >= self.settings["epochs"] or self._steps_left() <= 0
        self._save()

    def _close(self, tally: Tally) -> None:
        """What follows the last step of an epoch."""
        value = None
        if self.validate is not None:
            with evaluating(self.inner):
                value = self.group.agreed(float(self.validate(self.inner)))
            if not self.at.best or value > self.at.best[1]:
                self.at.best = [self.at.epoch + 1, value]
                self.best = {name: t.detach().clone() for name, t in self.inner.state_dict().items()}
        self.at.history.append(asdict(tally.record(value)))
        if self.scheduler is not None and self.settings["scheduler_step"] == "epoch":
            self.scheduler.step()

    def _steps_left(self) -> float:
        """Steps that ``max_steps`` allows the epoch at work."""
        most = self.settings["max_steps"]
        return math.inf if most is None else most - sum(record["steps"] for record in self.at.history)

    def _batches(self) -> Iterator[Any]:
        """The rest of the epoch at work; with a seed its order depends on that and the epoch alone."""
        at, loader, seed = self.at, self.loader, self.settings["seed"]
        distributed.set_epoch(loader, at.epoch)
        if seed is not None:
            loader = epochs.begin(loader, epochs.seed_of(seed, self.group.rank, at.epoch))
        batches = iter(loader)
        for _ in itertools.islice(batches, at.step):
            pass  # done before the run was interrupted
        if at.step and self.random is not None:
            _set_random_state(self.random, self.place)
        return batches

    def _step(self, inputs: Any, targets: Any, tally: Tally) -> None:
        weight = self.settings["orthogonality"]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.place.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.call(inputs)
            loss = self.loss_of(outputs, targets)
        extra = orthogonality_loss(self.inner) if weight else torch.zeros(())
        total = loss + weight * extra if weight else loss
        if not math.isfinite(float(total.detach())):
            raise FloatingPointError(
                f"finetune: the loss is {float(total.detach())} at step {tally.steps + 1} of epoch {tally.epoch}; "
                "lower the learning rate, and look for NaN in the data"
            )
        self.scaler.scale(total).backward()
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None and self.settings["scheduler_step"] == "step":
            self.scheduler.step()
        tally.add(outputs, targets, float(loss.detach()), float(extra.detach()), rate)

    # --- the checkpoint -----------------------------------------------------------------------------------------------

    def _fixed(self) -> dict[str, Any]:
        kinds = {"optimizer": type(self.optimizer).__name__, "scheduler": type(self.scheduler).__name__}
        return self.settings | kinds | {"processes": self.group.size, "chooses": self.validate is not None}

    def _time_to_save(self) -> bool:
        if self.checkpoint is None or self.group.size > 1:  # several processes would have to agree on the time
            return False
        return time.monotonic() - self.last_save >= self.save_every

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        states = self.group.gathered(_random_state(self.place))
        if self.group.rank == 0:
            held = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            if self.scheduler is not None:
                held["scheduler"] = self.scheduler.state_dict()
            randoms = {str(rank): state for rank, state in enumerate(states)}
            state = State(self.at, self.inner.state_dict(), self.best, held, randoms)
            finetune_state.write(self.checkpoint, self._fixed(), state)
        self.group.wait()
        self.last_save = time.monotonic()

    def _resume(self) -> None:
        stored = None if self.checkpoint is None else finetune_state.read(self.checkpoint, self._fixed())
        if stored is None:
            return
        try:
            self.inner.load_state_dict(stored.model)
            self.optimizer.load_state_dict(stored.held["optimizer"])
            self.scaler.load_state_dict(stored.held["scaler"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(stored.held["scheduler"])
            self.random = stored.random[str(self.group.rank)]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ArchitectureError(f"finetune: {self.checkpoint} belongs to another network: {error}") from error
        self.at, self.best = stored.position, stored.best


def check_orthogonality(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a loss that would train nothing."""
    orthogonality_loss(model)  # raises where no basis is a parameter
    held = held_by(optimizer)
    if not any(id(m.basis_weight) in held for m in model.modules() if isinstance(m, BasisConv2d)):
        raise ValueError(
            "finetune: orthogonality has a weight, but the optimiser holds no basis, so it would train nothing; "
            "use train='all', or give the optimiser the basis_weight of the layers"
        )


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The caller's random numbers of PyTorch and Python come back afterwards."""
    kept = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])


def _random_state(place: torch.device) -> Tensor:
    """States of the generators that layers may draw from: the CPU's, and behind it that of a CUDA device."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(place)]) if place.type == "cuda" else state


def _set_random_state(state: Tensor, place: torch.device) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if place.type == "cuda":
        torch.cuda.set_rng_state(state[size:], place)
