"""What is measured: cases, the suites they stand in, and the targets they are judged by. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["layer", "linear", "network", "training", "memory"]
Form = Literal["fused", "two_step", "dense", "int8", "binary"]
Statistic = Literal["geomean", "each", "rate", "share_of_predicted", "memory"]

FORMS: tuple[Form, ...] = ("fused", "two_step", "dense")
"""``fused``: the shared basis and the recombination in one call. ``two_step``: the same weights as two convolutions.
``dense``: the convolution that both replace. Of binary, stacked and ternary cases ``fused`` is the one call of our op;
some have ``int8``, a convolution of the same shape on 8-bit codes, or ``binary``, the same signs in another engine."""

PLAIN: tuple[Form, ...] = ("two_step", "dense")
"""What engines without kernels of this kind compute."""


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
        problem: shapes of a ``layer``, ``training`` or ``memory`` case, in the words of its op.
        forms: the forms that exist for it.
        tags: what targets select by.
        linear: (N, inputs, outputs) of a ``linear`` case.
        network, batch: of a ``network`` case.
        parts: the layers of a ``network`` case.
        frozen: ``training`` without a gradient of the basis.
        op: of bits.OPS; empty for basis_conv2d.
        density: share of weights that are not zero, of ternary cases.
    """

    id: str
    kind: Kind
    problem: Any = None
    forms: tuple[Form, ...] = FORMS
    tags: frozenset[str] = frozenset()
    linear: tuple[int, int, int] | None = None
    network: str | None = None
    batch: int = 1
    parts: tuple[Part, ...] = ()
    frozen: bool = False
    op: str = ""
    density: float = 1.0


@dataclass(frozen=True)
class Target:
    """A bar set before anything was measured.

    Attributes:
        name: as printed.
        statistic: ``geomean`` of the ratios of all cases; ``each`` case alone; ``rate``: 10⁹ multiply-accumulates a
            second of ours in each case; ``share_of_predicted``: measured
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
