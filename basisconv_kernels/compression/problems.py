"""Problems of the ops with filters of bits, from words and from layers: what ``explain`` and ``tune`` speak about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core import checks
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor, words_for
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.stacked_binary_conv2d_fit import stored_bytes
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_form
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem

BitProblem = BinaryConv2dProblem | StackedBinaryConv2dProblem | TernaryConv2dProblem
BitLayer = BinaryConv2d | StackedBinaryConv2d | TernaryConv2d
BITS = ("binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")
BIT_LAYERS = (BinaryConv2d, StackedBinaryConv2d, TernaryConv2d)
SCALES = ("none", "one", "two")
# What says more of a call than its sizes and geometry, and of which op.
TRAITS = {
    "bank": "stacked_binary_conv2d",
    "splits": "stacked_binary_conv2d",
    "signs": "stacked_binary_conv2d",
    "packed": "binary_conv2d",
    "bits_out": "binary_conv2d",
    "scales": "ternary_conv2d",
}


def op_of(problem: BitProblem) -> str:
    """The op that a problem is of."""
    kinds = (BinaryConv2dProblem, StackedBinaryConv2dProblem, TernaryConv2dProblem)
    return dict(zip(kinds, BITS, strict=True))[type(problem)]


def bit_problem(op: str, common: Mapping[str, Any], traits: Mapping[str, int]) -> BitProblem:
    """A problem in normal form, checked as the op checks its arguments.

    Args:
        op: one of ``BITS``.
        common: N, C, H, W, K, R, S, stride, padding (any form), dilation, groups, and what else the problem has.
        traits: ``bank`` and ``splits``, ``signs`` (whether the input's signs are taken); ``packed`` and ``bits_out``
            (whether input and result are packed signs); ``scales`` (how many scale an output, 0 to 2).

    Raises:
        ValueError: what does not fit.
    """
    foreign = [name for name, owner in TRAITS.items() if name in traits and owner != op]
    if foreign:
        raise ValueError(f"{op}: {foreign[0]} belongs to {TRAITS[foreign[0]]}")
    values: dict[str, Any] = dict(common)
    groups, splits = values["groups"], traits.get("splits", 1)
    for name, divisor, what in (("C", groups * splits, "groups·splits"), ("K", groups, "groups")):
        if groups < 1 or splits < 1 or values[name] % divisor:
            raise ValueError(f"{op}: {name} = {values[name]} must be divisible by {what} = {divisor}")
    kernel = (values["R"], values["S"])
    values["padding"] = checks.padding4(op, values["padding"], kernel, values["stride"], values["dilation"])
    made: BitProblem
    if op == "stacked_binary_conv2d":
        mode = "signs" if traits.get("signs") else "real"
        made = StackedBinaryConv2dProblem(**values, n=traits.get("bank", values["K"]), splits=splits, mode=mode)
    elif op == "ternary_conv2d":
        count = traits.get("scales", 1)
        if not 0 <= count < len(SCALES):
            raise ValueError(f"{op}: scales must be 0, 1 or 2, got {count}")
        made = TernaryConv2dProblem(**values, scales=SCALES[count])
    elif op == "binary_conv2d":
        packed = bool(traits.get("packed"))
        values["channels_last"] = packed or values.get("channels_last", False)
        output = "packed" if traits.get("bits_out") else "float"
        made = BinaryConv2dProblem(**values, planes=int(packed), output=output)
    else:
        raise ValueError(f"problems: op must be one of {', '.join(BITS)}, got {op!r}")
    _ = made.output_size  # a ValueError where the map is smaller than the kernel
    return made


def problem_of_options(
    op: str,
    sizes: tuple[int, ...],
    shared: Mapping[str, Any],
    traits: Mapping[str, int | None],
    flags: Mapping[str, bool],
) -> Any:
    """The problem that the options of ``explain`` state, in normal form and checked as the op checks its arguments.

    Args:
        op: its name.
        sizes: N, C, H, W, K, R, S.
        shared: what all problems have.
        traits, flags: what some have; an option that is not given is None or False.

    Raises:
        ValueError: an option of another op, or numbers that do not fit.
    """
    N, C, H, W, K, R, S = sizes
    common: dict[str, Any] = {"N": N, "C": C, "H": H, "W": W, "K": K, "R": R, "S": S, **shared}
    given = {name: value for name, value in traits.items() if value is not None}
    given |= {name: 1 for name, value in flags.items() if value}
    if op in BITS:
        if op == "ternary_conv2d" and given.pop("bias", 0):
            common["bias"] = True
        given.pop("bias", None)  # of no interest to the choice
        foreign = sorted(set(given) - set(TRAITS))
        if foreign:
            raise ValueError(f"{op}: --{foreign[0].replace('_', '-')} belongs to basis_conv2d and tucker_conv2d")
        return bit_problem(op, common, given)
    foreign = sorted(set(given) & set(TRAITS))
    if foreign:
        raise ValueError(f"{op}: --{foreign[0].replace('_', '-')} belongs to {TRAITS[foreign[0]]}")
    if "basis_channels" not in given:
        raise ValueError(f"{op}: --basis-channels must be given, the number of basis filters Q")
    groups, Q = shared["groups"], given["basis_channels"]
    for name, value in (("C", C), ("Q", Q), *((("K", K),) if "compact" in given else ())):
        if value % groups:
            raise ValueError(f"{op}: {name} = {value} must be divisible by groups = {groups}")
    if ("rank_in" in given) != (op == "tucker_conv2d") or (op == "tucker_conv2d" and groups > 1):
        raise ValueError(f"{op}: --rank-in belongs to tucker_conv2d, which needs it and has no groups")
    common["padding"] = checks.padding4(op, shared["padding"], (R, S), shared["stride"], shared["dilation"])
    booleans: dict[str, Any] = {name: name in given for name in ("compact", "residual", "precise", "bias")}
    if op == "tucker_conv2d":
        return TuckerConv2dProblem(**common, **booleans, Q=Q, rank_in=given["rank_in"])
    return Conv2dProblem(**common, **booleans, Q=Q)


def of_layer(layer: BitLayer, input: Tensor | PackedTensor) -> BitProblem:
    """The problem of a call of a layer."""
    N, C, H, W = input.shape
    padding = layer.padding if isinstance(layer, BinaryConv2d) else layer.pad_amounts
    if layer.padding_mode != "zeros":  # the layer pads before the op
        top, bottom, left, right = padding
        H, W, padding = H + top + bottom, W + left + right, (0, 0, 0, 0)
    packed = isinstance(input, PackedTensor)
    like = next((t for t in layer.parameters() if t.is_floating_point()), None)
    dtype = input.dtype if isinstance(input, Tensor) else None if like is None else like.dtype
    common: dict[str, Any] = {
        "N": N, "C": C, "H": H, "W": W, "K": layer.out_channels, "R": layer.kernel_size[0], "S": layer.kernel_size[1],
        "stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups,
        "device": input.device.type, "activation": layer.activation,
        "channels_last": isinstance(input, PackedTensor) or memory_format(input) is torch.channels_last,
    }  # fmt: skip
    if dtype is not None:
        common["dtype"] = dtype
    if isinstance(layer, StackedBinaryConv2d):
        traits = {"bank": layer.bank, "splits": layer.splits, "signs": int(layer.binarize_input or packed)}
        return bit_problem("stacked_binary_conv2d", common, traits)
    if isinstance(layer, BinaryConv2d):
        bits_in = packed or layer.input_threshold_value is not None
        traits = {"packed": int(bits_in), "bits_out": int(layer.threshold_value is not None)}
        return bit_problem("binary_conv2d", common | {"padding_value": layer.padding_value}, traits)
    return bit_problem("ternary_conv2d", common | {"bias": layer.bias is not None}, {"scales": _scales(layer)})


def _scales(layer: TernaryConv2d) -> int:
    return 2 if layer.rule == "ttq" else 1


def bit_layers(model: nn.Module) -> list[BitLayer]:
    """The layers of a network that such problems come from."""
    return [module for module in model.modules() if isinstance(module, BIT_LAYERS)]


def cost(problem: BitProblem) -> dict[str, Any]:
    """Operations and bytes of the filters, for ``explain``.

    Returns:
        dict: ``operations``: additions of a real input, pairs of signs; ``stored_bytes``: of the filters as bits;
        ``form``: of a stacked problem, "stacked" or "expanded".
    """
    words = problem.K * problem.R * problem.S * words_for(problem.C // problem.groups)
    form, stored = None, 4 * words
    if isinstance(problem, StackedBinaryConv2dProblem):
        form = stacked_binary_conv2d_form(*problem.shapes)
        stored = stored_bytes(*problem.shapes[0], *problem.shapes[1])
        operations = problem.adds() if form == "stacked" else problem.dense_macs()
    else:
        operations = problem.macs()
        stored = 8 * words if isinstance(problem, TernaryConv2dProblem) else stored
    return {"operations": operations, "stored_bytes": stored, "form": form}
