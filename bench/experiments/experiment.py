"""What an experiment is: a question, a network, and the stages of conversion and training that shall answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from basisconv_kernels import BasisConfig, compress, search
from bench.experiments.setting import EXAMPLE, validation_accuracy


@dataclass(frozen=True)
class Stage:
    """One conversion, None for none, and the training that follows it.

    Attributes:
        config: of ``compress``, or a function network → network.
        epochs: over 50,000 images; the learning rate falls from ``lr`` to 0 along a cosine over all of them.
        orthogonality: weight of that loss.
        warm_up: share of the steps in which the rate rises to ``lr`` first.
        optimizer: ``"sgd"``, or ``"adam"``, which binary filters want.
        distill: weight of the distance to the start's answers in the loss, the labels have the rest.
    """

    config: Any
    epochs: int
    lr: float
    orthogonality: float = 0.0
    warm_up: float = 0.0
    optimizer: str = "sgd"
    distill: float = 0.0

    @property
    def words(self) -> str:
        """The configuration, for a row."""
        if self.config is None:
            return "none"
        return str(self.config.__doc__ or "").split("\n")[0] if isinstance(self.config, Callable) else str(self.config)


@dataclass(frozen=True)
class Experiment:
    """A question and how it is tried.

    Attributes:
        name: of rows and files.
        question: what it should show, with the figure hoped for.
        network: ``resnet20``, ``resnet56``, ``small-vgg``, ``wide-vgg`` with twice its channels, ``vgg16``, or
            ``googlenet``.
        start: ``published`` weights, ``random`` ones, or the name of another experiment, whose network of seed 0 it
            takes up, so that its seeds are those of its own training.
        stages: one after the other; empty with ``layerwise``.
        layerwise: arguments of ``TernaryConfig`` beside data and seed.
        tier: 1, or 2 for what needs a GPU.
        seeds: how often.
        twin: name of the experiment that accuracy is held against: the dense network with as much training; None for
            the network's own start.
        batch: images a step; None for 128.
    """

    name: str
    question: str
    network: str
    start: str
    stages: tuple[Stage, ...] = ()
    layerwise: dict[str, Any] | None = None
    tier: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    twin: str | None = None
    batch: int | None = None

    @property
    def dense(self) -> bool:
        """Whether nothing is converted."""
        return self.layerwise is None and all(stage.config is None for stage in self.stages)


def random_orthogonal(network: nn.Module) -> nn.Module:
    """Frozen random orthogonal bases of K/2 filters, but in the first convolution; nothing of the weights is kept."""
    config = BasisConfig(fraction=0.5, keep_dense="never", basis="random_orthogonal")
    return compress(network.cpu(), config, example_inputs=torch.randn(EXAMPLE), skip=["features.0"])[0]


def searched(network: nn.Module) -> nn.Module:
    """search: macs=0.25, BasisConv and Tucker at five sizes, loss on the validation images"""
    return search(
        network,
        example_inputs=torch.randn(EXAMPLE).to(next(network.parameters()).device),
        macs=0.25,
        evaluate=validation_accuracy,
    )[0]
