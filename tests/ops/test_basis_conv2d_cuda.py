"""What only the CUDA backend has: it is taken where asked for, and on a device graphs, streams and packed weights."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from basisconv_kernels import basis_conv2d, basis_conv2d_pack, testing
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d import CANDIDATES

CUDA = next(candidate for candidate in CANDIDATES if candidate.name == "cuda")
PROBLEM = Conv2dProblem(C=64, Q=16, K=64, N=2, H=9, W=11, dtype=torch.bfloat16, device="cuda", channels_last=True)


def test_it_is_chosen_only_after_its_check():
    check = registry.check_of(CUDA, PROBLEM)
    assert check.variant == "basis_conv2d cuda bfloat16 channels_last 3×3 stride 1,1 C≤64 aligned to 8 Q≤16 K≤64"
    assert registry.check_of(CUDA, replace(PROBLEM, device="cpu")) is None


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float16}, {"channels_last": False}, {"stride": (2, 2)}, {"dilation": (2, 1)}, {"C": 60}, {"Q": 17},
     {"precise": True}, {"groups": 2, "compact": True}, {"R": 5}, {"K": 65}],
    ids=str,
)  # fmt: skip
def test_what_runs_other_code_or_another_plan_is_another_variant(changes):
    variants = {registry.check_of(CUDA, problem).variant for problem in (PROBLEM, replace(PROBLEM, **changes))}
    assert len(variants) == 2


def test_size_of_the_maps_and_epilogue_are_no_variants():
    other = replace(PROBLEM, N=7, H=30, W=31, bias=True, residual=True, activation="relu", padding=(1, 1, 1, 1))
    assert registry.check_of(CUDA, other).variant == registry.check_of(CUDA, PROBLEM).variant


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on CUDA devices, the tensors are on cpu"),
        ({"dtype": torch.float32}, "has no torch.float32 kernel"),
        ({"groups": 2}, "no kernel for groups with coefficients [K, Q]"),
        ({"Q": 300}, "at most 256 basis filters a group, here are 300"),
    ],
)
def test_what_it_does_not_take(changes, reason):
    assert not CUDA.supports(PROBLEM)
    assert any(reason in told for told in CUDA.supports(replace(PROBLEM, **changes)))


def inputs(dtype=torch.bfloat16, seed=0):
    case = testing.case("whole_epilogue").at(dtype=dtype, device="cuda", channels_last=True, C=64)
    return testing.make_inputs(case, seed)


def run(given, **more):
    return basis_conv2d(
        *given.tensors[:4], residual=given.residual, **given.case.arguments(), backend="cuda", **more
    )  # fmt: skip


@pytest.mark.gpu
def test_a_graph_replays_with_new_contents():
    first, second = inputs(), inputs(seed=1)
    packed = basis_conv2d_pack(first.basis_weight, first.coefficients)
    run(first, packed=packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(first, packed=packed)
    for given in (second, inputs(seed=2)):
        first.input.copy_(given.input)
        graph.replay()
        assert torch.equal(out, run(first, packed=packed))


@pytest.mark.gpu
def test_two_streams_do_not_mix():
    given = [inputs(), inputs(seed=1)]
    expected = [run(one) for one in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    found = []
    for _ in range(20):
        for stream, one in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(one))
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected[i % 2]) for i, one in enumerate(found))


@pytest.mark.gpu
def test_packed_weights():
    given = inputs()
    packed = basis_conv2d_pack(given.basis_weight, given.coefficients)
    assert torch.equal(run(given), run(given, packed=packed))
    packed[0] += 1
    assert run(given, packed=packed).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", testing.PERFORMANCE_CASES, ids=lambda case: case.name)
def test_the_sizes_of_the_goals_in_a_batch(case):
    testing.check(case.at(dtype=torch.bfloat16, device="cuda"), functools.partial(basis_conv2d, backend="cuda"))
