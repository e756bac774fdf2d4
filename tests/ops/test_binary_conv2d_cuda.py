"""What the CUDA backends of ``binary_conv2d`` and ``bitpack`` take, and what is checked before they are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from basisconv_kernels.core import extension, registry
from basisconv_kernels.ops import (
    binary_conv2d,
    binary_conv2d_native,
    binary_conv2d_selfcheck,
    bitpack,
    bitpack_selfcheck,
)
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

CUDA = next(candidate for candidate in binary_conv2d.CANDIDATES if candidate.name == "cuda")
PACKING = next(candidate for candidate in bitpack.CANDIDATES if candidate.name == "cuda")
PROBLEM = BinaryConv2dProblem(
    C=64, K=64, N=2, H=9, W=11, planes=1, dtype=torch.bfloat16, device="cuda", channels_last=True
)  # fmt: skip


def test_it_is_chosen_only_after_its_check():
    check = registry.check_of(CUDA, PROBLEM)
    assert check.variant == (
        "binary_conv2d cuda packed signs bfloat16 channels_last 3×3 stride 1,1 words 2 whole K≤64 aligned to 8"
    )
    assert registry.check_of(CUDA, replace(PROBLEM, device="cpu")) is None
    packing = bitpack.BitpackProblem(torch.int32, "cuda")
    assert registry.check_of(PACKING, packing).variant == "bitpack cuda int32"


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float16}, {"channels_last": False}, {"stride": (2, 2)}, {"dilation": (2, 1)}, {"C": 60},
     {"C": 128}, {"K": 16}, {"K": 65}, {"groups": 2}, {"planes": 0}, {"unsigned": True}, {"R": 5}],
    ids=str,
)  # fmt: skip
def test_what_runs_other_code_or_another_plan_is_another_variant(changes):
    variants = {registry.check_of(CUDA, problem).variant for problem in (PROBLEM, replace(PROBLEM, **changes))}
    assert len(variants) == 2


def test_size_of_the_maps_and_epilogue_are_no_variants():
    other = replace(PROBLEM, N=7, H=30, activation="relu", padding=(1, 1, 1, 1), padding_value=-1, output="packed")
    assert registry.check_of(CUDA, other).variant == registry.check_of(CUDA, PROBLEM).variant


def test_the_checks_pass_where_the_results_are_right():
    binary_conv2d_selfcheck.against_reference("reference", replace(PROBLEM, C=5, K=3, device="cpu"))
    bitpack_selfcheck.against_reference("reference", torch.int32, "cpu")


def test_the_checks_find_what_is_wrong(monkeypatch):
    right = bitpack._targets.setdefault("reference", registry.resolve(bitpack.CANDIDATES[-1]))
    monkeypatch.setitem(bitpack._targets, "reference", lambda *arguments: right(*arguments) ^ 1)
    with pytest.raises(AssertionError, match=r"^bitpack torch.float32 of 3 channels, 1 bits, .*: wrong words$"):
        bitpack_selfcheck.against_reference("reference", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on CUDA devices, the tensors are on cpu"),
        ({"dtype": torch.float64}, "has no torch.float64 kernel"),
        ({"C": 70_000, "K": 70_000, "groups": 70_000}, "at most 65535 tiles of filters, 70000 groups have 70000"),
        ({"K": 64 * 65_536}, "at most 65535 tiles of filters, 1 groups have 65536"),
    ],
)
def test_what_it_does_not_take(changes, reason):
    assert not CUDA.supports(PROBLEM)
    assert any(reason in told for told in CUDA.supports(replace(PROBLEM, **changes)))


def test_what_packing_does_not_take():
    assert not PACKING.supports(bitpack.BitpackProblem(torch.float16, "cuda"))
    assert "has no torch.uint8 kernel" in PACKING.supports(bitpack.BitpackProblem(torch.uint8, "cuda"))
    told = PACKING.supports(bitpack.BitpackProblem(torch.float32, "cpu"))
    assert told == ["runs on CUDA devices, the tensor is on cpu"]


def test_signs_of_float64_filters_are_taken_before_any_conversion():
    values = torch.tensor([-1e-300, -0.0, torch.nan, 5.0], dtype=torch.float64)
    assert binary_conv2d_native._signs_in_float32(values).tolist() == [-1.0, 1.0, -1.0, 1.0]
    words = torch.ones(3, dtype=torch.int32)
    assert binary_conv2d_native._signs_in_float32(words) is words


def test_bytes_of_packed_filters():
    """A tag; sums from the first tap on; units of 64 filters and one of ones."""
    if "cuda" not in extension.facts():
        pytest.skip("the library has no CUDA kernels")
    count = torch.ops.basisconv.binary_conv2d_cuda_packed_bytes.default
    # 3x3 of 64 channels: a row of taps is two units of two taps; of 256: two units a tap.
    assert count(64, 3, 3, 64, 1) == 64 + 4 * 4 * 64 * 4 + 3 * 2 * 65 * 16
    assert count(128, 3, 3, 256, 1) == 64 + 4 * 4 * 128 * 4 + 2 * 9 * 2 * 65 * 16
    # Groups of eight filters: narrow tiles, one for each.
    assert count(16, 1, 1, 16, 2) == 64 + 2 * (2 * 2 * 16 * 4 + 1 * 2 * 17 * 16)
