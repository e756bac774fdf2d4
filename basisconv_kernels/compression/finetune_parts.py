"""The parts of a training loop: what an epoch's record is, its sums, training mode, a bar."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.layers.basis_conv2d import BasisConv2d


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of ``finetune``; also what a progress function gets after every step, for the epoch so far.

    Attributes:
        epoch: from 1.
        steps: optimiser steps in this epoch.
        loss: mean over the samples of loss_function alone.
        orthogonality: mean over the samples of the orthogonality loss, unweighted; 0 where it has no weight.
        accuracy: share of the samples, in training mode, whose largest logit is the target; None where the targets are
            no class numbers.
        learning_rate: of the first parameter group, at the last step.
        seconds: since the epoch began.
        validation: what ``validate`` gave after the epoch; None without one.
    """

    epoch: int
    steps: int
    loss: float
    orthogonality: float
    accuracy: float | None
    learning_rate: float
    seconds: float
    validation: float | None = None


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Identities of the parameters that an optimiser steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@contextlib.contextmanager
def training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Training mode, gradients for what the optimiser holds only; all flags come back."""
    held = held_by(optimizer)
    idle = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)
        for module, flag in flags:
            module.training = flag
            if isinstance(module, BasisConv2d):
                module.repack()  # an optimiser may have written through .data


class Tally:
    """Running means of one epoch; its sums are plain numbers, so that a file can hold them."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.steps, self.samples, self.labelled = epoch, 0, 0, 0
        self.loss = self.extra = self.rate = 0.0
        self.right = 0
        self.start = time.perf_counter()

    def sums(self) -> dict[str, Any]:
        """What ``take`` takes."""
        return {name: value for name, value in vars(self).items() if name != "start"} | {
            "seconds": time.perf_counter() - self.start
        }

    def take(self, sums: Mapping[str, Any]) -> None:
        """Go on from the sums of an interrupted epoch."""
        vars(self).update({name: value for name, value in sums.items() if name != "seconds"})
        self.start = time.perf_counter() - sums["seconds"]

    def add(self, outputs: Any, targets: Any, loss: float, extra: float, rate: float) -> None:
        """Take one step in."""
        size = len(targets) if isinstance(targets, Tensor) and targets.dim() else 1
        self.steps += 1
        self.samples += size
        self.loss += loss * size
        self.extra += extra * size
        self.rate = rate
        classes = isinstance(outputs, Tensor) and outputs.dim() == 2 and isinstance(targets, Tensor)
        if classes and targets.dim() == 1 and not targets.is_floating_point():
            self.right += int((outputs.detach().argmax(1) == targets).sum())
            self.labelled += size

    def record(self, validation: float | None = None) -> EpochRecord:
        """The means so far."""
        samples = max(1, self.samples)
        accuracy = self.right / self.labelled if self.labelled else None
        seconds = time.perf_counter() - self.start
        loss, extra = self.loss / samples, self.extra / samples
        return EpochRecord(self.epoch, self.steps, loss, extra, accuracy, self.rate, seconds, validation)


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value


@contextlib.contextmanager
def reporter(
    progress: bool | Callable[[EpochRecord], None], epochs: int, loader: Any, max_steps: int | None
) -> Iterator[Callable[[EpochRecord], None]]:
    """A function to call after every step: the user's, a bar's, or one that does nothing."""
    if callable(progress):
        yield progress
        return
    if not progress or importlib.util.find_spec("rich") is None:
        yield lambda record: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    total = epochs * len(loader) if hasattr(loader, "__len__") else None
    if max_steps is not None:
        total = min(total, max_steps) if total is not None else max_steps
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("fine-tuning", total=total)

        def advance(record: EpochRecord) -> None:
            right = "" if record.accuracy is None else f", accuracy {100 * record.accuracy:.2f} %"
            bar.update(task, advance=1, description=f"epoch {record.epoch}/{epochs}, loss {record.loss:.4f}{right}")

        yield advance
