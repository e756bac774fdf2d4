"""What is tried: networks, methods and training budgets. One entry is one question; each is run with several seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from basisconv_kernels import BasisConfig, PruneConfig, StackedBinaryConfig, TuckerConfig, compress, search
from bench.experiments.setting import EXAMPLE, validation_accuracy


@dataclass(frozen=True)
class Stage:
    """One conversion, None for none, and the training that follows it.

    Attributes:
        config: of ``compress``, or a function network → network.
        epochs: over 50,000 images; the learning rate falls from ``lr`` to 0 along a cosine over all of them.
        orthogonality: weight of that loss.
        warm_up: share of the steps in which the rate rises to ``lr`` first.
        steps: of an epoch, at most.
    """

    config: Any
    epochs: int
    lr: float
    orthogonality: float = 0.0
    warm_up: float = 0.0
    steps: int | None = None

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
        network: ``resnet20``, ``resnet56`` or ``small-vgg``.
        start: ``published`` weights, ``random`` ones, or the name of another experiment, whose network of seed 0 it
            takes up, so that its seeds are those of its own training.
        stages: one after the other; empty with ``layerwise``.
        layerwise: arguments of ``TernaryConfig`` beside data and seed.
        tier: 1, or 2 for what needs a GPU.
        seeds: how often.
    """

    name: str
    question: str
    network: str
    start: str
    stages: tuple[Stage, ...] = ()
    layerwise: dict[str, Any] | None = None
    tier: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)


def random_orthogonal(network: nn.Module) -> nn.Module:
    """Frozen random orthogonal bases of K/2 filters, but in the first convolution; nothing of the weights is kept."""
    config = BasisConfig(fraction=0.5, keep_dense="never", basis="random_orthogonal")
    return compress(network, config, example_inputs=torch.randn(EXAMPLE), skip=["features.0"])[0]


def searched(network: nn.Module) -> nn.Module:
    """search: macs=0.25, BasisConv and Tucker at five sizes, loss on the validation images"""
    return search(network, example_inputs=torch.randn(EXAMPLE), macs=0.25, evaluate=validation_accuracy)[0]


SHORT: Any = {"epochs": 1, "lr": 0.02}  # what every network gets after its conversion, the dense twin too
SCRATCH = Stage(None, 4, 0.1, warm_up=0.3)
TABLE = (
    Experiment("vgg-dense", "the dense twin, from random weights", "small-vgg", "random", (SCRATCH,), seeds=(0,)),
    Experiment(
        "vgg-dense-longer",
        "the dense twin with the epochs that the compressed ones get: what they are measured against",
        "small-vgg",
        "vgg-dense",
        (Stage(None, **SHORT),),
    ),
    Experiment(
        "vgg-basis-quarter",
        "BasisConv, basis and coefficients trained: MACs ÷ 4 within 1 point",
        "small-vgg",
        "vgg-dense",
        (Stage(BasisConfig(macs=0.25, train_basis=True), **SHORT, orthogonality=1e-3),),
    ),
    Experiment(
        "vgg-layerwise",
        "layer-wise compressive training: most layers 16 times smaller or more, within 1 point",
        "small-vgg",
        "vgg-dense",
        layerwise={"sparsity": 0.6, "bound": 0.01, "prune_epochs": 2, "epochs": 1, "max_steps": 50, "lr": 0.005},
    ),
    Experiment(
        "vgg-prune-tucker",
        "pruning, then Tucker: against each alone at equal MACs",
        "small-vgg",
        "vgg-dense",
        (Stage(PruneConfig(macs=0.6), 1, 0.02, steps=195), Stage(TuckerConfig(macs=0.42), 1, 0.02, steps=195)),
    ),
    Experiment(
        "vgg-tucker",
        "Tucker alone at the MACs of pruning and Tucker",
        "small-vgg",
        "vgg-dense",
        (Stage(TuckerConfig(macs=0.25), **SHORT),),
    ),
    Experiment(
        "vgg-prune",
        "pruning alone at the MACs of pruning and Tucker",
        "small-vgg",
        "vgg-dense",
        (Stage(PruneConfig(macs=0.25), **SHORT),),
    ),
    Experiment(
        "vgg-search",
        "method and size of each layer by search, at the MACs of the single methods",
        "small-vgg",
        "vgg-dense",
        (Stage(searched, **SHORT),),
    ),
    Experiment(
        "vgg-layerwise-third",
        "layer-wise training with a third of the weights pruned: most layers 16 times smaller or more, within 1 point",
        "small-vgg",
        "vgg-dense",
        layerwise={"sparsity": 0.33, "bound": 0.01, "prune_epochs": 2, "epochs": 1, "max_steps": 100, "lr": 0.005},
    ),
    Experiment(
        "vgg-layerwise-slow",
        "the same at a tenth of the learning rate, since the larger one alone broke the bound",
        "small-vgg",
        "vgg-dense",
        layerwise={
            "sparsity": 0.33,
            "bound": 0.01,
            "prune_epochs": 2,
            "epochs": 1,
            "max_steps": 150,
            "prune_lr": 0.001,
            "lr": 0.001,
        },
    ),
    Experiment(
        "vgg-stacked",
        "stacked binary filters: layers 100 times smaller or more",
        "small-vgg",
        "vgg-dense",
        (Stage(StackedBinaryConfig(splits=2, bank=0.5), **SHORT),),
    ),
    Experiment(
        "vgg-basis-fifth-frozen",
        "BasisConv, frozen basis: MACs ÷ 5 and learnable parameters ÷ 18 within 3 points",
        "small-vgg",
        "vgg-dense",
        (Stage(BasisConfig(macs=0.2), **SHORT),),
    ),
    Experiment(
        "vgg-random-orthogonal",
        "frozen random orthogonal bases from scratch: learnable weights of their layers ÷ 18, against the dense twin",
        "small-vgg",
        "random",
        (Stage(random_orthogonal, SCRATCH.epochs, SCRATCH.lr, warm_up=SCRATCH.warm_up),),
    ),
    Experiment(
        "resnet20-basis-quarter",
        "BasisConv, basis and coefficients trained: MACs ÷ 4 within 1 point",
        "resnet20",
        "published",
        (Stage(BasisConfig(macs=0.25, train_basis=True), 4, 0.05, orthogonality=1e-3),),
    ),
    Experiment(
        "vgg-xnor",
        "stacked binary filters and binary activations",
        "small-vgg",
        "vgg-dense",
        (Stage(StackedBinaryConfig(splits=2, bank=0.5, binarize_input=True), **SHORT),),
    ),
    Experiment(
        "resnet56-spectral",
        "spectral fine-tuning at energy 0.63: −64.11 % FLOPs, published 92.95 % (one run) from 93.27 %",
        "resnet56",
        "published",
        (
            Stage(
                BasisConfig(energy=0.63, train_basis=True, basis_norm=True, keep_dense="never"),
                60,
                0.02,
                orthogonality=1e-3,
            ),
        ),
        tier=2,
    ),
)
BY_NAME = {experiment.name: experiment for experiment in TABLE}
