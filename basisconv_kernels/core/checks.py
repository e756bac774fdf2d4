"""Checks and normal forms of user arguments; every error names op, argument, expected, got and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (None, "relu", "relu6")

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def pair(op: str, name: str, value: Any, *, at_least: int) -> Pair:
    """An int or two ints → (vertical, horizontal), each at least ``at_least``."""
    values = (value, value) if _is_int(value) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2 or not all(map(_is_int, values)):
        raise TypeError(f"{op}: {name} must be an int or two ints (vertical, horizontal), got {value!r}")
    if values[0] < at_least or values[1] < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value!r}")
    return (values[0], values[1])


def padding4(op: str, value: Any, kernel: Pair, stride: Pair, dilation: Pair) -> Quad:
    """Any accepted form of padding → (top, bottom, left, right).

    Accepted: an int; (vertical, horizontal); (top, bottom, left, right); ``"valid"``; ``"same"`` (stride 1 only; the
    odd excess goes to the bottom and the right, as in PyTorch).
    """
    if isinstance(value, str):
        if value == "valid":
            return (0, 0, 0, 0)
        if value != "same":
            raise ValueError(f"{op}: padding must be 'same', 'valid' or numbers, got {value!r}")
        if stride != (1, 1):
            raise ValueError(
                f"{op}: padding='same' needs stride 1, got stride {stride}; give the padding as numbers instead"
            )
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    if _is_int(value):
        values: tuple[int, ...] = (value,) * 4
    elif isinstance(value, Sequence) and len(value) in (2, 4) and all(map(_is_int, value)):
        values = tuple(value) if len(value) == 4 else (value[0], value[0], value[1], value[1])
    else:
        raise TypeError(
            f"{op}: padding must be an int, (vertical, horizontal), (top, bottom, left, right), 'same' or 'valid', "
            f"got {value!r}"
        )
    if min(values) < 0:
        raise ValueError(f"{op}: padding must not be negative, got {value!r}; slice the input to crop it")
    return (values[0], values[1], values[2], values[3])


def output_size(op: str, size: Pair, kernel: Pair, stride: Pair, padding: Quad, dilation: Pair) -> Pair:
    """Height and width of the convolution's output; a ValueError where nothing would be left."""
    padded = (size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3])
    reach = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(
            f"{op}: the padded input {padded[0]}×{padded[1]} is smaller than the dilated kernel {reach[0]}×{reach[1]}, "
            "so no output pixel exists; add padding or use a larger input"
        )
    return ((padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1)


def activation(op: str, value: Any) -> None:
    """Refuse an activation that is not None, "relu" or "relu6"."""
    if value not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None, 'relu' or 'relu6', got {value!r}")


def tensor(op: str, name: str, value: Any, dim: int, layout: str) -> None:
    """Refuse what is not a dense tensor of ``dim`` dimensions; ``layout`` is the readable shape, as in ``[K, Q]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor {layout}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}; call .to_dense() first")
    if value.dim() != dim:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(value.shape)}")


def same_kind(op: str, first_name: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    """Refuse unsupported or mixed dtypes and mixed devices; ``first`` is the measure."""
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {first_name} must be float32, bfloat16, float16 or float64, got {first.dtype}")
    for name, value in others.items():
        if value is None:
            continue
        if value.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {value.dtype}; "
                "convert one of them, or use torch.autocast"
            )
        if value.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}, got {value.device}; "
                "move one of them"
            )
