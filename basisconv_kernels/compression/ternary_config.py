"""What ternary compression shall do: the method, the layers, and for layer-wise training data, bound and schedule."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

METHODS = ("layerwise", "twn", "ttq")
ON_FAILURE = ("skip", "stop")
SCALES = ("gradient", "recompute")
# Not part of what a run computes: they may differ when it is resumed.
FREE = ("loader", "evaluate", "loss_function", "state", "save_every", "progress")


@dataclass(frozen=True, kw_only=True)
class TernaryConfig:
    """How weights become −σ, 0 and +σ.

    ``"twn"`` and ``"ttq"`` convert all layers at once, from their weights alone; fine-tune the result, then ``pack``
    its layers. ``"layerwise"`` trains: it prunes the network, then constrains one layer after the other, the sparsest
    first, trains the whole network after each, and takes a layer back if accuracy falls below the bound.

    Args:
        method ("layerwise", "twn" or "ttq").
        linear (bool): Linear layers too.
        scale_per_output (bool): a scale for each output instead of one for the layer; TWN always has one each.
        threshold (float, optional): Δ of TWN and TTQ, see ``TernaryConv2d``.
        loader: for ``"layerwise"``: (inputs, targets) batches; an iterable that can be run through once an epoch, or
            a function seed → iterable. Before each epoch PyTorch's and Python's random numbers, and the generator of a
            DataLoader, are set by ``seed``, so a DataLoader with ``shuffle=True`` gives the same order in every run.
        evaluate: for ``"layerwise"``: network in eval mode → accuracy, 0..1, on a validation split: it decides which
            layers are kept, so it must not be the test set.
        sparsity (float): share of all weights that pruning sets to 0, the smallest of the whole network.
        bound (float): most accuracy that may be lost against the dense network, absolute.
        baseline (float, optional): accuracy of the dense network; default: measured.
        prune_epochs, epochs (int): of fine-tuning after pruning, and after each layer.
        prune_lr, lr (float): their learning rates.
        momentum, weight_decay (float): of SGD; biases, BatchNorms and scales do not decay.
        scale ("gradient" or "recompute"): whether σ is trained, or set to the mean |w| after each step.
        on_failure ("skip" or "stop"): whether the layers behind one that was taken back are still tried.
        max_steps (int, optional): of an epoch.
        loss_function (function, optional): (outputs, targets) → scalar; default: cross entropy.
        pack (bool): drop the float weights of the constrained layers at the end.
        seed (int).
        state (path, optional): a file that holds the whole run; one that was killed goes on from it, to the same result
            bit by bit on the same machine. It must be of the same configuration.
        save_every (float): seconds between two writings of it within an epoch; it is also written after each.
        progress (function, optional): called with a line of text after each stage.

    Raises:
        ValueError, TypeError: values out of range, or data missing.

    Source: Grimaldi, Tenace, Calimera 2019 (Future Internet 11(1), 7) for the procedure; where its text is silent, the
    choices are this package's.
    """

    method: str = "layerwise"
    linear: bool = True
    scale_per_output: bool = False
    threshold: float | None = None
    loader: Iterable[Any] | Callable[[int], Iterable[Any]] | None = field(default=None, repr=False)
    evaluate: Callable[[nn.Module], float] | None = field(default=None, repr=False)
    sparsity: float = 0.8
    bound: float = 0.01
    baseline: float | None = None
    prune_epochs: int = 1
    epochs: int = 1
    prune_lr: float = 0.01
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scale: str = "gradient"
    on_failure: str = "skip"
    max_steps: int | None = None
    loss_function: Callable[[Any, Any], Any] | None = field(default=None, repr=False)
    pack: bool = True
    seed: int = 0
    state: str | os.PathLike[str] | None = None
    save_every: float = 60.0
    progress: Callable[[str], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("scale", SCALES), ("on_failure", ON_FAILURE)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TernaryConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, least, most in (
            ("sparsity", 0.0, 1.0), ("bound", 0.0, 1.0), ("prune_lr", 0.0, 1e6), ("lr", 0.0, 1e6),
            ("momentum", 0.0, 1.0), ("weight_decay", 0.0, 1e6), ("save_every", 0.0, 1e9),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"TernaryConfig: {name} must be a number in {least:g}..{most:g}, got {value!r}")
        for name, least_int in (("prune_epochs", 0), ("epochs", 1), ("max_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            optional = name == "max_steps" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least_int):
                raise ValueError(f"TernaryConfig: {name} must be an int of at least {least_int}, got {value!r}")
        trained = {"loader": self.loader, "evaluate": self.evaluate}
        if self.method == "layerwise":
            missing = [name for name, value in trained.items() if value is None]
            if missing:
                raise ValueError(
                    f"TernaryConfig: method='layerwise' trains, so it needs {' and '.join(missing)}; 'twn' and 'ttq' "
                    "convert without data"
                )
            if not callable(self.evaluate):
                raise TypeError(f"TernaryConfig: evaluate must be a function of the network, got {self.evaluate!r}")
        elif self.state is not None or self.loader is not None or self.evaluate is not None:
            raise ValueError(
                f"TernaryConfig: loader, evaluate and state go with method='layerwise'; method={self.method!r} "
                "converts at once, and finetune trains the result"
            )

    def fixed(self) -> dict[str, Any]:
        """What decides the result of a run, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name == "method" or f.name not in FREE}
        defaults = {f.name: f.default for f in fields(self)}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items() if k == "method" or v != defaults[k])
