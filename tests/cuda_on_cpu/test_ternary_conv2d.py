"""The CUDA kernel of filters of −1, 0 and +1, executed on the CPU, in three orders of the threads."""

from __future__ import annotations

import random

import pytest
import torch

from basisconv_kernels.reference import ternary_conv2d as reference
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import ternary_conv2d as ternary
from basisconv_kernels.testing.ternary_conv2d import TernaryCase
from tests.cuda_on_cpu.emulated import A100, H200
from tests.cuda_on_cpu.emulated_ternary import EmulatedTernary

pytestmark = pytest.mark.xdist_group("ternary_on_cpu")

BF16, F16 = torch.bfloat16, torch.float16
ONE = (1, 1, 1, 1)
FORMS = pytest.mark.parametrize(
    "form", [(False, 64), (True, 64), (False, 128), (True, 128)],
    ids=["16x8 pixels, 64 filters", "8x8, 128", "16x8, 128", "8x8, 256"],
)  # fmt: skip


def case(name, sizes, **flags):
    """``sizes`` reads ``N C H W K R S``."""
    n, c, h, w, k, r, s = map(int, sizes.split())
    flags = {"dtype": BF16, "channels_last": True, "padding": ONE if r == 3 else (0, 0, 0, 0), **flags}
    return TernaryCase(name, "", TernaryConv2dProblem(N=n, C=c, H=h, W=w, K=k, R=r, S=s, **flags))


CASES = [
    case("a_tile", "1 64 16 8 64 3 3", bias=True, activation="relu"),
    case("tails_everywhere", "2 72 17 9 70 3 3", bias=True, activation="relu6"),
    case("slabs_and_parts", "1 136 9 11 264 3 3", scales="none"),
    case("one_filter", "1 8 9 10 1 3 3", bias=True),
    case("odd_filters", "1 16 9 10 67 2 3", dtype=F16, padding=(1, 0, 2, 1)),
    case("one_tap", "1 200 10 9 72 1 1", bias=True),
    case("wide_taps", "1 24 12 13 40 5 5", padding=(2, 2, 2, 2), dtype=F16),
    case("stride_and_dilation", "2 40 19 21 48 3 3", stride=(2, 1), dilation=(1, 2), padding=(1, 1, 2, 2)),
    case("smaller_than_a_tile", "3 64 5 3 64 3 3", bias=True),
]
ids = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@ids
def test_every_case(ternary_module, case):
    ternary.check(case, EmulatedTernary(ternary_module))


@FORMS
@ids
def test_every_form(ternary_module, case, form):
    ternary.check(case, EmulatedTernary(ternary_module, {**H200, "multiprocessors": 2}, ("shuffled",), form))


@FORMS
@pytest.mark.parametrize("kilobytes", [100, 227], ids=["through a ring", "resident"])
def test_a_block_makes_several_tiles_with_its_filters(ternary_module, form, kilobytes):
    device = {**H200, "multiprocessors": 1, "shared_bytes": kilobytes * 1024}
    one = case("several", "1 136 18 9 72 3 3", bias=True)
    ternary.check(one, EmulatedTernary(ternary_module, device, ("shuffled",), form))


def test_any_geometry(ternary_module, request):
    rng = random.Random(11)
    for seed in range(1_000 if request.config.getoption("--full") else 12):
        p = {
            "N": rng.randint(1, 2), "C": 8 * rng.randint(1, 20), "K": rng.randint(1, 200), "R": rng.randint(1, 4),
            "S": rng.randint(1, 4), "stride": (rng.randint(1, 3), rng.randint(1, 3)),
            "dilation": (rng.randint(1, 2), rng.randint(1, 2)), "padding": tuple(rng.randint(0, 3) for _ in range(4)),
            "dtype": rng.choice([BF16, F16]), "channels_last": True, "bias": rng.random() < 0.5,
            "scales": rng.choice(["none", "one"]), "activation": rng.choice([None, "relu", "relu6"]),
        }  # fmt: skip
        for side, kernel, axis in (("H", "R", 0), ("W", "S", 1)):
            least = (p[kernel] - 1) * p["dilation"][axis] + 1 - sum(p["padding"][2 * axis : 2 * axis + 2])
            p[side] = max(1, least) + rng.randint(0, 17)
        device = {**H200, "multiprocessors": rng.choice([1, 7, 132])}
        drawn = TernaryCase("drawn", "", TernaryConv2dProblem(**p))
        ternary.check(drawn, EmulatedTernary(ternary_module, device, ("shuffled",)), seed=seed)


def test_filters_of_one_bit_are_those_of_two_planes(ternary_module):
    """One plane: the bit 1 is +1, the bit 0 is −1, and past the last channel there is nothing."""
    weight = torch.randint(0, 2, (70, 40, 3, 2), generator=torch.Generator().manual_seed(3)) * 2 - 1
    planes = reference.pack_planes(weight)
    kernel = EmulatedTernary(ternary_module, orders=("forward",))
    assert torch.equal(kernel.packed(40, planes), kernel.packed(40, planes[:, :1]))


def test_one_number_scales_all_outputs(ternary_module):
    one = case("scale", "1 16 9 9 24 3 3")
    given = ternary.make_inputs(one)
    x, planes = given.tensors[:2]
    kernel = EmulatedTernary(ternary_module, orders=("forward",))
    number = torch.tensor([0.375], dtype=BF16)
    arguments = one.arguments()
    expected = kernel(x, planes, number, **arguments)
    for same in (number.expand(24), number.float(), number.float().expand(24)):
        assert torch.equal(kernel(x, planes, same, **arguments), expected)


def test_filters_of_another_size_give_nan(ternary_module):
    one, other = case("a", "1 64 9 9 64 3 3"), case("b", "1 64 9 9 64 3 3")
    given, its = ternary.make_inputs(one).tensors, ternary.make_inputs(other, 1).tensors
    kernel = EmulatedTernary(ternary_module, orders=("forward",))
    packed = kernel.packed(64, its[1])
    assert kernel(*given[:2], packed=packed, **one.arguments()).isfinite().all()
    packed[0] ^= 1
    assert kernel(*given[:2], packed=packed, **one.arguments()).isnan().all()


REFUSED = {
    "another device": ({}, {"capability": 80}, "compute capability 9.0"),
    "float32": ({"dtype": "float32"}, {}, "bfloat16 and float16"),
    "channels": ({"C": 20}, {}, "that 8 divides"),
    "too large": ({"N": 2**30}, {}, "below 2"),
    "an empty map": ({"H": 0}, {}, "no empty maps"),
    "a tall kernel": ({"R": 300, "H": 400, "OH": 100}, {}, "does not fit into shared memory"),
    "an image at an odd address": ({"input": 8}, {}, "multiple of 16 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_take_has_a_reason(ternary_module, name):
    changes, device, words = REFUSED[name]
    one = case("a", "1 64 9 9 64 3 3")
    kernel = EmulatedTernary(ternary_module, {**H200, **device})
    request = kernel.request(*ternary.make_inputs(one).tensors[:2], **one.arguments())
    assert words in ternary_module.reason({**request, **changes})
    assert EmulatedTernary(ternary_module, A100).module.reason({**request, **A100})


def plan(module, sizes, **device):
    """What a 3×3 layer of ``N C K side`` gets."""
    N, C, K, side = map(int, sizes.split())
    one = case("a", f"1 {C} 9 9 {K} 3 3")
    kernel = EmulatedTernary(module, {**H200, **device})
    request = kernel.request(*ternary.make_inputs(one).tensors[:2], **one.arguments())
    return module.plan({**request, "N": N, "H": side, "W": side, "OH": side, "OW": side})


def test_the_plan_follows_the_layer(ternary_module):
    large = plan(ternary_module, "32 64 64 56")
    assert (large["split_filters"], large["columns_each"], large["parts"], large["resident"]) == (False, 64, 1, True)
    assert large["grid"] == 132
    small = plan(ternary_module, "32 512 512 7")
    assert small["split_filters"], "no pixels of another image"
    assert not small["resident"]
    assert small["grid"] % small["parts"] == 0
    many = plan(ternary_module, "1 64 40000 56")
    assert many["grid"] == many["parts"] > 132, "a block keeps its filters"


def test_no_plan_asks_for_more_than_there_is(ternary_module):
    for sizes in ("32 64 64 56", "1 512 512 7", "8 1024 1024 14", "1 8 8 3"):
        for kilobytes in (99, 163, 227):
            found = plan(ternary_module, sizes, shared_bytes=kilobytes * 1024)
            assert 0 < found["bytes"] <= kilobytes * 1024


def test_a_fragment_costs_four_phases(ternary_module):
    """No two lanes of ``ldmatrix`` meet in a bank, whatever the tap."""
    kernel = EmulatedTernary(ternary_module, orders=("forward",))
    one = case("a", "1 64 18 9 64 3 3")
    kernel(*ternary.make_inputs(one).tensors[:2], **one.arguments())
    assert kernel.matrices > 0
    assert kernel.conflicts == 0
