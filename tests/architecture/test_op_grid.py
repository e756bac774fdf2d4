"""One op, one file of the same name in every starred folder; what does not exist yet stands in one list."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = ("bitpack", "basis_conv2d", "tucker_conv2d", "binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")
STARRED = (
    "basisconv_kernels/reference/{op}.py",
    "basisconv_kernels/ops/{op}.py",
    "basisconv_kernels/layers/{op}.py",
    "csrc/ops/{op}.h",
    "csrc/ops/{op}.cpp",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "triton_kernels/{op}.py",
    "tests/ops/test_{op}.py",
)
NEVER = {"basisconv_kernels/layers/bitpack.py"}  # packing has no parameters

LATER = "basis_conv2d came first, complete from kernel to demo"
BY_THE_BASIS_KERNEL = "its last two stages are the kernel of basis_conv2d, its first a 1×1 of PyTorch"

# What exists of the ops that came later.
HERE = {
    pattern.format(op=op)
    for op in ("bitpack", "binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")
    for pattern in STARRED
    if "cuda" not in pattern and "triton" not in pattern
} | {
    "csrc/cuda/bitpack.cu",
    "csrc/cuda/binary_conv2d.cu",
    "csrc/cuda/ternary_conv2d.cu",
    "basisconv_kernels/reference/tucker_conv2d.py",
    "basisconv_kernels/ops/tucker_conv2d.py",
    "basisconv_kernels/layers/tucker_conv2d.py",
    "csrc/cuda/tucker_conv2d.cu",
    "triton_kernels/tucker_conv2d.py",
    *(f"triton_kernels/{op}.py" for op in ("bitpack", "binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")),
    "tests/ops/test_tucker_conv2d.py",
}

# Path → why it does not exist yet. A commit that adds a file removes its line, or leaves it out of the pattern below;
# lines are never added.
MISSING = {
    **{
        pattern.format(op=op): BY_THE_BASIS_KERNEL if op == "tucker_conv2d" else LATER
        for op in OPS
        if op != "basis_conv2d"
        for pattern in STARRED
        if pattern.format(op=op) not in NEVER | HERE
    },
}

GRID = [path for op in OPS for path in (pattern.format(op=op) for pattern in STARRED) if path not in NEVER]


@pytest.mark.parametrize("path", GRID)
def test_file_exists_or_is_listed(path):
    exists, listed = (ROOT / path).exists(), path in MISSING
    assert exists or listed, f"{path} is missing; MISSING takes no new lines"
    assert not (exists and listed), f"{path} exists: remove it from MISSING"


def test_the_list_names_only_files_of_the_grid_with_a_reason():
    assert set(MISSING) <= set(GRID)
    assert all(MISSING.values())


def test_no_starred_folder_holds_an_op_of_another_name():
    """A file named after no op belongs to an op by its prefix, or is one of the shared files of its folder."""
    for pattern in STARRED[:2]:
        folder = (ROOT / pattern).parent
        strangers = [p.name for p in folder.glob("*.py") if p.stem != "__init__" and not p.stem.startswith(OPS)]
        assert strangers == [], f"{folder.name} holds one file an op"
