"""The correctness matrix of a GPU: every pair of values of two factors occurs in some problem."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from basisconv_kernels.core.problem import Conv2dProblem

FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": ((1, 1), (3, 3), (5, 5), (7, 7), (1, 3)),
    "stride": (1, 2),
    "padding": (0, 1, 2, 3),
    "dilation": (1, 2),
    "map": (7, 13, 14, 28, 57),
    "N": (1, 2, 33),
    "C": (8, 24, 64, 130),
    "Q": (1, 4, 16, 20, 64, 256),
    "K": (1, 10, 64, 257),
    "arithmetic": ("bfloat16", "float16", "TF32", "float32"),
    "channels_last": (True, False),
}
Choice = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def possible(choice: Choice) -> bool:
    """Whether there is an output: the dilated kernel fits into the padded map. Choices may leave factors out."""
    largest = max(choice.get("kernel", (1, 1)))
    reach = (largest - 1) * choice.get("dilation", 1) + 1
    return reach <= choice.get("map", 57) + 2 * choice.get("padding", 3)


def pairs_of(choice: Choice) -> set[Pair]:
    """The pairs of values that a choice has."""
    names = [name for name in FACTORS if name in choice]
    return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}


def all_pairs() -> set[Pair]:
    """Every pair of values that can occur together."""
    found = set()
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            if possible({a: x, b: y}):
                found.add((a, x, b, y))
    return found


def covering(seed: int = 0) -> list[Choice]:
    """Few choices in which all pairs occur: each begins with an open pair, then takes what closes the most others."""
    draw = random.Random(seed)
    left, found = all_pairs(), []
    while left:
        a, x, b, y = min(left, key=repr)
        choice = {a: x, b: y}
        names = [name for name in FACTORS if name not in choice]
        draw.shuffle(names)
        for name in names:
            able = [value for value in FACTORS[name] if possible({**choice, name: value})]
            choice[name] = max(able, key=lambda value: len(pairs_of({**choice, name: value}) & left))
        found.append(choice)
        left -= pairs_of(choice)
    return found


def problem(choice: Choice, device: str) -> Conv2dProblem:
    """The problem of a choice, with all of the epilogue."""
    R, S = choice["kernel"]
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(choice["arithmetic"], torch.float32)
    return Conv2dProblem(
        N=choice["N"], C=choice["C"], H=choice["map"], W=choice["map"], Q=choice["Q"], K=choice["K"], R=R, S=S,
        stride=(choice["stride"],) * 2, padding=(choice["padding"],) * 4, dilation=(choice["dilation"],) * 2,
        channels_last=choice["channels_last"], dtype=dtype, device=device,
        bias=True, residual=True, activation="relu",
    )  # fmt: skip
