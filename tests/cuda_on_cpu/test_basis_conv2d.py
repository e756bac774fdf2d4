"""The CUDA kernels of ``basis_conv2d``, executed on the CPU, against the reference, in three orders of the threads."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.testing import Case
from tests.cuda_on_cpu.emulated import A100, ADA, H200, Emulated

pytestmark = pytest.mark.xdist_group("cuda_on_cpu")

BF16, F16 = torch.bfloat16, torch.float16
ONE = (1, 1, 1, 1)


def case(name, sizes, **flags):
    """``sizes`` reads ``N C H W Q K R S``."""
    n, c, h, w, q, k, r, s = map(int, sizes.split())
    flags = {"channels_last": True, "dtype": BF16, **flags}
    return Case(name, "", Conv2dProblem(N=n, C=c, H=h, W=w, Q=q, K=k, R=r, S=s, **flags))


def ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


TAKEN = [c for c in testing.CASES if c.problem.groups == 1 or c.problem.compact]

# What the cases of the op have too few channels for.
LARGER = [
    case("three_slabs_with_a_tail", "1 136 7 7 64 128 3 3", padding=ONE, bias=True),
    case("more_slabs_under_way_than_taps", "1 200 12 9 16 64 1 1", activation="relu"),
    case("two_chunks_of_outputs", "1 24 9 11 20 100 3 3", padding=ONE, residual=True),
    case("many_filters_strided", "1 72 9 9 128 200 3 3", padding=ONE, stride=(2, 2), bias=True),
    case("filters_of_three_sizes_apart", "2 16 9 13 40 33 1 3", padding=(0, 0, 1, 1)),
    case("many_outputs_of_one_tap", "2 16 9 10 33 400 1 1", residual=True),
    case("many_outputs", "1 72 8 9 30 300 3 3", padding=ONE),
    case("float16", "1 72 13 13 48 64 3 3", dtype=F16, bias=True),
]
ON_SM80 = [
    *LARGER,
    case("most_filters", "1 24 6 9 200 40 3 3", padding=ONE),
    case("most_filters_precise", "1 24 6 9 200 40 1 1", precise=True, dtype=F16),
    case("filters_of_two_tiles_precise", "1 40 6 9 70 40 3 3", precise=True, residual=True),
    case("first_layer", "1 3 17 16 16 24 7 7", padding=(3, 3, 3, 3), stride=(2, 2)),
    case("first_layer_nchw", "1 3 17 16 16 24 7 7", padding=(3, 3, 3, 3), stride=(2, 2), channels_last=False),
    case("groups_in_16_bytes", "1 16 8 9 6 12 3 3", padding=ONE, groups=2, compact=True),
]

# The op's cases with the channels that sm_90a's kernel wants. A window of 29 x 36 pixels is more than it can hold.
HOPPER = [
    c.at(C=(c.problem.C + 7) // 8 * 8, channels_last=True)
    for c in TAKEN
    if c.problem.groups == 1 and not c.problem.precise and c.problem.N > 0 and c.view in ("dense", "mixed")
    if c.name != "stride_past_kernel"
]
# One multiprocessor: a persistent block makes several tiles.
ONE_BLOCK = {**H200, "multiprocessors": 1}
WAYS = {
    "all resident": (True, True), "basis streamed": (False, True), "coefficients streamed": (True, False),
    "all streamed": (False, False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.full)], ids=str)
@ids(TAKEN)
def test_sm80_takes_every_case(module, case, dtype):
    testing.check(case.at(dtype=dtype), Emulated(module, "sm80", A100))


@ids(ON_SM80)
def test_sm80_at_larger_sizes(module, case):
    testing.check(case, Emulated(module, "sm80", A100))


@ids(HOPPER)
def test_sm90a(module, case):
    testing.check(case.at(dtype=BF16), Emulated(module, "sm90a", H200))


def devices(module, case, way):
    """One block of a Hopper with the most shared memory at which the plan for a case is ``way``; none for some."""
    input, *weights = testing.make_inputs(case).tensors[:3]
    for kilobytes in range(227, 40, -1):
        device = {**ONE_BLOCK, "shared_bytes": kilobytes * 1024}
        plan = module.hopper_plan(Emulated(module, "sm90a", device).request(input, *weights, **case.arguments()))
        if plan["bytes"] and (plan["basis_resident"], plan["mixing_resident"]) == way:
            return [device]
    return []


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_sm90a_at_larger_sizes(module, way):
    runs = [(case, device) for case in LARGER for device in devices(module, case, way)]
    assert len(runs) > 1
    for case, device in runs:
        testing.check(case, Emulated(module, "sm90a", device))


@pytest.mark.parametrize("filters", [30, 64, 100, 200])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_sm90a_where_filters_are_shared_out(module, filters, blocks):
    """Small maps: two warpgroups with the same pixels, and clusters of so many blocks."""
    one = case("small_map", f"1 520 7 5 {filters} 200 3 3", padding=ONE, bias=True, residual=True, activation="relu")
    kernel = Emulated(module, "sm90a", {**H200, "multiprocessors": blocks, "form": (1, blocks, 1, 1)})
    plan = module.hopper_plan(kernel.request(*testing.make_inputs(one).tensors[:3], **one.arguments()))
    assert (plan["shared_out"], plan["blocks"]) == (True, blocks)
    assert plan["lent"] == (filters == 200 and blocks > 1)
    testing.check(one, kernel)


@pytest.mark.parametrize("slabs", [2, 3, 5, 6])
def test_blocks_of_a_cluster_that_have_less_to_do(module, slabs):
    """Slabs and outputs that the blocks cannot divide evenly, down to none for the last."""
    one = case("uneven", f"1 {slabs * 64} 5 5 40 72 3 3", padding=ONE)
    kernel = Emulated(module, "sm90a", H200)
    plan = module.hopper_plan(kernel.request(*testing.make_inputs(one).tensors[:3], **one.arguments()))
    assert plan["blocks"] > 1
    testing.check(one, kernel)


def test_a_cluster_makes_several_tiles(module):
    one = case("several_tiles", "5 640 5 5 40 72 3 3", padding=ONE, bias=True)
    kernel = Emulated(module, "sm90a", {**H200, "multiprocessors": 4, "form": (1, 2, 1, 1)})
    plan = module.hopper_plan(kernel.request(*testing.make_inputs(one).tensors[:3], **one.arguments()))
    assert plan["blocks"] == 2
    testing.check(one, kernel)


@pytest.mark.parametrize("filters", [12, 30])
def test_two_blocks_of_a_multiprocessor(module, filters):
    """Few filters on large maps: the same kernel with fewer registers and half of the shared memory."""
    one = case("two_blocks", f"1 72 33 9 {filters} 72 3 3", padding=ONE, bias=True)
    kernel = Emulated(module, "sm90a", ONE_BLOCK)
    plan = module.hopper_plan(kernel.request(*testing.make_inputs(one).tensors[:3], **one.arguments()))
    assert (plan["per_sm"], plan["shared_out"]) == (2, False)
    assert plan["bytes"] <= H200["shared_bytes"] // 2
    testing.check(one, kernel)


# Filters shared out, blocks of a tile, blocks of a multiprocessor, images of a tile: with how many multiprocessors.
FORMS = {
    (0, 1, 1, 1): 2, (1, 1, 1, 1): 2, (1, 2, 1, 1): 2, (1, 3, 1, 1): 3, (1, 4, 1, 1): 8, (1, 8, 1, 1): 8,
    (0, 2, 1, 1): 2, (0, 8, 1, 1): 8, (0, 1, 1, 2): 2, (0, 2, 1, 2): 4, (0, 3, 1, 2): 3, (0, 8, 1, 2): 8,
}  # fmt: skip
# Several tiles for a cluster; slabs and outputs of which some blocks have fewer, or none.
OF_FORMS = [
    case("most_filters", "5 200 7 7 200 100 3 3", padding=ONE, bias=True, residual=True, activation="relu"),
    case("many_filters", "5 136 7 6 100 200 3 3", padding=ONE, bias=True),
    case("few_filters", "3 328 9 9 20 72 3 3", padding=ONE, residual=True),
    case("one_tap", "5 264 7 7 150 72 1 1", bias=True),
    case("resident_unevenly", "5 264 7 7 40 136 1 1", bias=True),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@ids(OF_FORMS)
def test_every_form_gives_the_result(module, case, form):
    """Blocks that share a tile, also by memory that the ring lends, and blocks with nothing to do."""
    kernel = Emulated(
        module, "sm90a", {**H200, "multiprocessors": FORMS[form], "form": form, "shared_bytes": 180 * 1024}
    )
    request = kernel.request(*testing.make_inputs(case).tensors[:3], **case.arguments())
    if module.hopper_plan(request)["bytes"] == 0:  # the largest halo and basis want all memory there is
        kernel.device["shared_bytes"] = H200["shared_bytes"]
        request = kernel.request(*testing.make_inputs(case).tensors[:3], **case.arguments())
    plan = module.hopper_plan(request)
    if not form[0] and form[1] > 1 and case.problem.R == 1:  # there are whole warps of a cluster for 3x3 alone
        assert plan["bytes"] == 0
        return
    assert (plan["shared_out"], plan["blocks"], plan["per_sm"], plan["images"]) == form
    if case.name == "most_filters":
        assert plan["lent"] == (plan["shared_out"] or plan["blocks"] > 1)
    if case.name == "one_tap":  # places of the ring are free before the last tile of it was read
        assert not plan["lent"]
    testing.check(case, kernel)


def request_of(module, sizes):
    one = case("sizes", sizes, padding=ONE)
    p = one.problem
    input = torch.empty(p.N, p.C, p.H, p.W, dtype=BF16, memory_format=torch.channels_last)
    basis_weight, coefficients = torch.empty(p.Q, p.C, 3, 3, dtype=BF16), torch.empty(p.K, p.Q, dtype=BF16)
    return Emulated(module, "sm90a", H200).request(input, basis_weight, coefficients, **one.arguments())


def test_large_maps_are_not_shared_out(module):
    for sizes in ("32 64 56 56 16 64 3 3", "32 64 56 56 32 64 3 3", "32 256 56 56 128 256 3 3"):
        assert not module.hopper_plan(request_of(module, sizes))["shared_out"]


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ("32 512 7 7 256 512 3 3", (True, 3, 1)),
        ("32 512 7 7 128 512 3 3", (True, 3, 1)),
        ("1 512 7 7 256 512 3 3", (True, 8, 1)),
        ("128 512 7 7 256 512 3 3", (False, 2, 2)),
        ("128 512 7 7 128 512 3 3", (False, 2, 2)),
        ("32 256 14 14 128 256 3 3", (False, 2, 1)),
        ("32 256 14 14 64 256 3 3", (False, 2, 1)),
        ("1 256 14 14 64 256 3 3", (True, 4, 1)),
        ("32 512 28 28 256 512 3 3", (False, 1, 1)),
    ],
)
def test_the_form_is_the_one_that_was_measured_to_be_quickest(module, sizes, form):
    """On an H200; docs/gpu.md has the times."""
    plan = module.hopper_plan(request_of(module, sizes))
    assert (plan["shared_out"], plan["blocks"], plan["images"]) == form


def test_all_blocks_together_prefetch_what_comes_through_rings(module):
    for sizes, resident in (("32 512 7 7 256 512 3 3", False), ("32 128 28 28 64 128 3 3", True)):
        request = request_of(module, sizes)
        plan, weights = module.hopper_plan(request), module.packed_bytes(request) - 64
        assert plan["basis_resident"] == resident
        assert plan["ahead"] % 128 == 0
        covered = plan["ahead"] * plan["grid"]
        assert covered == 0 if resident else weights <= covered < weights + 128 * plan["grid"]


def geometry(rng: random.Random, hopper: bool) -> Case:
    """Any geometry with an output pixel, small enough for a second."""
    p = {
        "N": rng.randint(1, 2), "C": rng.randint(1, 80), "Q": rng.randint(1, 70), "K": rng.randint(1, 80),
        "R": rng.randint(1, 4), "S": rng.randint(1, 4),
        "stride": (rng.randint(1, 3), rng.randint(1, 3)), "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "padding": tuple(rng.randint(0, 3) for _ in range(4)),
        "bias": rng.random() < 0.5, "residual": rng.random() < 0.5, "activation": rng.choice([None, "relu", "relu6"]),
        "dtype": rng.choice([BF16, F16]), "channels_last": hopper or rng.random() < 0.5,
        "precise": not hopper and rng.random() < 0.2,
    }  # fmt: skip
    if hopper:
        p["C"] = (p["C"] + 7) // 8 * 8
    for side, kernel, stride, dilation in zip("HW", "RS", p["stride"], p["dilation"], strict=True):
        p[side] = (p[kernel] - 1) * dilation + rng.randint(1, 8) * stride
    return Case("drawn", "", Conv2dProblem(**p))


@pytest.mark.parametrize("variant", ["sm80", "sm90a"])
def test_any_geometry(module, variant, request):
    rng = random.Random(variant)
    kernel = Emulated(module, variant, {"sm80": ADA, "sm90a": ONE_BLOCK}[variant], orders=("shuffled",))
    count = 1_000 if request.config.getoption("--full") else 12
    for _ in range(count):
        drawn = geometry(rng, variant == "sm90a")
        testing.check(drawn, kernel)


@pytest.mark.parametrize("variant", ["sm80", "sm90a"])
def test_the_maps_are_those_of_the_reference(module, variant):
    """What the backward reads: Z, rounded once, exact on whole numbers."""
    sizes = ("2 24 9 11 20 12 3 3", "2 136 7 6 40 12 3 3", "1 24 7 6 20 12 3 3")
    for layout, some in itertools.product({variant == "sm90a", True}, sizes):
        one = case("maps", some, padding=ONE, channels_last=layout)
        inputs = testing.make_inputs(one, values="grid")
        kernel = Emulated(module, variant, H200)
        result = kernel(*inputs.tensors[:4], residual=inputs.residual, keep_maps=True, **one.arguments())
        arguments = {n: v for n, v in one.arguments().items() if n not in ("activation", "precise")}
        maps = reference.basis_maps(inputs.input, inputs.basis_weight, **arguments)
        assert torch.equal(kernel.maps, maps.to(BF16))
        assert torch.equal(result, kernel(*inputs.tensors[:4], residual=inputs.residual, **one.arguments()))


def infinite(kernel, Q, **arguments):
    """One infinite pixel and filters of ones: what it reaches is infinite, and nothing is NaN."""
    one = case("infinite", f"1 136 7 6 {Q} 72 3 3", padding=ONE).at(**arguments)
    tensors = [torch.ones_like(t) for t in testing.make_inputs(one).tensors[:3]]
    tensors[0][0, 3, 2, 2] = torch.inf
    out = kernel(*tensors, **one.arguments())
    return not out.isnan().any() and out.isinf().sum() == 72 * 9


@pytest.mark.parametrize("Q", [5, 16, 30, 200])
def test_filling_up_a_tile_makes_no_nan_of_an_infinity(module, Q):
    """Maps that only fill up a tile have filters of zeros, and zero times infinity is not zero."""
    assert infinite(Emulated(module, "sm80", ADA if Q < 200 else H200, orders=("forward",)), Q)
    assert infinite(Emulated(module, "sm80", H200, orders=("forward",)), Q, precise=True)
    for form in [None, (0, 1, 1, 1), (1, 2, 1, 1), (0, 2, 1, 1)] if Q > 16 else [None]:
        device = {**H200, "multiprocessors": 2} | ({} if form is None else {"form": form})
        assert infinite(Emulated(module, "sm90a", device, orders=("forward",)), Q)


@pytest.mark.parametrize("variant", ["sm80", "sm90a"])
def test_weights_packed_for_another_problem_give_nan(module, variant):
    one = case("packed", "1 8 6 7 5 9 3 3")
    input, basis_weight, coefficients = testing.make_inputs(one).tensors[:3]
    kernel = Emulated(module, variant, H200, orders=("forward",))
    described = kernel.describe(basis_weight, coefficients, **one.arguments())
    right = kernel.packed(basis_weight, coefficients, described)
    assert not kernel(input, basis_weight, coefficients, packed=right, **one.arguments()).isnan().any()
    other = kernel.packed(basis_weight, coefficients, {**described, "K": 8})
    assert kernel(input, basis_weight, coefficients, packed=other, **one.arguments()).isnan().all()


@pytest.mark.parametrize("variant", ["sm80", "sm90a"])
def test_shared_memory_is_read_without_bank_conflicts(module, variant):
    """At stride 1 each of ldmatrix's 8x8 matrices takes one wavefront."""
    one = case("conflicts", "1 64 16 8 64 64 3 3", padding=ONE)
    kernel = Emulated(module, variant, H200, orders=("forward",))
    kernel(*testing.make_inputs(one).tensors[:3], **one.arguments())
    assert kernel.matrices > 0
    assert kernel.conflicts == 0


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("sizes", ["2 72 11 9 100 72 3 3", "1 136 13 12 128 40 3 3", "1 8 9 9 70 24 1 1"])
def test_many_filters_where_memory_is_small(module, sizes, precise):
    """A tap ahead instead of two."""
    one = case("small_memory", sizes, stride=(2, 1), bias=True, residual=True, precise=precise)
    testing.check(one, Emulated(module, "sm80", ADA))


def test_what_has_not_the_memory_says_so(module):
    one = case("too_large", "1 8 6 7 200 9 3 3")
    with pytest.raises(AssertionError, match="too little shared memory for so many basis filters"):
        Emulated(module, "sm80", ADA)(*testing.make_inputs(one).tensors[:3], **one.arguments())
