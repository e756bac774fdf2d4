"""What is measured: cases, the suites they stand in, and the targets they are judged by. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from basisconv_kernels.core.problem import Conv2dProblem

Kind = Literal["layer", "linear", "network", "training", "memory"]
Form = Literal["fused", "two_step", "dense"]
Statistic = Literal["geomean", "each", "share_of_predicted", "memory"]

FORMS: tuple[Form, ...] = ("fused", "two_step", "dense")
"""``fused``: the shared basis and the recombination in one call. ``two_step``: the same weights as two convolutions.
``dense``: the convolution that both replace."""


@dataclass(frozen=True)
class Part:
    """A layer of a network: which case measures it, how often it occurs, whether the conversion replaces it."""

    case: str
    count: int
    converted: bool


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        id: readable and unique inside a suite.
        kind: ``layer`` one convolution; ``linear`` one linear layer; ``network`` a whole network; ``training`` forward
            and backward of one convolution; ``memory`` peak memory of one convolution instead of its time.
        problem: shapes of a ``layer``, ``training`` or ``memory`` case.
        forms: the forms that exist for it.
        tags: what targets select by.
        linear: (N, inputs, outputs) of a ``linear`` case.
        network, batch: of a ``network`` case.
        parts: the layers of a ``network`` case.
        frozen: ``training`` without a gradient of the basis.
    """

    id: str
    kind: Kind
    problem: Conv2dProblem | None = None
    forms: tuple[Form, ...] = FORMS
    tags: frozenset[str] = frozenset()
    linear: tuple[int, int, int] | None = None
    network: str | None = None
    batch: int = 1
    parts: tuple[Part, ...] = ()
    frozen: bool = False


@dataclass(frozen=True)
class Target:
    """A bar set before anything was measured.

    Attributes:
        name: as printed.
        statistic: ``geomean`` of the ratios of all cases; ``each`` case alone; ``share_of_predicted``: measured
            speed-up of a network over the one its layers predict; ``memory``: see ``harness/memory.py``.
        must, stretch: least values; for ratios, rival's time over ours. None: no bar.
        tag: the cases it judges; empty selects all of the suite.
        rivals: the engines whose best counts.
        against: the form of the rivals.
    """

    name: str
    statistic: Statistic
    must: float | None
    stretch: float | None = None
    tag: str = ""
    rivals: tuple[str, ...] = ()
    against: Form = "two_step"


@dataclass(frozen=True)
class Suite:
    """Cases measured alike and judged together."""

    name: str
    title: str
    cases: tuple[Case, ...]
    engines: tuple[str, ...]
    targets: tuple[Target, ...] = field(default=())
