"""What is tried: networks, methods and training budgets. One entry is one question; each is run with several seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from basisconv_kernels import BasisConfig, PruneConfig, StackedBinaryConfig, TuckerConfig
from bench.experiments.experiment import Experiment, Stage, random_orthogonal, searched
from bench.experiments.long import LONG

SHORT: Any = {"epochs": 1, "lr": 0.02}  # what every network gets after its conversion, the dense twin too
SCRATCH = Stage(None, 4, 0.1, warm_up=0.3)
SHORT_TRAININGS = (
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
)
TABLE = (
    *LONG,
    *(e if e.name == "vgg-dense-longer" else replace(e, twin="vgg-dense-longer") for e in SHORT_TRAININGS),
)
BY_NAME = {experiment.name: experiment for experiment in TABLE}
