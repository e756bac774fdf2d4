"""Compile Triton kernels for GPUs that are not there, and read registers, memory and instructions off the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from basisconv_kernels.triton_kernels import basis_conv2d_backward, configs
from basisconv_kernels.triton_kernels.basis_conv2d_descriptors import basis_conv2d_forward_descriptors
from basisconv_kernels.triton_kernels.basis_conv2d_pointers import basis_conv2d_forward_pointers
from basisconv_kernels.triton_kernels.configs import Tile
from basisconv_kernels.triton_kernels.tucker_conv2d import tucker_conv2d_forward
from tests.triton.rows import Row

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "LDSM", "LDGSTS", "LDL", "STL", "FFMA")
# Bytes of shared memory a program, 32-bit registers a multiprocessor.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65_536

TYPES = {configs.HALF: "fp16", configs.TF32: "fp32", configs.FLOAT32: "fp32"}


class Compiled(NamedTuple):
    """What the compiler made of one kernel for one target."""

    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a program
    instructions: dict[str, int]


def compile_for(capability: int, kernel: Any, arguments: Mapping[str, Any], warps: int, stages: int) -> Compiled:
    """Compile a kernel.

    Args:
        capability: 80, 89, 90 or 100.
        arguments: name → type as Triton writes it, ``*fp16`` or ``i32:16`` (a multiple of 16); other values are
            constants.
    """
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str) and re.match(r"\*|i32|tensordesc", value):
            signature[name], _, multiple = value.partition(":")
            if multiple or value[0] == "*":
                attributes[(position,)] = [["tt.divisibility", int(multiple or 16)]]
        else:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(
        source, target=target, options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE)
    counts = {name: found.count(name) for name in INSTRUCTIONS if name in found}
    return Compiled(registers, stack, made.metadata.shared, counts)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


_EPILOGUE = dict.fromkeys(("bias_k", "residual_k", "out_k"), 1)


def forward_pointers(arithmetic: str, tile: Tile, capability: int, **changes: Any) -> Compiled:
    """The pointer kernel on channels_last tensors with C and K multiples of 16, and everything in the epilogue."""
    of = TYPES[arithmetic]
    pointers = dict.fromkeys(("input", "basis", "coefficients", "bias", "residual", "out"), f"*{of}")
    sizes = dict.fromkeys(basis_conv2d_forward_pointers.arg_names, "i32")
    multiples = dict.fromkeys(
        ("C", "K", "input_n", "input_y", "input_x", "basis_q", "basis_r", "basis_s", "residual_n", "residual_y",
         "residual_x", "out_n", "out_y", "out_x"), "i32:16",
    )  # fmt: skip
    constants = {
        "BM": tile.BM, "BQ": tile.BQ, "BK": tile.BK, "BL": tile.BL, "VECTOR": 8 if of == "fp16" else 4,
        "SPLIT": False, "COMPACT": False, "ACTIVATION": "relu", "PRECISE": False,
        "PRECISION": "tf32" if arithmetic == configs.TF32 else "ieee", "mix_q": 1, "GROUPS": 1,
        "WIDE": False,
    }  # fmt: skip
    arguments = {**sizes, **multiples, **pointers, **_EPILOGUE, **constants, **changes}
    return compile_for(capability, basis_conv2d_forward_pointers, arguments, tile.warps, tile.stages)


def forward_descriptors(arithmetic: str, tile: Tile, capability: int, stride: int = 1, **changes: Any) -> Compiled:
    """The descriptor kernel, 3×3, everything in the epilogue."""
    of = TYPES[arithmetic]
    BN, TH, TW = configs.box(tile.BM, 32, 56, 56)
    box = [BN, TH, TW, tile.BK] if stride == 1 else [BN, TH, 1, TW, tile.BK]
    pointers = dict.fromkeys(("coefficients", "bias", "residual", "out"), f"*{of}")
    sizes = dict.fromkeys(basis_conv2d_forward_descriptors.arg_names, "i32")
    multiples = dict.fromkeys(("C", "K", "residual_n", "residual_y", "residual_x", "out_n", "out_y", "out_x"), "i32:16")
    constants = {
        "R": 3, "S": 3, "STRIDE": stride, "BN": BN, "TH": TH, "TW": TW, "BQ": tile.BQ, "BK": tile.BK, "BL": tile.BL,
        "BLOCKS": 2, "FLAT": True, "ACTIVATION": "relu",
        "PRECISION": "tf32" if arithmetic == configs.TF32 else "ieee", "mix_q": 1, "WIDE": False,
        "input": f"tensordesc<{of}{box}>".replace(" ", ""),
        "basis": f"tensordesc<{of}{[tile.BQ, tile.BK]}>".replace(" ", ""),
    }  # fmt: skip
    arguments = {**sizes, **multiples, **pointers, **_EPILOGUE, **constants, **changes}
    return compile_for(capability, basis_conv2d_forward_descriptors, arguments, tile.warps, tile.stages)


def forward(row: Row, capability: int) -> Compiled:
    """The kernel of a row of the table, with as many stages as that device has shared memory for."""
    device = configs.Device((capability // 10, capability % 10), 132, SHARED[capability])
    tile = configs.fitted(row.tile, row.tile.BK, row.tile.BL, row.arithmetic, device)
    if row.path == "pointers":
        return forward_pointers(row.arithmetic, tile, capability)
    return forward_descriptors(row.arithmetic, tile, capability, 2 if row.path == "descriptors2" else 1)


# What changes the code of a forward kernel beside its tile.
FORMS: dict[str, dict[str, Any]] = {
    "bare": {"bias": None, "residual": None, "ACTIVATION": None},
    "relu6": {"ACTIVATION": "relu6"},
    "nchw": {"out_k": "i32", "out_x": 1, "residual_k": "i32", "residual_x": 1},
    "split": {"SPLIT": True, "GROUPS": "i32"},
    "compact": {"SPLIT": True, "COMPACT": True, "GROUPS": "i32"},
    "precise": {"PRECISE": True},
    "wide": {"WIDE": True},
    "unaligned": {"VECTOR": 1, "C": "i32", "input_x": "i32", "input_y": "i32", "input_n": "i32"},
}

GRADIENTS = ("maps", "coefficients", "input", "basis")
# What changes the code of a gradient kernel: sizes that are no multiples of 16, an upstream gradient in NCHW.
_ODD = {**dict.fromkeys(("C", "Q", "K", "input_x", "input_y", "input_n"), "i32"), "VECTOR": 1}
_NCHW = {"gradient_k": "i32", "gradient_x": 1}
GRADIENT_FORMS: dict[str, dict[str, Any]] = {
    "multiples of 16": {},
    "odd sizes": _ODD,
    "nchw": _NCHW,
    "odd sizes, nchw": {**_ODD, **_NCHW},
    "odd sizes, nchw, 16 basis filters": {**_ODD, **_NCHW, "Q": "i32:16", "BQ": 16, "BK": 32},
}


def gradient(name: str, arithmetic: str, capability: int, form: str = "multiples of 16") -> Compiled:
    """One gradient kernel of 64 channels, basis filters and outputs, behind a relu."""
    kernel = getattr(basis_conv2d_backward, f"basis_conv2d_backward_{name}")
    of = TYPES[arithmetic]
    BM, BQ, BC = configs.GRADIENTS[arithmetic]
    aligned = form in ("multiples of 16", "nchw")
    if name == "input":
        BQ = configs.gradient_block(BQ, BQ, aligned)
    if name == "coefficients":
        BC = configs.gradient_block(BC, BC, aligned)
    pointers = ("gradient", "output", "input", "basis", "coefficients", "d_maps", "d_input")
    blocks = {"BM": BM, "BQ": BQ, "BC": BC, "BK": BC, "BL": BC, "VECTOR": 8 if of == "fp16" else 4}
    arguments = {
        **dict.fromkeys(kernel.arg_names, "i32"), **dict.fromkeys(pointers, f"*{of}"), "parts": "*fp32",
        "bias_parts": "*fp32", **dict.fromkeys(("C", "Q", "K", "input_x", "input_y", "input_n"), "i32:16"), **blocks,
        "gradient_k": 1, "output_k": 1, "mix_q": 1, "d_input_c": 1, "ACTIVATION": "relu",
        "PRECISION": configs.input_precision(arithmetic), "WIDE": False, **GRADIENT_FORMS[form],
    }  # fmt: skip
    return compile_for(capability, kernel, arguments, 4, 2)


def tucker_one_pass(arithmetic: str, capability: int, **changes: Any) -> Compiled:
    """The chain in one pass at the largest ranks that it takes, channels_last, everything in the epilogue."""
    of = TYPES[arithmetic]
    rank = configs.LARGEST_RANK // 2 if arithmetic == configs.FLOAT32 else configs.LARGEST_RANK
    BM, BK, BL = configs.ONE_PASS[arithmetic]
    pointers = dict.fromkeys(("input", "u_in", "core", "u_out", "bias", "residual", "out"), f"*{of}")
    sizes = dict.fromkeys(tucker_conv2d_forward.arg_names, "i32")
    multiples = dict.fromkeys(
        (
            "C",
            "rank_in",
            "Q",
            "K",
            "input_n",
            "input_y",
            "input_x",
            "u_c",
            "mix_k",
            "core_q",
            "core_r",
            "core_s",
            "residual_n",
            "residual_y",
            "residual_x",
            "out_n",
            "out_y",
            "out_x",
        ),
        "i32:16",
    )
    constants = {
        "BM": BM, "BI": rank, "BQ": rank, "BK": BK, "BL": BL, "ACTIVATION": "relu", "u_i": 1, "mix_q": 1,
        "core_i": 1, "VECTOR": 8 if of == "fp16" else 4, "CORE_VECTOR": 8 if of == "fp16" else 4,
        "PRECISION": configs.input_precision(arithmetic), "WIDE": False,
    }  # fmt: skip
    arguments = {**sizes, **multiples, **pointers, **_EPILOGUE, **constants, **changes}
    return compile_for(capability, tucker_conv2d_forward, arguments, 4, 3)
