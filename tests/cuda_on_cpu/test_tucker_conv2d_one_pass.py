"""The one-pass CUDA kernel of ``tucker_conv2d``, executed on the CPU, in three orders of the threads."""

from __future__ import annotations

import random

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.testing import TuckerCase
from tests.cuda_on_cpu.emulated import A100, ADA, H200
from tests.cuda_on_cpu.emulated_tucker import EmulatedTucker

pytestmark = pytest.mark.xdist_group("tucker_on_cpu")

BF16, F16 = torch.bfloat16, torch.float16
ONE = (1, 1, 1, 1)
ONE_CORE = {**H200, "multiprocessors": 1}  # whose tiles are 16 pixels high


def case(name, sizes, **flags):
    """``sizes`` reads ``N C H W rank_in Q K R S``."""
    n, c, h, w, i, q, k, r, s = map(int, sizes.split())
    flags = {"channels_last": True, "dtype": BF16, **flags}
    return TuckerCase(name, "", TuckerConv2dProblem(N=n, C=c, H=h, W=w, rank_in=i, Q=q, K=k, R=r, S=s, **flags))


def ids(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def kernel(module, device=H200, **settings):
    return EmulatedTucker(module, device, **settings)


def plan_of(module, case, device):
    tensors = testing.make_tucker_inputs(case).tensors
    return module.plan({**kernel(module, device).request(*tensors[:4], **case.arguments())})


TAKEN = [case for case in testing.TUCKER_CASES if not case.problem.precise]
LARGER = [
    case("three_slabs_with_a_tail", "1 136 9 7 24 16 64 3 3", padding=ONE, bias=True),
    case("ranks_of_16", "2 72 17 9 16 16 72 3 3", padding=ONE, residual=True, activation="relu"),
    case("ranks_of_32", "1 64 17 9 32 32 64 3 3", padding=ONE, bias=True),
    case("ranks_of_64", "1 72 9 9 64 40 136 3 3", padding=ONE),
    case("ranks_of_128", "1 72 7 7 128 100 72 3 3", padding=ONE, bias=True),
    case("more_ranks_in_than_out", "1 24 9 9 100 12 40 3 3", padding=ONE),
    case("more_ranks_out_than_in", "1 24 9 9 12 100 40 3 3", padding=ONE, residual=True),
    case("a_window_in_groups", "1 40 17 19 20 20 24 3 3", padding=ONE, stride=(2, 2)),
    case("a_long_filter", "1 24 12 13 16 20 33 5 5", padding=(2, 2, 2, 2)),
    case("one_tap", "2 136 9 10 33 24 400 1 1", activation="relu6"),
    case("odd_channels", "1 19 9 10 9 11 13 3 3", padding=ONE),
    case("nchw", "1 24 9 10 9 11 16 3 3", padding=ONE, channels_last=False),
    case("float16", "1 72 9 9 48 64 64 3 3", dtype=F16, padding=ONE, bias=True),
]


@ids(TAKEN)
def test_every_case_of_the_op(tucker_module, case):
    testing.check_tucker(case.at(dtype=BF16), kernel(tucker_module, A100))


@pytest.mark.parametrize("device", [H200, ONE_CORE], ids=["8 rows", "16 rows"])
@ids(LARGER)
def test_larger_sizes(tucker_module, case, device):
    testing.check_tucker(case, kernel(tucker_module, device))


def test_the_plans_that_these_run(tucker_module):
    """Both heights, all paddings of the ranks, the core at once and in a ring, the window at once and in groups."""
    plans = [plan_of(tucker_module, one, device) for one in LARGER for device in (H200, ONE_CORE)]
    assert {(plan["ranks"], plan["tall"]) for plan in plans} == {
        (16, True), (32, True), (64, True), (128, True), (32, False), (64, False), (128, False),
    }  # fmt: skip
    assert {plan["core_jobs"] > plan["core_stages"] for plan in plans} == {True, False}
    assert {plan["groups"] > 1 for plan in plans} == {True, False}


@pytest.mark.parametrize(("kilobytes", "ahead"), [(163, 2), (144, 2), (104, 1)])
def test_less_shared_memory(tucker_module, kilobytes, ahead):
    """Fewer taps a job, then fewer jobs ahead."""
    device = {**ADA, "shared_bytes": kilobytes * 1024}
    one = case("small", "1 200 9 9 64 64 72 3 3", padding=ONE, bias=True)
    plan = plan_of(tucker_module, one, device)
    assert 0 < plan["bytes"] <= device["shared_bytes"]
    assert (plan["core_jobs"] > 1, plan["ahead"]) == (True, ahead)
    testing.check_tucker(one, kernel(tucker_module, device))


def geometry(rng):
    """Any geometry with an output pixel, small enough for a second."""
    p = {
        "N": rng.randint(1, 2), "C": rng.randint(1, 140), "rank_in": rng.randint(1, 40), "Q": rng.randint(1, 40),
        "K": rng.randint(1, 80), "R": rng.randint(1, 4), "S": rng.randint(1, 4),
        "stride": (rng.randint(1, 3), rng.randint(1, 3)), "dilation": (rng.randint(1, 2), rng.randint(1, 2)),
        "padding": tuple(rng.randint(0, 3) for _ in range(4)),
        "bias": rng.random() < 0.5, "residual": rng.random() < 0.5, "activation": rng.choice([None, "relu", "relu6"]),
        "dtype": rng.choice([BF16, F16]), "channels_last": rng.random() < 0.7,
    }  # fmt: skip
    for side, taps, stride, dilation in zip("HW", "RS", p["stride"], p["dilation"], strict=True):
        p[side] = (p[taps] - 1) * dilation + rng.randint(1, 8) * stride
    return TuckerCase("drawn", "", TuckerConv2dProblem(**p))


def test_any_geometry(tucker_module, request):
    rng = random.Random("one pass")
    for number in range(1_000 if request.config.getoption("--full") else 10):
        device = (H200, ONE_CORE)[number % 2]
        testing.check_tucker(geometry(rng), kernel(tucker_module, device, orders=("shuffled",)))


def test_factors_that_do_not_lie_in_whole_pieces(tucker_module):
    """u_in transposed, and offset: read element by element, with the same bits as the result."""
    one = case("factors", "1 72 9 9 16 16 24 3 3", padding=ONE)
    input, u_in, *rest = testing.make_tucker_inputs(one).tensors[:4]
    transposed = u_in.t().contiguous().t()
    shifted = torch.empty(u_in.numel() + 1, dtype=BF16)[1:].view_as(u_in).copy_(u_in)
    run = kernel(tucker_module)
    expected = run(input, u_in.contiguous(), *rest, **one.arguments())
    for other in (transposed, shifted):
        assert torch.equal(run(input, other, *rest, **one.arguments()), expected)


def outside_is_zero(run, value):
    """0 · ∞ is NaN, but no product is formed outside of the image; inside of it only the right ones."""
    one = case("infinite", "1 8 3 3 4 4 8 3 3", padding=(4, 0, 4, 0))
    input, u_in, *rest = testing.make_tucker_inputs(one).tensors[:4]
    u_in[0, 0] = value
    out = run(input, u_in, *rest, **one.arguments())
    assert out[:, :, :2].isfinite().all()
    assert not out[:, :, 2:, 2:].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_pixels_outside_are_zeros_whatever_the_factor_holds(tucker_module, value):
    outside_is_zero(kernel(tucker_module), value)


def test_weights_packed_for_another_problem_give_nan(tucker_module):
    one = case("packed", "1 8 6 7 5 5 9 3 3")
    input, u_in, core, u_out = testing.make_tucker_inputs(one).tensors[:4]
    run = kernel(tucker_module, orders=("forward",))
    described = run.rest.describe(core, u_out, groups=1, **one.arguments())
    other = run.rest.packed(core, u_out, {**described, "K": 8})
    assert run(input, u_in, core, u_out, packed=other, **one.arguments()).isnan().all()


@pytest.mark.parametrize("device", [H200, ONE_CORE], ids=["8 rows", "16 rows"])
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_shared_memory_is_read_without_bank_conflicts(tucker_module, rank, device):
    one = case("conflicts", f"1 64 16 8 {rank} {rank} 64 3 3", padding=ONE)
    run = kernel(tucker_module, device, orders=("forward",))
    run(*testing.make_tucker_inputs(one).tensors[:4], **one.arguments())
    assert run.matrices > 0
    assert run.conflicts == 0


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({"Q": 129}, H200, "ranks up to 128"),
        ({"rank_in": 129}, H200, "ranks up to 128"),
        ({"precise": True}, H200, "precise forbids"),
        ({}, {**H200, "capability": 75}, "compute capability 8.0"),
        ({"rank_in": 128, "Q": 128, "stride": (3, 3)}, ADA, "too little shared memory"),
        ({}, H200, None),
    ],
)
def test_what_it_does_not_take(tucker_module, changes, device, reason):
    one = case("taken", "1 8 9 9 16 16 16 3 3").at(**changes)
    tensors = testing.make_tucker_inputs(one).tensors
    told = tucker_module.reason(kernel(tucker_module, device).request(*tensors[:4], **one.arguments()))
    assert (told is None) == (reason is None)
    assert reason is None or reason in told
