"""The CUDA kernels of ``binary_conv2d`` and ``bitpack``, executed on the CPU, in three orders of the threads."""

from __future__ import annotations

import random

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.packed import INT32, Threshold
from basisconv_kernels.reference import bitpack as packing
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing.binary_conv2d import VIEWS, BinaryCase, arguments
from tests.cuda_on_cpu.emulated import A100, ADA
from tests.cuda_on_cpu.emulated_binary import EmulatedBinary

pytestmark = pytest.mark.xdist_group("binary_on_cpu")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ONE = (1, 1, 1, 1)
# One multiprocessor: work for the larger tile at once.
ONE_CORE = {**A100, "multiprocessors": 1}


def case(name, sizes, **flags):
    """``sizes`` reads ``N C H W K R S``."""
    n, c, h, w, k, r, s = map(int, sizes.split())
    flags = {"planes": 1, "dtype": BF16, "padding": ONE if r == 3 else (0, 0, 0, 0), **flags}
    return BinaryCase(name, "", BinaryConv2dProblem(N=n, C=c, H=h, W=w, K=k, R=r, S=s, **flags))


def ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# What the cases of the op have too few channels, filters or pixels for.
LARGER = [
    case("one_step_of_64_channels_and_three_taps", "1 64 19 12 64 3 3"),
    case("pairs_of_taps", "1 128 18 9 64 3 3", dtype=F16),
    case("two_units_a_slab", "1 256 17 17 128 3 3", dtype=F32),
    case("a_unit_too_few", "1 384 9 10 72 3 3"),
    case("more_slabs_under_way_than_taps", "1 1100 9 10 40 1 1"),
    case("words_that_fill_no_unit", "1 200 18 9 100 3 3"),
    case("codes_in_slabs", "1 512 9 9 64 3 3", planes=3, unsigned=True),
    case("codes_of_one_chunk", "1 64 18 9 64 1 1", planes=4, unsigned=True),
    case("real_to_bits", "2 96 18 9 96 3 3", planes=0, channels_last=True),
    case("real_nchw", "1 64 17 9 70 3 3", planes=0),
    case("tap_by_tap", "1 256 26 31 64 1 1", stride=(5, 6)),
    case("tap_by_tap_in_pairs", "1 64 30 31 24 2 2", stride=(7, 7), padding=(0, 1, 2, 1), padding_value=1),
    case("tap_by_tap_in_codes", "1 160 31 30 20 2 1", stride=(7, 9), planes=2, unsigned=True),
    case("few_filters", "1 128 18 17 16 3 3"),
    case("groups_of_whole_units", "1 256 18 9 128 3 3", groups=2),
    case("groups_of_whole_words_of_bits", "1 96 9 9 192 3 3", groups=3, padding_value=-1),
    case("a_large_map_of_a_long_kernel", "1 40 21 30 33 7 5", padding=(3, 3, 2, 2), dilation=(1, 2)),
    case("pointwise_stride", "1 256 17 17 64 1 1", stride=(2, 2)),
]  # fmt: skip
ONES_AND_BOTH = pytest.mark.parametrize("device", [A100, ONE_CORE], ids=["8x8 pixels", "16x8 pixels"])


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.full), F32], ids=str)
@ids(testing.BINARY_CASES)
def test_every_case(binary_module, case, dtype):
    testing.check_binary(case.at(dtype=dtype), EmulatedBinary(binary_module, A100))


@ONES_AND_BOTH
@ids(LARGER)
def test_larger_sizes(binary_module, case, device):
    testing.check_binary(case, EmulatedBinary(binary_module, device))


def geometry(rng: random.Random) -> BinaryCase:
    """Any geometry with an output pixel, small enough for a second."""
    planes, groups = rng.choice([0, 1, 1, 2, 3, 4]), rng.choice([1, 1, 1, 2, 3])
    unsigned = planes > 1 or (planes == 1 and rng.random() < 0.3)
    channels = rng.choice([rng.randint(1, 80), rng.randint(1, 80), 32, 64, 128, 160, 256, 384, 640])
    p = {
        "N": rng.randint(1, 2), "C": groups * channels, "K": groups * rng.choice([rng.randint(1, 100), 16, 32, 64]),
        "R": rng.randint(1, 4), "S": rng.randint(1, 4), "groups": groups, "planes": planes, "unsigned": unsigned,
        "stride": (rng.randint(1, 4), rng.randint(1, 4)), "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "padding": tuple(rng.randint(0, 3) for _ in range(4)),
        "padding_value": 0 if unsigned else rng.choice([0, 0, 1, -1]),
        "dtype": rng.choice([F32, BF16, F16]), "channels_last": rng.random() < 0.6,
    }  # fmt: skip
    for side, kernel, stride, dilation, least in zip(
        "HW", "RS", p["stride"], p["dilation"], (p["padding"][:2], p["padding"][2:]), strict=True
    ):
        p[side] = max(1, (p[kernel] - 1) * dilation + 1 - sum(least)) + rng.randint(0, 17) * stride
    return BinaryCase("drawn", "", BinaryConv2dProblem(**p), rng.choice(VIEWS) if not planes else "dense")


def test_any_geometry(binary_module, request):
    rng = random.Random(5)
    count = 2_000 if request.config.getoption("--full") else 25
    for seed in range(count):
        kernel = EmulatedBinary(binary_module, rng.choice([ADA, ONE_CORE]), orders=("shuffled",))
        testing.check_binary(geometry(rng), kernel, seed=seed)


REAL = [c for c in testing.BINARY_CASES if not c.problem.planes]
PIECES = [  # whole pieces of 16 bytes, in rows that are longer than a block
    case(f"pieces_of_{channels}", f"2 {channels} 3 70 1 1 1", planes=0, channels_last=True) for channels in (8, 72, 256)
]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@ids([*REAL, *PIECES])
def test_packing(binary_module, case, dtype):
    testing.check_pack(case.at(dtype=dtype), EmulatedBinary(binary_module, A100).bitpack)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_packing_of_every_16_bit_float(binary_module, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 4, 64, 256).permute(0, 3, 1, 2)
    found = EmulatedBinary(binary_module, A100).bitpack(every)
    assert torch.equal(found.words, packing.forward(every, None, 1, "sign"))


@pytest.mark.parametrize("channels", [5, 72])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_packing_of_whole_numbers(binary_module, channels, layout):
    kernel = EmulatedBinary(binary_module, A100)
    generator = torch.Generator().manual_seed(channels)
    sums = torch.randint(-9, 20, (2, channels, 4, 37), generator=generator, dtype=torch.int32)
    sums = sums.contiguous(memory_format=layout)
    value = torch.randint(-9, 10, (channels,), generator=generator, dtype=torch.int32)
    value[:4] = torch.tensor([INT32.min, INT32.max, INT32.min, INT32.max], dtype=torch.int32)
    flip = torch.tensor([False, False, True, True]).repeat(channels)[:channels]
    for threshold, bits in ((None, 1), (Threshold(value, flip), 1), (None, 3)):
        got = kernel.bitpack(sums, threshold=threshold, bits=bits)
        assert torch.equal(got.words, packing.forward(sums, threshold, bits, got.encoding))


def test_weights_packed_for_another_problem_give_what_no_sum_is(binary_module):
    """The same number of bytes, other groups."""
    one = case("packed", "1 64 6 7 32 3 3")
    inputs = testing.make_binary_inputs(one)
    kernel = EmulatedBinary(binary_module, A100, orders=("forward",))
    described = kernel.describe(inputs.input, inputs.weight, 1)
    right = kernel.packed(inputs.weight, described)
    other = kernel.packed(inputs.weight, {**described, "C": 63})
    assert other.numel() == right.numel()
    given = {**arguments(one), "packed": right}
    assert torch.equal(kernel(inputs.input, inputs.weight, output="int32", **given), inputs.sums)
    given["packed"] = other
    for geometry in (given, {**given, "padding": (0, 0, 0, 0)}):  # with border tiles and without
        sums = kernel(inputs.input, inputs.weight, output="int32", **geometry)
        assert (sums == INT32.min).all()
        assert kernel(inputs.input, inputs.weight, inputs.scale, **geometry).isnan().all()
        for threshold in (None, inputs.threshold):
            bits = kernel(inputs.input, inputs.weight, output="packed", threshold=threshold, **geometry)
            assert not bits.words.any()


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_shared_memory_is_read_without_bank_conflicts(binary_module, channels):
    """At stride 1 each of ldmatrix's 8x8 matrices takes one wavefront."""
    one = case("conflicts", f"1 {channels} 16 8 64 3 3")
    inputs = testing.make_binary_inputs(one)
    kernel = EmulatedBinary(binary_module, A100, orders=("forward",))
    kernel(inputs.input, inputs.weight, **arguments(one))
    assert kernel.matrices > 0
    assert kernel.conflicts == 0


def test_what_the_kernels_do_not_take(binary_module):
    numbers = {
        "C": 64, "K": 64, "R": 3, "S": 3, "groups": 1, "N": 1, "H": 9, "W": 9, "OH": 9, "OW": 9, "stride": (1, 1),
        "dilation": (1, 1), "pad_top": 1, "pad_left": 1, "padding_value": 0, "planes": 1, "codes": False, "input": 0,
        "packed": 0, "output": 0, "threshold": 0, "flip": 0, "activation": 0, "output_type": 0, "channels_last": True,
        "scale": (0, 0), "bias": (0, 0), "pixel_scale": (0, 0), **A100,
    }  # fmt: skip
    assert binary_module.reason(numbers) is None
    for changes, why in (
        ({"capability": 75}, "compute capability 8.0"),
        ({"H": 1 << 29}, "sizes below 2^29"),
        ({"C": 65_536, "K": 65_536, "groups": 65_536}, "at most 65535 groups"),
        ({"R": 1 << 14, "S": 1 << 13}, "the filters are too large"),
    ):
        assert why in binary_module.reason({**numbers, **changes})
    assert not binary_module.packs_output({**numbers, "groups": 16})
    assert "groups that end inside a byte" in binary_module.run({**numbers, "groups": 16, "output_type": 1})[0]
