"""What is tried: networks, methods and training budgets. One entry is one question; each is run with several seeds."""

from __future__ import annotations

from typing import Any

from basisconv_kernels import TuckerConfig
from bench.experiments.experiment import Experiment, Stage, searched
from bench.experiments.long import LONG

SHORT: Any = {"epochs": 1, "lr": 0.02}  # what every network gets after its conversion, the dense twin too
SEARCH = (  # short, and on a processor: the network of four epochs, search, and what it is held against
    Experiment(
        "vgg-dense",
        "the dense network of the search, from random weights",
        "small-vgg",
        "random",
        (Stage(None, 4, 0.1, warm_up=0.3),),
        seeds=(0,),
        twin="vgg-dense-longer",
    ),
    Experiment(
        "vgg-dense-longer",
        "the dense twin of the search: vgg-dense with the epoch that the compressed ones get",
        "small-vgg",
        "vgg-dense",
        (Stage(None, **SHORT),),
    ),
    Experiment(
        "vgg-tucker",
        "Tucker alone at the MACs of the search, ranks by energy",
        "small-vgg",
        "vgg-dense",
        (Stage(TuckerConfig(macs=0.25), **SHORT),),
        twin="vgg-dense-longer",
    ),
    Experiment(
        "vgg-search",
        "method and size of each layer by search, against Tucker alone at equal MACs",
        "small-vgg",
        "vgg-dense",
        (Stage(searched, **SHORT),),
        twin="vgg-dense-longer",
    ),
)
TABLE = (*LONG, *SEARCH)
BY_NAME = {experiment.name: experiment for experiment in TABLE}
