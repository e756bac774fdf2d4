"""``tucker_conv2d`` on a GPU: both ways of Triton and of CUDA; the cases of the op run in ``tests/ops``."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from basisconv_kernels import testing, tucker_conv2d, tucker_conv2d_pack
from basisconv_kernels.core import registry, selfcheck
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import tucker_conv2d_model as model
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES

gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
backends = pytest.mark.parametrize("backend", ["cuda", "cuda_one_pass", pytest.param("triton", marks=needs_triton)])
ways = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def a_case(**sizes):
    sizes = {"N": 4, "C": 64, "H": 28, "W": 28, "rank_in": 32, "Q": 24, "K": 96, "dtype": torch.bfloat16, **sizes}
    flags = {"padding": (1, 1, 1, 1), "device": "cuda", "channels_last": True, "bias": True, "residual": True}
    return testing.TuckerCase("gpu", "", TuckerConv2dProblem(**{**flags, **sizes}, activation="relu"))


def call(inputs, backend):
    with torch.no_grad():
        tensors = inputs.tensors
        return tucker_conv2d(*tensors[:5], residual=tensors[5], **inputs.case.arguments(), backend=backend)


@gpu
@needs_triton
@ways
@dtypes
@pytest.mark.parametrize(
    "sizes",
    [{}, {"C": 200, "rank_in": 17, "Q": 31, "K": 257, "H": 13, "W": 57}, {"R": 1, "S": 1, "padding": (0, 0, 0, 0)},
     {"stride": (3, 2), "N": 33, "H": 14}, {"channels_last": False, "dilation": (2, 1)}],
    ids=str,
)  # fmt: skip
def test_both_ways_of_triton(monkeypatch, one_pass, dtype, sizes):
    monkeypatch.setattr(model, "one_pass_pays", lambda problem: one_pass)
    case = a_case(**sizes, dtype=dtype)
    testing.check_tucker(case, functools.partial(tucker_conv2d, backend="triton"))
    testing.check_tucker_gradients(case, functools.partial(tucker_conv2d, backend="triton"))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"rank_in": 30, "Q": 100, "K": 257}, {"channels_last": False}], ids=str)
def test_the_cuda_kernel(dtype, sizes):
    case = a_case(**sizes, dtype=dtype)
    testing.check_tucker(case, functools.partial(tucker_conv2d, backend="cuda"))
    testing.check_tucker_gradients(case, functools.partial(tucker_conv2d, backend="cuda"))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"rank_in": 16, "Q": 16, "K": 64, "H": 57, "W": 59}, {"C": 128, "rank_in": 32, "Q": 32, "N": 33},
        {"C": 256, "rank_in": 64, "Q": 64, "K": 256, "H": 14, "W": 14}, {"rank_in": 128, "Q": 128, "H": 7, "W": 7},
        {"C": 512, "rank_in": 128, "Q": 128, "K": 512, "H": 14, "W": 14, "N": 40}, {"rank_in": 30, "Q": 100, "K": 257},
        {"C": 19, "rank_in": 9, "K": 13}, {"stride": (2, 2)}, {"R": 5, "S": 5, "padding": (2, 2, 2, 2)},
        {"R": 1, "S": 1, "padding": (0, 0, 0, 0)}, {"dilation": (2, 1)}, {"channels_last": False},
    ],
    ids=str,
)  # fmt: skip
def test_cuda_one_pass(dtype, sizes):
    case = a_case(**sizes, dtype=dtype)
    testing.check_tucker(case, functools.partial(tucker_conv2d, backend="cuda_one_pass"))


@gpu
def test_gradients_of_cuda_one_pass_and_packed_weights():
    case = a_case()
    testing.check_tucker_gradients(case, functools.partial(tucker_conv2d, backend="cuda_one_pass"))
    inputs = testing.make_tucker_inputs(case)
    packed = tucker_conv2d_pack(inputs.core, inputs.u_out)
    with torch.no_grad():
        settings = {**case.arguments(), "residual": inputs.residual, "backend": "cuda_one_pass"}
        runs = [tucker_conv2d(*inputs.tensors[:5], **settings, packed=p) for p in (packed, None)]
        traced = torch.compile(lambda *t: tucker_conv2d(*t, **settings, packed=packed), fullgraph=True, backend="eager")
        assert torch.equal(*runs)
        assert torch.equal(traced(*inputs.tensors[:5]), runs[0])


@gpu
@backends
def test_twenty_runs_a_graph_and_two_streams(backend):
    case = a_case()
    inputs = testing.make_tucker_inputs(case)
    first = call(inputs, backend)
    assert all(torch.equal(call(inputs, backend), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(inputs, backend)
    for seed in range(100):
        inputs.input.copy_(testing.make_tucker_inputs(case, seed).input)
        graph.replay()
        assert torch.equal(out, call(inputs, backend)), seed
    both = [testing.make_tucker_inputs(case, seed) for seed in (0, 1)]
    alone = [call(one, backend) for one in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(20):
        for one, expected, stream in zip(both, alone, streams, strict=True):
            with torch.cuda.stream(stream):
                assert torch.equal(call(one, backend), expected)


def the_last_image_is_right(backend):
    """Of a batch of more than 2³¹ elements, alone and in its batch."""
    N, side = 1100, 512
    input = torch.empty(N, 8, side, side, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    input.normal_()
    assert input.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    u_in, core, u_out = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in ((8, 4), (4, 4, 3, 3), (8, 4))
    )
    run = functools.partial(tucker_conv2d, u_in=u_in, core=core, u_out=u_out, padding=1, backend=backend)
    with torch.no_grad():
        assert torch.equal(run(input)[-1:], run(input[-1:].clone(memory_format=torch.channels_last)))


@gpu
@pytest.mark.full
@needs_triton
@ways
def test_offsets_beyond_32_bits(monkeypatch, one_pass):
    monkeypatch.setattr(model, "one_pass_pays", lambda problem: one_pass)
    the_last_image_is_right("triton")


@gpu
@pytest.mark.full
def test_offsets_beyond_32_bits_of_cuda_one_pass():
    the_last_image_is_right("cuda_one_pass")


@gpu
@backends
def test_automatic_choice_passes_its_self_check(backend):
    candidate = next(c for c in CANDIDATES if c.name == backend)
    if against := registry.absent(backend):
        pytest.skip(against)
    assert selfcheck.against(registry.check_of(candidate, a_case().problem)) is None
