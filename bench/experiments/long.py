"""Trainings of tens of epochs, which need a GPU."""

from __future__ import annotations

from typing import Any

from basisconv_kernels import BasisConfig, BinaryConfig, PruneConfig, StackedBinaryConfig, TuckerConfig
from bench.experiments.experiment import Experiment, Stage, random_orthogonal

CYCLE = Stage(None, 24, 0.1, warm_up=0.2)  # of a network with random weights
AGAIN: Any = {"epochs": 12, "lr": 0.05, "warm_up": 0.05}  # after a conversion; the dense twin gets it too
PUBLISHED: Any = {"epochs": 15, "lr": 0.05, "warm_up": 0.05}  # the same, of published weights
LARGE: Any = {"epochs": 12, "lr": 0.1, "warm_up": 0.1}  # with 256 images a step, so twice the rate
TAUGHT: Any = {"orthogonality": 1e-3, "distill": 0.9}
BITS: Any = {"epochs": 15, "lr": 1e-3, "warm_up": 0.05, "optimizer": "adam"}


def _at(macs: float, network: str = "vgg", kind: str = "small-vgg", tier: int = 1) -> tuple[Experiment, ...]:
    """Pruning, Tucker and the two together at one share of the MACs: whose accuracies are equal tells the gain."""
    share = f"{100 * macs:.0f}"
    prune, tucker = Stage(PruneConfig(macs=macs), **AGAIN), Stage(TuckerConfig(macs=macs), **AGAIN)
    kept = round(macs**0.4, 2)  # of the MACs after pruning; Tucker takes the rest
    half = AGAIN | {"epochs": AGAIN["epochs"] // 2}
    both = (Stage(PruneConfig(macs=kept), **half), Stage(TuckerConfig(macs=round(macs / kept, 3)), **half))
    question = "pruning, Tucker, or both at {} % of the MACs: which needs fewest at one accuracy"
    return tuple(
        Experiment(
            f"{network}-{name}-{share}",
            question.format(share),
            kind,
            f"{network}-cycle",
            stages,
            tier=tier,
            twin=f"{network}-cycle-more",
        )
        for name, stages in (("prune", (prune,)), ("tucker", (tucker,)), ("prune-tucker", both))
    )


def _dense(network: str) -> tuple[Experiment, ...]:
    """A large network from random weights, and with the epochs that the compressed ones get."""
    start = f"{network}-cycle"
    return (
        Experiment(start, "the dense network, from random weights", network, "random", (CYCLE,), tier=2, seeds=(0,)),
        Experiment(
            f"{start}-more",
            f"the dense twin: {start} with the epochs that the compressed ones get",
            network,
            start,
            (Stage(None, **AGAIN),),
            tier=2,
        ),
    )


LONG = (
    Experiment("vgg-cycle", "the dense network, from random weights", "small-vgg", "random", (CYCLE,)),
    Experiment(
        "wide-cycle", "the wider dense network, from random weights", "wide-vgg", "random", (CYCLE,), seeds=(0,)
    ),
    Experiment(
        "resnet56-spectral",
        "spectral fine-tuning at energy 0.63: −64.11 % FLOPs, published 92.95 % (one run) from 93.27 %",
        "resnet56",
        "published",
        (
            Stage(
                BasisConfig(energy=0.63, train_basis=True, basis_norm=True, keep_dense="never"),
                **LARGE,
                orthogonality=1e-3,
            ),
        ),
        tier=2,
        batch=256,
    ),
    Experiment(
        "resnet20-quarter",
        "BasisConv, basis and coefficients trained: MACs ÷ 4 within 1 point",
        "resnet20",
        "published",
        (Stage(BasisConfig(macs=0.25, train_basis=True, basis_norm=True), **PUBLISHED, orthogonality=1e-3),),
        twin="resnet20-more",
    ),
    Experiment(
        "resnet20-quarter-distilled",
        "the same, taught by the dense start: one point more than without",
        "resnet20",
        "published",
        (Stage(BasisConfig(macs=0.25, train_basis=True, basis_norm=True), **PUBLISHED, **TAUGHT),),
        twin="resnet20-more",
    ),
    Experiment(
        "resnet20-fifth-frozen",
        "BasisConv, frozen basis: MACs ÷ 5 and learnable parameters ÷ 18 within 3 points",
        "resnet20",
        "published",
        (Stage(BasisConfig(macs=0.2, basis_norm=True), **PUBLISHED),),
        twin="resnet20-more",
    ),
    Experiment(
        "resnet20-more",
        "the dense twin: published weights with the epochs that the compressed ones get",
        "resnet20",
        "published",
        (Stage(None, **PUBLISHED),),
    ),
    Experiment(
        "vgg-cycle-more",
        "the dense twin: vgg-cycle with the epochs that the compressed ones get",
        "small-vgg",
        "vgg-cycle",
        (Stage(None, **AGAIN),),
    ),
    Experiment(
        "vgg-quarter",
        "BasisConv, basis and coefficients trained: MACs ÷ 4 within 1 point",
        "small-vgg",
        "vgg-cycle",
        (Stage(BasisConfig(macs=0.25, train_basis=True, basis_norm=True), **AGAIN, orthogonality=1e-3),),
        twin="vgg-cycle-more",
    ),
    Experiment(
        "vgg-quarter-distilled",
        "the same, taught by the dense start: one point more than without",
        "small-vgg",
        "vgg-cycle",
        (Stage(BasisConfig(macs=0.25, train_basis=True, basis_norm=True), **AGAIN, **TAUGHT),),
        twin="vgg-cycle-more",
    ),
    Experiment(
        "vgg-fifth-frozen",
        "BasisConv, frozen basis: MACs ÷ 5 and learnable parameters ÷ 18 within 3 points",
        "small-vgg",
        "vgg-cycle",
        (Stage(BasisConfig(macs=0.2, basis_norm=True), **AGAIN),),
        twin="vgg-cycle-more",
    ),
    Experiment(
        "vgg-ternary",
        "layer-wise compressive training: most layers 16 times smaller or more, within 1 point",
        "small-vgg",
        "vgg-cycle",
        layerwise={"sparsity": 0.5, "bound": 0.01, "prune_epochs": 6, "epochs": 5, "prune_lr": 0.002, "lr": 0.001},
        twin="vgg-cycle-more",
    ),
    Experiment(
        "vgg-orthogonal",
        "frozen random orthogonal bases from scratch, K/2 filters, against the dense twin from scratch",
        "small-vgg",
        "random",
        (Stage(random_orthogonal, CYCLE.epochs, CYCLE.lr, warm_up=CYCLE.warm_up),),
        twin="vgg-cycle",
    ),
    Experiment(
        "wide-stacked",
        "stacked binary filters from a bank of K/2 in 2 splits: layers 100 times smaller or more",
        "wide-vgg",
        "wide-cycle",
        (Stage(StackedBinaryConfig(splits=2, bank=0.5), **BITS),),
    ),
    Experiment(
        "wide-xnor",
        "XNOR: signs of inputs behind a BatchNorm, and of filters",
        "wide-vgg",
        "wide-cycle",
        (Stage(BinaryConfig(), **BITS),),
    ),
    *_at(0.25),
    *_at(0.4),
    *_at(0.15),
    *_dense("vgg16"),
    Experiment(
        "vgg16-quarter",
        "BasisConv, basis and coefficients trained: a quarter of the MACs; its paper has ÷ 3.99",
        "vgg16",
        "vgg16-cycle",
        (Stage(BasisConfig(macs=0.25, train_basis=True, basis_norm=True), **AGAIN, orthogonality=1e-3),),
        tier=2,
        twin="vgg16-cycle-more",
    ),
    *_at(0.25, "vgg16", "vgg16", tier=2),
    *_dense("googlenet"),
    *_at(0.4, "googlenet", "googlenet", tier=2),
)
