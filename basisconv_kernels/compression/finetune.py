"""A plain training loop, for any network and loader: what truncation costs, fine-tuning gives back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basisconv_kernels.compression.distributed import reshard, sharded
from basisconv_kernels.compression.finetune_parts import EpochRecord, reporter
from basisconv_kernels.compression.finetune_run import Run, check_orthogonality
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d

TRAINED = ("all", "coefficients_and_norm")


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
    validate: Callable[[nn.Module], float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
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
        validate (function, optional): network in eval mode → a number, larger is better, on a validation split; called
            after each epoch. At the end the network is that of the best epoch, of equals the first.
        checkpoint (path, optional): a file that holds the whole run; one that was killed goes on from it, to the same
            result bit by bit on the same machine. Written after each epoch, and within one every ``save_every`` seconds
            (not by several processes). It must be of the same configuration.
        save_every (float): seconds.
        seed (int, optional): before each epoch PyTorch's and Python's random numbers, and the ``generator`` of the
            loader, are set by it, so that a DataLoader with ``shuffle=True`` and dropout give the same in every run;
            the caller's come back afterwards. Default: 0 with a checkpoint, else nothing is set.
        autocast (dtype, optional): mixed precision, bfloat16 or float16; the latter with a scaled loss.
        compiled (bool): run the network through ``torch.compile``.

    The network may be wrapped in ``DistributedDataParallel``: run the same script under ``torchrun``. ``validate`` then
    gets the network inside and the mean of all processes counts, the first process writes the checkpoint, and a
    ``DistributedSampler`` is told the epoch. ``fully_shard`` works without a checkpoint.

    Returns:
        list of EpochRecord: one an epoch, an epoch cut short by ``max_steps`` included.

    Raises:
        TypeError: ``model`` is no Module.
        ArchitectureError: the checkpoint is of another configuration or network.
        FileFormatError: the checkpoint is damaged.
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
    reshard(model)
    if checkpoint is not None and sharded(model):
        raise ValueError(
            "finetune: a checkpoint would hold one process's part of a sharded network alone; save such a network with "
            "torch.distributed.checkpoint, or train it without checkpoint"
        )
    if device is not None:
        model.to(device)
    if optimizer is None:
        optimizer = torch.optim.SGD(trainable_parameters(model, train), lr=lr, momentum=0.9, weight_decay=5e-4)
    if orthogonality:
        check_orthogonality(model, optimizer)
    if scheduler is not None and not hasattr(scheduler, "step"):
        scheduler = scheduler(optimizer)
    settings = {
        "epochs": epochs,
        "max_steps": max_steps,
        "orthogonality": orthogonality,
        "scheduler_step": scheduler_step,
        "seed": 0 if seed is None and checkpoint is not None else seed,
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    with reporter(progress, epochs, loader, max_steps) as report:
        run = Run(
            model,
            loader,
            optimizer,
            scheduler,
            loss_function or nn.CrossEntropyLoss(),
            settings,
            validate=validate,
            checkpoint=checkpoint,
            save_every=save_every,
            compiled=compiled,
            report=report,
        )
        return run.go()


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
