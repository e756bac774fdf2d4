"""The sm_90a kernel of ``binary_conv2d``, executed on the CPU, in three orders of the threads; and its plan."""

from __future__ import annotations

import random

import pytest

from basisconv_kernels import testing
from basisconv_kernels.core.packed import INT32
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing.binary_conv2d import BinaryCase, arguments
from tests.cuda_on_cpu.emulated import A100, H200
from tests.cuda_on_cpu.emulated_binary import EmulatedBinary
from tests.cuda_on_cpu.test_binary_conv2d import BF16, F16, F32, case, ids

pytestmark = pytest.mark.xdist_group("binary_on_cpu")

NONE = (0, 0, 0, 0)
CASES = [
    case("two_taps_a_step", "1 64 9 10 64 3 3"),
    case("one_unit_a_pixel", "2 128 9 9 72 3 3", dtype=F16),
    case("two_units_a_pixel", "1 256 8 9 40 3 3", dtype=F32),
    case("three_units_and_a_tail_of_channels", "1 380 6 7 48 3 3"),
    case("four_units_and_a_tail_of_channels", "2 500 5 6 40 3 3", padding_value=1),
    case("half_a_unit_with_a_tail", "1 50 9 9 32 3 3"),
    case("many_images_in_a_tile", "9 128 4 3 32 3 3"),
    case("padding_with_one", "2 64 6 7 32 3 3", padding_value=1),
    case("padding_with_minus_one", "2 100 6 7 32 3 3", padding_value=-1, padding=(2, 1, 0, 2)),
    case("strides", "2 128 13 12 32 3 3", stride=(2, 2)),
    case("strides_that_differ", "2 64 13 12 32 3 3", stride=(1, 3), padding_value=1),
    case("dilation", "1 128 12 13 32 3 3", dilation=(2, 3), padding=(2, 2, 3, 3)),
    case("pointwise", "3 128 7 7 64 1 1"),
    case("pointwise_of_half_a_unit", "2 64 9 7 32 1 1"),
    case("pointwise_of_five_units", "1 640 9 8 32 1 1"),
    case("pointwise_stride", "2 256 15 13 32 1 1", stride=(2, 3)),
    case("pointwise_with_a_border", "2 128 5 6 32 1 1", padding=(1, 0, 2, 1), padding_value=-1),
    case("a_window_larger_than_the_map", "3 64 1 2 32 3 3"),
    case("real_to_bits", "2 126 9 9 96 3 3", planes=0, channels_last=True),
]  # fmt: skip
# Filters and warpgroups of a block; whether filters come in slabs of two units.
PLANS = [(32, 1, False), (32, 3, False), (64, 1, False), (64, 2, False), (128, 1, False), (128, 3, False)]
MORE_PLANS = [(32, 2, False), (64, 3, False), (64, 4, False), (64, 5, False), (128, 2, False), (128, 4, False)]
SLABS, MORE_SLABS = [(32, 1, True), (64, 2, True)], [(32, 2, True), (32, 3, True), (64, 1, True), (64, 3, True)]
ONE_CORE = {**H200, "multiprocessors": 1}


@ids(CASES)
def test_the_chosen_plan(binary_module, case):
    kernel = EmulatedBinary(binary_module, H200)
    testing.check_binary(case, kernel)
    assert kernel.chosen is not None


def plans(some, more):
    return pytest.mark.parametrize(
        "plan", [*some, *(pytest.param(p, marks=pytest.mark.full) for p in more)], ids=lambda p: f"{p[0]}x{p[1]}"
    )


@plans(PLANS, MORE_PLANS)
@ids([
    case("pairs", "3 64 11 13 136 3 3"),
    case("units", "3 256 11 13 136 3 3", padding_value=1),
    case("pointwise", "3 128 13 12 136 1 1"),
])  # fmt: skip
def test_every_plan(binary_module, case, plan):
    """Several rounds of one multiprocessor, tails of pixels and filters."""
    testing.check_binary(case, EmulatedBinary(binary_module, ONE_CORE, plan=plan))


@plans(SLABS, MORE_SLABS)
@ids([
    case("two_units", "3 256 11 13 136 3 3", padding_value=1),
    case("three_units_and_a_tail_of_channels", "7 380 5 6 72 3 3", padding_value=-1),
    case("five_units", "2 640 7 7 40 3 3"),
    case("pointwise", "3 512 13 12 136 1 1", stride=(2, 1), padding=(1, 0, 2, 1)),
])  # fmt: skip
def test_every_plan_with_slabs(binary_module, case, plan):
    testing.check_binary(case, EmulatedBinary(binary_module, ONE_CORE, plan=plan))


def geometry(rng: random.Random) -> BinaryCase:
    """Any call that the kernel takes, small enough for a second."""
    side = rng.choice([1, 3, 3])
    sign = rng.choice([0, 0, 1, -1])
    p = {
        "N": rng.randint(1, 4), "C": rng.choice([34, 64, 64, 98, 128, 128, 230, 256, 384]), "planes": 1,
        "K": rng.choice([24, 32, 40, 64, 96, 128, 160]), "R": side, "S": side, "padding_value": sign,
        "stride": (rng.randint(1, 3), rng.randint(1, 3)), "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "padding": tuple(rng.randint(0, 3) for _ in range(4)), "dtype": rng.choice([F32, BF16, F16]),
        "channels_last": True,
    }  # fmt: skip
    for axis, stride, dilation, pads in zip(
        "HW", p["stride"], p["dilation"], (p["padding"][:2], p["padding"][2:]), strict=True
    ):
        p[axis] = max(1, (side - 1) * dilation + 1 - sum(pads)) + rng.randint(0, 9) * stride
    return BinaryCase("drawn", "", BinaryConv2dProblem(**p))


def test_any_geometry(binary_module, request):
    rng = random.Random(7)
    count = 1_000 if request.config.getoption("--full") else 12
    for seed in range(count):
        drawn = geometry(rng)
        plan = rng.choice([*PLANS, *MORE_PLANS] if drawn.problem.C <= 128 else [*PLANS, *3 * SLABS, *MORE_SLABS])
        kernel = EmulatedBinary(binary_module, rng.choice([H200, ONE_CORE]), orders=("shuffled",), plan=plan)
        testing.check_binary(drawn, kernel, seed=seed)


def test_weights_packed_for_another_problem_give_what_no_sum_is(binary_module):
    """The same number of bytes, other groups."""
    one = case("packed", "1 64 6 7 32 3 3")
    inputs = testing.make_binary_inputs(one)
    kernel = EmulatedBinary(binary_module, H200, orders=("forward",))
    described = kernel.describe(inputs.input, inputs.weight, 1)
    given = {**arguments(one), "packed": kernel.packed(inputs.weight, {**described, "C": 62})}
    assert (kernel(inputs.input, inputs.weight, output="int32", **given) == INT32.min).all()
    assert kernel(inputs.input, inputs.weight, inputs.scale, **given).isnan().all()
    for threshold in (None, inputs.threshold):
        assert not kernel(inputs.input, inputs.weight, output="packed", threshold=threshold, **given).words.any()


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_shared_memory_is_read_with_few_bank_conflicts(binary_module, channels):
    """Of 8 neighbours of a matrix a few follow behind the padding of a line: at most one wavefront more."""
    one = case("conflicts", f"1 {channels} 14 14 64 3 3")
    inputs = testing.make_binary_inputs(one)
    kernel = EmulatedBinary(binary_module, H200, orders=("forward",))
    kernel(inputs.input, inputs.weight, **arguments(one))
    assert kernel.matrices > 0
    assert kernel.conflicts <= kernel.matrices


def plan_of(binary_module, sizes, device=H200, **changes):
    n, c, h, w, k, r, s = map(int, sizes.split())
    pad = r // 2
    request = {
        "C": c, "K": k, "R": r, "S": s, "groups": 1, "N": n, "H": h, "W": w, "OH": h + 2 * pad - r + 1,
        "OW": w + 2 * pad - s + 1, "stride": (1, 1), "dilation": (1, 1), "pad_top": pad, "pad_left": pad,
        "padding_value": 0, "planes": 1, "codes": False, "input": 0, "packed": 0, "output": 0, "threshold": 0,
        "flip": 0, "activation": 0, "output_type": 0, "channels_last": True, "scale": (0, 0), "bias": (0, 0),
        "pixel_scale": (0, 0), **device, **changes,
    }  # fmt: skip
    return binary_module.hopper_plan(request)


PACKED, HALF = 1, 3  # output types


@pytest.mark.parametrize(
    ("sizes", "changes", "taken"),
    [
        ("1 64 14 14 64 3 3", {}, True),
        ("1 64 14 14 64 1 1", {}, True),
        ("1 64 14 14 64 3 1", {}, False),
        ("1 64 14 14 64 5 5", {}, False),
        ("1 64 14 14 64 3 3", A100, False),
        ("1 64 14 14 64 3 3", {"capability": 100}, False),  # sm_90a code runs nowhere else
        ("1 32 14 14 64 3 3", {}, False),
        ("1 96 14 14 64 3 3", {}, False),
        ("1 63 14 14 64 3 3", {}, False),  # sums are odd
        ("1 64 14 14 16 3 3", {}, False),
        ("1 64 14 14 64 3 3", {"groups": 2}, False),
        ("1 64 14 14 64 3 3", {"codes": True}, False),
        ("1 64 14 14 64 3 3", {"channels_last": False}, False),
        ("1 64 14 14 64 3 3", {"channels_last": False, "output_type": PACKED}, True),
        ("1 64 14 14 66 3 3", {"output_type": HALF}, False),  # pixels begin anywhere
        ("1 64 14 14 66 3 3", {"output_type": PACKED}, True),
        ("1 128 14 14 64 3 3", {"input": 8}, False),
        ("1 64 14 14 64 3 3", {"input": 8}, True),
        ("1 64 14 14 64 3 3", {"input": 4}, False),
        ("1 64 14 14 64 3 3", {"output": 8}, False),
        ("1 64 255 256 64 3 3", {}, True),
        ("8 64 16384 16384 64 3 3", {}, False),  # pixels are numbered in 30 bits
        ("1 8192 14 14 64 3 3", {}, False),  # filters larger than shared memory
    ],
)  # fmt: skip
def test_which_kernel_a_call_gets(binary_module, sizes, changes, taken):
    assert (plan_of(binary_module, sizes, **changes) is not None) == taken


@pytest.mark.parametrize(
    ("sizes", "columns", "warpgroups", "rounds", "blocks", "slabs"),
    [
        ("32 128 28 28 128 3 3", 128, 3, 1, 131, False),  # a round of all multiprocessors
        ("32 256 14 14 256 3 3", 64, 3, 1, 132, True),
        ("32 512 7 7 512 3 3", 64, 2, 1, 104, True),
        ("32 256 56 56 256 3 3", 128, 4, 6, 132, False),  # twice the filters a block: fewer outputs at once
        ("1 128 28 28 128 3 3", 32, 1, 1, 52, False),
        ("128 512 7 7 512 3 3", 128, 3, 1, 132, False),  # enough pixels for all multiprocessors at once
        ("128 256 14 14 256 3 3", 128, 3, 2, 132, False),
    ],
)
def test_plans(binary_module, sizes, columns, warpgroups, rounds, blocks, slabs):
    plan = plan_of(binary_module, sizes)
    assert (*plan[:4], plan[5]) == (columns, warpgroups, rounds, blocks, slabs)


def test_a_plan_fits_the_device(binary_module):
    rng = random.Random(3)
    for _ in range(300):
        channels, side, filters = rng.choice([64, 128, 512, 1024]), rng.randint(1, 120), rng.choice([32, 100, 1024])
        limit = rng.choice([99, 227]) * 1024
        plan = plan_of(
            binary_module, f"{rng.randint(1, 64)} {channels} {side} {side} {filters} 3 3", shared_bytes=limit
        )
        assert plan is None or (0 < plan[4] <= limit and plan[0] in (32, 64, 128))


def test_quotients_by_multiplication(binary_module):
    """Of all numbers below 2³¹."""
    rng = random.Random(31)
    near_powers = (2**i + d for i in range(7, 31) for d in (-1, 0, 1))
    divisors = [*range(1, 70), 224, 784, 12_544, 60_000, *near_powers, 2**31 - 1]
    for by in divisors:
        multiples = [rng.randrange(2**31) // by * by for _ in range(20)]
        near = [multiple + d for multiple in (0, by, (2**31 - 1) // by * by, *multiples) for d in (-1, 0, 1, by - 1)]
        for numerator in (*(n for n in near if 0 <= n < 2**31), 2**31 - 1):
            assert binary_module.quotient(numerator, by) == numerator // by, (numerator, by)
