"""``basisconv tune``: which problems to measure, and measuring all of them; the table is that of ``core.tuning``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels import testing
from basisconv_kernels.compression import tune_bits
from basisconv_kernels.compression.problems import (
    BITS,
    TRAITS,
    BitLayer,
    BitProblem,
    bit_layers,
    bit_problem,
    of_layer,
)
from basisconv_kernels.compression.survey import evaluating, watching
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
from basisconv_kernels.ops import basis_conv2d_tuning, tucker_conv2d_tuning

Problem = Conv2dProblem | BitProblem
SIZES = ("N", "C", "H", "W", "Q", "K", "R", "S")
OTHERS = ("rank_in", "stride", "padding", "dilation", "groups")
LAYOUTS = ("both", "channels_last", "nchw")


def default_problems() -> list[Problem]:
    """The layers by which the package judges its own speed, with a bias."""
    return [replace(case.problem, bias=True) for case in testing.PERFORMANCE_CASES]


def parse_problem(text: str) -> Problem:
    """``N=8,C=64,H=56,W=56,Q=16,K=64,R=3,padding=1`` → a problem; S is R, stride, dilation and groups 1, padding 0.

    With ``rank_in=16`` it is one of ``tucker_conv2d``, and Q is rank_out. ``op=binary_conv2d``,
    ``op=stacked_binary_conv2d`` and ``op=ternary_conv2d`` in front: of these, without Q, and with ``problems.TRAITS``.

    Raises:
        ValueError: another form, an unknown or a missing key.
    """
    pairs = [part.partition("=") for part in re.split(r"[,\s]+", text.strip()) if part]
    op = pairs.pop(0)[2] if pairs and pairs[0][0] == "op" else ""
    if op and op not in BITS:
        raise ValueError(f"tune: op must be one of {', '.join(BITS)}, got {op!r}; others are told by Q and rank_in")
    known = (*(size for size in SIZES if not op or size != "Q"), *OTHERS, *(TRAITS if op else ()))
    values = {}
    for key, equals, number in pairs:
        if key not in known or not equals or not number.isdecimal():
            raise ValueError(
                f"tune: a problem reads N=8,C=64,H=56,W=56,Q=16,K=64,R=3,padding=1, got {text!r} at {key!r}"
            )
        values[key] = int(number)
    values.setdefault("S", values.get("R", 0))
    lacking = [key for key in SIZES if not values.get(key) and (key != "Q" or not op)]
    if lacking:
        raise ValueError(f"tune: the problem {text!r} lacks {', '.join(lacking)}")

    def pair(key: str, default: int) -> Pair:
        return (values.get(key, default),) * 2

    around: Quad = (values.get("padding", 0),) * 4
    sizes: dict[str, Any] = {key: values[key] for key in SIZES if key in values}
    geometry: dict[str, Any] = {"stride": pair("stride", 1), "dilation": pair("dilation", 1), "padding": around}
    geometry["groups"] = values.get("groups", 1)
    if op:
        traits = {key: values[key] for key in TRAITS if key in values}
        return bit_problem(op, sizes | geometry, traits)
    chain: dict[str, Any] = {"rank_in": values["rank_in"]} if values.get("rank_in") else {}
    if chain and geometry["groups"] != 1:
        raise ValueError(f"tune: tucker_conv2d, which rank_in stands for, has no groups, got {text!r}")
    kind = TuckerConv2dProblem if chain else Conv2dProblem
    problem = kind(**sizes, **geometry, **chain, bias=True)
    if problem.groups < 1 or problem.C % problem.groups or problem.Q % problem.groups:
        raise ValueError(f"tune: C and Q must be divisible by groups, got {text!r}")
    if min(*problem.stride, *problem.dilation) < 1:
        raise ValueError(f"tune: stride and dilation must be at least 1, got {text!r}")
    _ = problem.output_size  # a ValueError where the map is smaller than the kernel
    return problem


def model_problems(model: nn.Module, example: Tensor) -> list[Problem]:
    """The problems of the layers of this package in a network on these images, each once.

    Raises:
        ValueError: the network has no such layer.
    """
    found: dict[Problem, None] = {}

    def watcher_for(layer: BasisConv2d | TuckerConv2d) -> Callable[[Tensor, Tensor], None]:
        return lambda input, output: found.setdefault(_problem_of(layer, input))

    def bit_watcher_for(layer: BitLayer) -> Callable[[Tensor, Tensor], None]:
        return lambda input, output: found.setdefault(of_layer(layer, input))

    layers: dict[nn.Module, Callable[[Tensor, Tensor], None]] = {
        module: watcher_for(module) for module in model.modules() if isinstance(module, (BasisConv2d, TuckerConv2d))
    }
    layers |= {layer: bit_watcher_for(layer) for layer in bit_layers(model)}
    if not layers:
        raise ValueError("tune: no layer of the network became a BasisConv2d; raise --fraction, or give --problem")
    with evaluating(model), watching(layers):
        model(example)
    return list(found)


def _problem_of(layer: BasisConv2d | TuckerConv2d, input: Tensor) -> Conv2dProblem:
    N, C, H, W = input.shape
    padding = layer.pad_amounts
    if layer.padding_mode != "zeros":  # the layer pads before the op
        top, bottom, left, right = padding
        H, W, padding = H + top + bottom, W + left + right, (0, 0, 0, 0)
    common: dict[str, Any] = {
        "N": N, "C": C, "H": H, "W": W, "stride": layer.stride, "padding": padding, "dilation": layer.dilation,
        "dtype": input.dtype, "device": input.device.type, "bias": layer.bias is not None,
        "activation": layer.activation, "precise": layer.precise,
    }  # fmt: skip
    if isinstance(layer, TuckerConv2d):
        rank_out, rank_in, R, S = layer.core.shape
        return TuckerConv2dProblem(**common, Q=rank_out, rank_in=rank_in, K=layer.out_channels, R=R, S=S)
    Q, _, R, S = layer.basis_weight.shape
    K, mixed = layer.coefficients.shape
    return Conv2dProblem(**common, Q=Q, K=K, R=R, S=S, groups=layer.groups, compact=mixed != Q)


def variants(problems: Sequence[Problem], layout: str, dtype: torch.dtype, device: str = "cpu") -> list[Problem]:
    """The problems at a dtype and in one memory format, or each in both: the choice of a backend sees both facts.

    Packed maps have one format.

    Raises:
        ValueError: filters of bits on a GPU.
    """
    bits = [p for p in problems if not isinstance(p, Conv2dProblem)]
    if device != "cpu" and bits:
        raise ValueError(f"tune: filters of bits are measured on the processor alone, got {bits[0]} on {device}")
    formats = {"both": (True, False), "channels_last": (True,), "nchw": (False,)}[layout]
    found = [
        replace(p, dtype=dtype, device=device, channels_last=last or bool(getattr(p, "planes", 0)))
        for p in dict.fromkeys(problems)
        for last in formats
    ]
    return list(dict.fromkeys(found))


def tune(
    problems: Sequence[Problem], seconds: float, progress: Callable[[float], None] | None = None
) -> list[dict[str, Any]]:
    """Measure problems; the entries of a table.

    Args:
        problems: all on one device.
        seconds: for each problem.
        progress: called before each problem with the share done, 0..1.
    """
    entries = []
    for done, problem in enumerate(problems):
        if progress is not None:
            progress(done / len(problems))
        if not isinstance(problem, Conv2dProblem):
            entries.append(tune_bits.measure(problem, seconds))
            continue
        op = tucker_conv2d_tuning if isinstance(problem, TuckerConv2dProblem) else basis_conv2d_tuning
        if problem.device == "cuda":
            entries += op.measure_on_gpu(problem, seconds)
        else:
            entries.append(op.measure(problem, seconds))
    return entries
