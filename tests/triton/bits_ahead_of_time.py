"""The kernels of bits compiled for GPUs that are not there: types and constants of what the tests ask for."""

from __future__ import annotations

from typing import Any

from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels._packing import BP, packing_forward
from basisconv_kernels.triton_kernels._signed_conv2d import signed_conv2d_forward
from basisconv_kernels.triton_kernels.binary_conv2d import binary_conv2d_counts
from basisconv_kernels.triton_kernels.bits_configs import BitsTile, most_sums
from tests.triton.ahead_of_time import Compiled, compile_for

ONE = {"bf16": 0x3F80, "fp16": 0x3C00, "fp32": 0}
_MULTIPLES = ("C", "K", "input_n", "input_y", "input_x", "out_n", "out_y", "out_x")

# What changes the code of the products beside tile and dtype.
REAL: dict[str, dict[str, Any]] = {
    "ternary": {"TERNARY": True},
    "ternary, two scales": {"TERNARY": True, "negative_scale": "*bf16", "negative_k": 1},
    "signs": {},
    "stacked": {"index": "*i64"},
    "stacked, splits of 16 channels": {"index": "*i64", "UNIT": 16},
    "stacked, splits of one channel": {"index": "*i64", "UNIT": 1},
    "nchw": {"TERNARY": True, "out_k": "i32", "out_x": 1},
    "wide": {"TERNARY": True, "WIDE": True},
    "groups": {"TERNARY": True, "GROUPS": "i32"},
    "unaligned": {"TERNARY": True, "VECTOR": 1, **dict.fromkeys(("C", "K", "input_x", "input_y", "input_n"), "i32")},
}
REAL["unaligned, nchw, wide"] = {**REAL["nchw"], **REAL["wide"], **REAL["unaligned"]}
# Those whose addresses take more registers, with the largest BM·BL that they are given.
MOST_SUMS = {
    "stacked, splits of one channel": most_sums(16, 1, False, True),
    "nchw": most_sums(16, 32, False, False),
    "wide": most_sums(16, 32, True, True),
    "unaligned": most_sums(2, 32, False, True),
    "unaligned, nchw, wide": most_sums(2, 32, True, False),
}
_WHOLE: dict[str, Any] = {"ONE": ONE["fp16"], "PRECISION": "ieee"}
OF_SIGNS: dict[str, dict[str, Any]] = {
    "float": {"BINARIZE": True},
    "int32": {"BINARIZE": True, "OUTPUT": "int32", "scale": None, "bias": None, "out": "*i32"},
    "packed": {"BINARIZE": True, "OUTPUT": "packed", "scale": None, "bias": None, "out": "*i32", "value": "*i32",
               "flip": "*i1"},
    "plus one": {"BINARIZE": True, "PAD": 1},
}  # fmt: skip
OF_BITS: dict[str, dict[str, Any]] = {
    "signs": {"PLANES": 1, "input": "*i32"},
    "codes": {"PLANES": 2, "CODES": True, "input": "*i32"},
    "the worst": {"PLANES": 4, "CODES": True, "input": "*i32", "index": "*i64", "UNIT": 1, "INPUT_UNIT": 1,
                  "GROUPS": "i32"},
    "signs, groups": {"PLANES": 1, "input": "*i32", "INPUT_UNIT": 4, "GROUPS": "i32"},
}  # fmt: skip
COUNTED: dict[str, dict[str, Any]] = {
    "float": {},
    "int32": {"OUTPUT": "int32", "scale": None, "bias": None, "out": "*i32"},
    "packed": {"OUTPUT": "packed", "scale": None, "bias": None, "out": "*i32", "value": "*i32", "flip": "*i1"},
    "codes": {"CODES": True, "PLANES": 3},
    "groups": {"SHIFTED": True, "GROUPS": "i32"},
    "minus one": {"PAD": -1},
}


def product(arithmetic: str, tile: BitsTile, capability: int, changes: dict[str, Any], of: str = "bf16") -> Compiled:
    """The kernel of ``_signed_conv2d`` on channels_last tensors."""
    of = of if arithmetic == configs.HALF else "fp32"
    arguments: dict[str, Any] = dict.fromkeys(signed_conv2d_forward.arg_names, "i32")
    arguments |= dict.fromkeys(_MULTIPLES, "i32:16") | dict.fromkeys(("input", "scale", "bias", "out"), f"*{of}")
    arguments |= dict.fromkeys(("index", "negative_scale", "pixel_scale", "value", "flip"))
    arguments |= {
        "filters": "*i32", "scale_k": 1, "bias_k": 1, "negative_k": 0, "out_k": 1, "GROUPS": 1, "BM": tile.BM,
        "BL": tile.BL, "BK": tile.BK, "VECTOR": 4 if of == "fp32" else 8, "UNIT": 32, "INPUT_UNIT": 32, "PLANES": 0,
        "CODES": False, "BINARIZE": False, "PAD": 0, "TERNARY": False, "ONE": ONE[of], "OUTPUT": "float",
        "ACTIVATION": "relu", "PRECISION": configs.input_precision(arithmetic), "WIDE": False, **changes,
    }  # fmt: skip
    if "PLANES" in changes or "BINARIZE" in changes:
        arguments |= _WHOLE
    return compile_for(capability, signed_conv2d_forward, arguments, tile.warps, tile.stages)


def counts(tile: BitsTile, capability: int, changes: dict[str, Any]) -> Compiled:
    """The popcount kernel."""
    arguments: dict[str, Any] = dict.fromkeys(binary_conv2d_counts.arg_names, "i32")
    arguments |= dict.fromkeys(("scale", "bias", "out"), "*bf16") | dict.fromkeys(("pixel_scale", "value", "flip"))
    arguments |= {
        "input": "*i32", "filters": "*i32", "scale_k": 1, "bias_k": 1, "out_k": 1, "GROUPS": 1, "BM": tile.BM,
        "BL": tile.BL, "STEP": tile.BK // 32, "PLANES": 1, "CODES": False, "SHIFTED": False, "PAD": 0,
        "OUTPUT": "float", "ACTIVATION": "relu", "WIDE": False, **changes,
    }  # fmt: skip
    return compile_for(capability, binary_conv2d_counts, arguments, tile.warps, tile.stages)


def packing(capability: int, of: str, **changes: Any) -> Compiled:
    """The kernel of ``bitpack`` on a channels_last map."""
    arguments: dict[str, Any] = dict.fromkeys(packing_forward.arg_names, "i32")
    arguments |= {
        "input": f"*{of}", "value": None, "flip": None, "out": "*i32", "input_c": 1, "BP": BP, "PLANES": 1,
        "CODES": False, "WIDE": False, **changes,
    }  # fmt: skip
    return compile_for(capability, packing_forward, arguments, 4, 3)
