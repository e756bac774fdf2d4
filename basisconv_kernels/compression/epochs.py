"""One pass through a loader whose order depends on a seed and the pass alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch


def seed_of(seed: int, stage: int, epoch: int) -> int:
    """The seed of one epoch of one stage of a run; stages count from −1, epochs from 0."""
    return (seed * 1_000_003 + (stage + 1) * 1_009 + epoch) % 2**31


def begin(loader: Any, seed: int) -> Iterable[Any]:
    """Set PyTorch's and Python's random numbers and those of the loader; returns what to run through.

    Args:
        loader: an iterable that can be run through once an epoch; its ``generator``, where it has one, is seeded, as
            DataLoaders have it. A callable that is no iterable is called with the seed and returns the iterable.
        seed: of this epoch.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    if callable(loader) and not hasattr(loader, "__iter__"):
        made: Iterable[Any] = loader(seed)
        return made
    if isinstance(getattr(loader, "generator", None), torch.Generator):
        loader.generator.manual_seed(seed)
    return loader
