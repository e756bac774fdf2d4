"""What every op asks before it takes the short way of a repeated eager call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ORDINARY = frozenset((Tensor, torch.nn.Parameter))


def undisturbed() -> bool:
    """Whether nothing wants to see or change the calls of torch: no autocast, transform, mode, tracer or compiler.

    Nor its deterministic mode, in which fresh memory is filled.
    """
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch._C._get_deterministic_algorithms()
        or torch.compiler.is_compiling()
    )


def kinds(value: Any) -> Any:
    """Types of an argument and its elements: 1, 1.0 and True are equal, but not all of them are good strides."""
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)
