"""The CUDA kernels of ``basis_conv2d`` on a GPU: the matrix, determinism, graphs, streams, large tensors, sanitizers.

The cases of the op and what only this backend has run in ``tests/ops``; the Triton kernels have the like of this file
in ``tests/triton``. ``sm_80`` is reached on any device by an NCHW input, which the Hopper kernel does not take.
"""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d_native import cuda_supports
from bench.gpu import small
from tests.triton import matrix

kernel = functools.partial(basis_conv2d, backend="cuda")
gpu = pytest.mark.gpu
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["sm_90a", "sm_80"])
CHOICES = [choice for choice in matrix.covering() if choice["arithmetic"] in ("bfloat16", "float16")]


def test_the_matrix_has_enough_for_these_kernels():
    """On any machine: 16-bit problems of every kernel, stride and number of basis filters."""
    for factor in ("kernel", "stride", "dilation", "N", "C", "Q", "K", "channels_last"):
        assert {choice[factor] for choice in CHOICES} == set(matrix.FACTORS[factor]), factor
    against = [why for choice in CHOICES for why in cuda_supports(matrix.problem(choice, "cuda"))]
    assert [why for why in against if "memory" not in why] == []


@gpu
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(str(v) for v in choice.values()))
def test_the_matrix(choice):
    testing.check(testing.Case("matrix", "", matrix.problem(choice, "cuda")), kernel)


def a_case(**sizes):
    sizes = {"N": 4, "C": 64, "H": 28, "W": 28, "Q": 32, "K": 96, "dtype": torch.bfloat16, **sizes}
    flags = {"padding": (1, 1, 1, 1), "device": "cuda", "bias": True, "residual": True, "activation": "relu"}
    return testing.Case("gpu", "", Conv2dProblem(**{**flags, **sizes}))


def call(inputs):
    with torch.no_grad():
        return kernel(*inputs.tensors[:4], residual=inputs.residual, **inputs.case.arguments())


@gpu
@LAYOUTS
@pytest.mark.parametrize("Q", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_instance(channels_last, Q, stride, dtype):
    """Each template of the kernels, with a tail in every dimension."""
    sizes = {"N": 3, "C": 136, "H": 19, "W": 21, "Q": Q - 1, "K": 70}
    testing.check(a_case(**sizes, channels_last=channels_last, dtype=dtype, stride=(stride, stride)), kernel)


@gpu
@LAYOUTS
@pytest.mark.parametrize("Q", [5, 16, 30, 100, 200])
@pytest.mark.parametrize("precise", [False, True])
def test_filling_up_a_tile_makes_no_nan_of_an_infinity(channels_last, Q, precise):
    """Maps that only fill up a tile have filters of zeros, and zero times infinity is not zero."""
    x = torch.ones(2, 320, 9, 10, dtype=torch.bfloat16, device="cuda")
    x[0, 3, 2, 2] = torch.inf
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    basis, coefficients = (torch.ones(shape, dtype=x.dtype, device="cuda") for shape in ((Q, 320, 3, 3), (72, Q)))
    with torch.no_grad():
        out = kernel(x, basis, coefficients, padding=1, precise=precise)
    assert not out.isnan().any()
    assert out.isinf().sum() == 72 * 9


# N, C, side, Q, K: what a Hopper of 132 multiprocessors gives to clusters, that share a tile or load the basis for each
# other; with a tile past the last, or with slabs that divide unevenly.
CLUSTERS = [
    (33, 512, 7, 256, 512), (32, 512, 7, 128, 512), (1, 512, 7, 256, 512), (3, 520, 7, 250, 520),
    (127, 512, 7, 256, 512), (127, 512, 7, 128, 512), (31, 256, 14, 128, 256), (32, 256, 14, 64, 256),
    (70, 256, 14, 256, 256),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("sizes", CLUSTERS, ids=str)
def test_clusters(sizes):
    N, C, side, Q, K = sizes
    case = a_case(N=N, C=C, H=side, W=side, Q=Q, K=K, channels_last=True)
    testing.check(case, kernel)
    inputs = testing.make_inputs(case)
    first = call(inputs)
    assert all(torch.equal(call(inputs), first) for _ in range(20))


@gpu
@LAYOUTS
def test_gradients(channels_last):
    testing.check_gradients(a_case(channels_last=channels_last, H=14, W=12), kernel)


@gpu
@LAYOUTS
def test_twenty_runs_give_the_same_bits(channels_last):
    inputs = testing.make_inputs(a_case(channels_last=channels_last, N=32))
    first = call(inputs)
    assert all(torch.equal(call(inputs), first) for _ in range(20))


@gpu
@LAYOUTS
def test_a_captured_graph_follows_its_inputs(channels_last):
    case = a_case(channels_last=channels_last)
    inputs = testing.make_inputs(case)
    call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(inputs)
    for seed in range(100):
        inputs.input.copy_(testing.make_inputs(case, seed).input)
        graph.replay()
        assert torch.equal(out, call(inputs)), seed


@gpu
@LAYOUTS
def test_two_streams_at_once(channels_last):
    made = [testing.make_inputs(a_case(channels_last=channels_last, N=16), seed) for seed in range(2)]
    alone = [call(inputs) for inputs in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    together = []
    for _ in range(50):
        for inputs, stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(call(inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(result, alone[i % 2]) for i, result in enumerate(together))


@gpu
@LAYOUTS
def test_after_a_kernel_that_leaves_other_numbers_in_shared_memory(channels_last):
    inputs = testing.make_inputs(a_case(channels_last=channels_last))
    first = call(inputs)
    dirt = torch.full((4096, 4096), float("nan"), device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        dirt @ dirt
        assert torch.equal(call(inputs), first)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts():
    inputs = testing.make_inputs(a_case(channels_last=True))
    there = [t.to("cuda:1") for t in inputs.tensors]
    with torch.cuda.device(0):
        out = kernel(*there[:4], residual=there[4], **inputs.case.arguments())
    assert out.device.index == 1
    assert torch.equal(out.to("cuda:0"), call(inputs))


@gpu
@pytest.mark.full
@LAYOUTS
def test_offsets_beyond_32_bits(channels_last):
    """The last image of a batch of more than 2³¹ elements, alone and in its batch."""
    N, side, K = 1100, 512, 8
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(N, 8, side, side, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    assert N * K * side * side > 2**31
    basis = torch.randn(4, 8, 3, 3, dtype=torch.bfloat16, device="cuda")
    mixing = torch.randn(K, 4, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        out = kernel(input, basis, mixing, padding=1)
        alone = kernel(input[-1:].clone(memory_format=layout), basis, mixing, padding=1)
    assert torch.equal(out[-1:], alone)


@gpu
@pytest.mark.parametrize("name", small.CALLS)
def test_small_calls_of_the_sanitizers(name):
    """Without a tool: what ``gpu-check`` then runs under each of them."""
    assert small.main(name) in (0, 3)


def test_the_sanitizers_say_what_they_miss():
    """On a machine without a device the small calls end with the reason, not with a trace."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert {small.main(name) for name in small.CALLS} == {3}
