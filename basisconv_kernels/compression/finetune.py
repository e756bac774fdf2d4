"""A plain training loop, for any network and loader: what truncation costs, fine-tuning gives back."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basisconv_kernels.compression.basis import orthogonality_loss
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

TRAINED = ("all", "coefficients_and_norm")


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
    """

    epoch: int
    steps: int
    loss: float
    orthogonality: float
    accuracy: float | None
    learning_rate: float
    seconds: float


def trainable_parameters(model: nn.Module, what: str = "all") -> list[nn.Parameter]:
    """The parameters to give to an optimiser, each once; frozen bases are buffers and never among them.

    Args:
        model (Module): any network.
        what ("all" or "coefficients_and_norm"): all that ask for gradients, or of these only the last stages, that is
            coefficients or u_out, and biases of this package's layers, and whatever belongs to a BatchNorm.

    Raises:
        ValueError: another ``what``, or nothing to train.
    """
    if what not in TRAINED:
        raise ValueError(f"trainable_parameters: what must be one of {', '.join(TRAINED)}, got {what!r}")
    if what == "all":
        found = list(model.parameters())
    else:
        found = []
        for module in model.modules():
            if isinstance(module, BasisConv2d):
                found += [p for p in (module.coefficients, module.bias) if p is not None]
            elif isinstance(module, TuckerConv2d):
                found += [p for p in (module.u_out, module.bias) if p is not None]
            elif isinstance(module, _BatchNorm):
                found += list(module.parameters(recurse=False))
    unique = [p for p in dict.fromkeys(found) if p.requires_grad]
    if not unique:
        raise ValueError(f"trainable_parameters: the network has nothing to train for what={what!r}")
    return unique


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 0.01,
    loss_function: Callable[[Any, Any], Tensor] | None = None,
    scheduler: Any = None,
    scheduler_step: str = "epoch",
    orthogonality: float = 0.0,
    train: str = "all",
    progress: bool | Callable[[EpochRecord], None] = True,
    max_steps: int | None = None,
    device: torch.device | str | None = None,
) -> list[EpochRecord]:
    """Train a network in place.

    ``loss = loss_function(model(inputs), targets) + orthogonality · Σ over layers of orthogonality_loss``

    Args:
        model (Module): any network; trained in training mode, its modules' training flags come back afterwards.
        loader (iterable): gives (inputs, targets) and can be run through once an epoch.
        epochs (int): how often.
        optimizer (Optimizer, optional): default: SGD with ``lr``, momentum 0.9 and weight decay 5e-4 on
            ``trainable_parameters(model, train)``. A frozen basis is a buffer: no optimiser and no decay reaches it.
        lr (float): of the default optimiser.
        loss_function (function, optional): (outputs, targets) → scalar; default: cross entropy.
        scheduler (learning rate scheduler, optional): of the optimiser given; or a function optimiser → scheduler.
        scheduler_step ("epoch" or "step"): when the scheduler moves on.
        orthogonality (float): weight of the orthogonality loss of the trained bases; 1e-3 in the authors' recipe.
        train ("all" or "coefficients_and_norm"): what the default optimiser trains; parameters that the optimiser does
            not hold need no gradients meanwhile, which saves their backward.
        progress (bool or function): True draws a bar on a terminal where rich is installed; a function gets an
            ``EpochRecord`` after every step.
        max_steps (int, optional): stop after so many steps over all epochs.
        device (optional): where to train; the network is moved there. Default: where its first parameter is.

    Returns:
        list of EpochRecord: one an epoch, an epoch cut short by ``max_steps`` included.

    Raises:
        TypeError: ``model`` is no Module.
        ValueError: arguments that do not fit, an empty loader, or an orthogonality weight without a trained basis.
        FloatingPointError: the loss is no longer a finite number.

    Example:
        >>> import torch
        >>> from basisconv_kernels.compression.finetune import finetune
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 1, 4, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> history = finetune(net, batches, epochs=2, progress=False)
        >>> [record.steps for record in history]
        [3, 3]
    """
    _check_arguments(model, epochs, scheduler_step, orthogonality, max_steps)
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    if optimizer is None:
        optimizer = torch.optim.SGD(trainable_parameters(model, train), lr=lr, momentum=0.9, weight_decay=5e-4)
    if orthogonality:
        _check_orthogonality(model, optimizer)
    if scheduler is not None and not hasattr(scheduler, "step"):
        scheduler = scheduler(optimizer)
    loss_of = loss_function or nn.CrossEntropyLoss()
    history: list[EpochRecord] = []
    left = math.inf if max_steps is None else max_steps
    with _training(model, optimizer), _reporter(progress, epochs, loader, max_steps) as report:
        for epoch in range(1, epochs + 1):
            tally = _Tally(epoch)
            for inputs, targets in loader:
                if tally.steps >= left:
                    break
                inputs, targets = _moved(inputs, place), _moved(targets, place)
                optimizer.zero_grad(set_to_none=True)
                outputs = model(inputs)
                loss = loss_of(outputs, targets)
                extra = orthogonality_loss(model) if orthogonality else torch.zeros(())
                total = loss + orthogonality * extra if orthogonality else loss
                if not math.isfinite(float(total.detach())):
                    raise FloatingPointError(
                        f"finetune: the loss is {float(total.detach())} at step {tally.steps + 1} of epoch {epoch}; "
                        "lower the learning rate, and look for NaN in the data"
                    )
                total.backward()
                rate = float(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if scheduler is not None and scheduler_step == "step":
                    scheduler.step()
                tally.add(outputs, targets, float(loss.detach()), float(extra.detach()), rate)
                report(tally.record())
            if tally.steps == 0:
                if epoch == 1:
                    raise ValueError("finetune: the loader gave no batch, or max_steps is 0")
                break
            left -= tally.steps
            history.append(tally.record())
            if scheduler is not None and scheduler_step == "epoch":
                scheduler.step()
            if left <= 0:
                break
    return history


def _check_arguments(
    model: nn.Module, epochs: int, scheduler_step: str, orthogonality: float, max_steps: int | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"finetune: model must be a torch.nn.Module, got {type(model).__name__}")
    if epochs < 1:
        raise ValueError(f"finetune: epochs must be at least 1, got {epochs}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"finetune: max_steps must be at least 1, got {max_steps}")
    if scheduler_step not in ("epoch", "step"):
        raise ValueError(f"finetune: scheduler_step must be 'epoch' or 'step', got {scheduler_step!r}")
    if orthogonality < 0:
        raise ValueError(f"finetune: orthogonality must not be negative, got {orthogonality}")
    if next(model.parameters(), None) is None:
        raise ValueError("finetune: the network has no parameters")


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _check_orthogonality(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a loss that would train nothing."""
    orthogonality_loss(model)  # raises where no basis is a parameter
    held = _held(optimizer)
    if not any(id(m.basis_weight) in held for m in model.modules() if isinstance(m, BasisConv2d)):
        raise ValueError(
            "finetune: orthogonality has a weight, but the optimiser holds no basis, so it would train nothing; "
            "use train='all', or give the optimiser the basis_weight of the layers"
        )


@contextlib.contextmanager
def _training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Training mode, gradients for what the optimiser holds only; all flags come back."""
    held = _held(optimizer)
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


class _Tally:
    """Running means of one epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.steps, self.samples, self.labelled = epoch, 0, 0, 0
        self.loss = self.extra = self.rate = 0.0
        self.right = 0
        self.start = time.perf_counter()

    def add(self, outputs: Any, targets: Any, loss: float, extra: float, rate: float) -> None:
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

    def record(self) -> EpochRecord:
        samples = max(1, self.samples)
        accuracy = self.right / self.labelled if self.labelled else None
        seconds = time.perf_counter() - self.start
        return EpochRecord(
            self.epoch, self.steps, self.loss / samples, self.extra / samples, accuracy, self.rate, seconds
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value


@contextlib.contextmanager
def _reporter(
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
