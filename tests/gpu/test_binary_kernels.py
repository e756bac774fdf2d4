"""The CUDA kernels of ``binary_conv2d`` and ``bitpack`` on a GPU: every instance, graphs, streams, gradients.

The cases of the ops run in ``tests/ops``.
"""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import Threshold, binary_conv2d, binary_conv2d_pack, bitpack, testing
from basisconv_kernels.core.packed import INT32
from basisconv_kernels.ops import binary_conv2d_selfcheck, bitpack_selfcheck
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing.binary_conv2d import arguments
from tests.cuda_on_cpu.test_binary_conv2d import LARGER
from tests.cuda_on_cpu.test_binary_conv2d_sm90a import CASES

kernel = functools.partial(binary_conv2d, backend="cuda")
gpu = pytest.mark.gpu


def a_case(**sizes):
    flags = {"padding": (1, 1, 1, 1), "device": "cuda", "dtype": torch.bfloat16, "channels_last": True}
    sizes = {"N": 4, "C": 128, "H": 28, "W": 28, "K": 128, **sizes}
    return testing.BinaryCase("gpu", "", BinaryConv2dProblem(**{**flags, **sizes}))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_sizes_that_fill_slabs_and_tiles(case, dtype):
    testing.check_binary(case.at(device="cuda", dtype=dtype), kernel)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_kernel_of_hopper_takes(case, dtype):
    testing.check_binary(case.at(device="cuda", dtype=dtype), kernel)


@gpu
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("K", [32, 72, 128, 256])
@pytest.mark.parametrize(
    ("C", "side", "N"),
    [(64, 56, 32), (128, 28, 32), (256, 14, 32), (512, 7, 32), (128, 28, 3), (64, 260, 1), (256, 260, 1)],
)
def test_whole_layers(C, side, N, K, kernel_size):
    """Blocks of 32, 64 and 128 filters, one round and several."""
    border = (kernel_size // 2,) * 4
    sizes = {"N": N, "C": C, "H": side, "W": side, "K": K, "R": kernel_size, "S": kernel_size, "padding": border}
    testing.check_binary(a_case(**sizes, planes=1), kernel)


@gpu
def test_calls_that_follow_each_other_at_once():
    """Each kernel may begin while the one ahead still runs, and must not read before that one has written."""
    weights = [torch.randn(128, 128, 3, 3, device="cuda") for _ in range(2)]
    packed = [binary_conv2d_pack(w) for w in weights]
    bits = bitpack(torch.randn(32, 128, 28, 28, device="cuda"))

    def chain(x):
        for _ in range(10):
            for w, p in zip(weights, packed, strict=True):
                x = kernel(x, w, packed=p, padding=1, output="packed")
        return x

    expected = bits
    for _ in range(10):
        for w in weights:
            sums = binary_conv2d(expected, w, padding=1, output="int32", backend="reference")
            expected = bitpack(sums, backend="reference")
    for _ in range(5):
        assert torch.equal(chain(bits).words, expected.words)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(bits)
    for _ in range(20):
        graph.replay()
    assert torch.equal(captured.words, expected.words)


KINDS = pytest.mark.parametrize("planes", [0, 1, 2], ids=["real", "signs", "codes"])
UNITS = pytest.mark.parametrize("C", [27, 64, 128, 200, 512])  # of four taps, two and one; a slab and several


@gpu
@KINDS
@UNITS
@pytest.mark.parametrize("K", [13, 70], ids=["few filters", "8x8 pixels"])
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_every_instance(K, C, planes, stride):
    """Halos and, at stride 7, single taps; tails in every dimension."""
    sizes = {"N": 2, "H": 19, "W": 21, "C": C, "K": K, "planes": planes, "unsigned": planes > 1}
    testing.check_binary(a_case(**sizes, stride=(stride, stride)), kernel)


@gpu
@KINDS
@UNITS
def test_the_instance_of_large_batches(C, planes):
    """More than 264 tiles of 16x8 pixels, twice the multiprocessors of an H200."""
    sizes = {"N": 16, "H": 33, "W": 21, "C": C, "K": 72, "planes": planes, "unsigned": planes > 1}
    testing.check_binary(a_case(**sizes), kernel)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_the_self_check_of_packing(dtype):
    bitpack_selfcheck.against_reference("cuda", dtype, "cuda")


@gpu
def test_the_self_check():
    binary_conv2d_selfcheck.against_reference("cuda", a_case().problem)


@gpu
def test_float64_filters_and_factors():
    """A filter that rounds to zero is still negative; factors of any float dtype are read as they are."""
    case = a_case(N=2, C=40, K=24)
    inputs = testing.make_binary_inputs(case)
    weight = torch.full((24, 40, 3, 3), -1e-300, device="cuda", dtype=torch.float64)
    given = {"output": "int32", **arguments(case)}
    assert torch.equal(kernel(inputs.input, weight, **given), kernel(inputs.input, -torch.ones_like(weight), **given))
    packed = binary_conv2d_pack(weight)
    assert torch.equal(kernel(inputs.input, weight, packed=packed, **given), kernel(inputs.input, weight, **given))
    for dtype in (torch.float64, torch.float32, torch.float16):
        scale, bias = (torch.arange(24, device="cuda").to(dtype) / 8 for _ in range(2))
        found = kernel(inputs.input, weight, scale, bias, **arguments(case))
        assert torch.equal(found, kernel(inputs.input, weight, scale.bfloat16(), bias.bfloat16(), **arguments(case)))


@gpu
def test_packed_weights():
    inputs = testing.make_binary_inputs(a_case())
    packed = binary_conv2d_pack(bitpack(inputs.weight))
    assert torch.equal(packed, binary_conv2d_pack(inputs.weight))
    given = {**arguments(a_case()), "packed": packed}
    assert torch.equal(kernel(inputs.input, inputs.weight, output="int32", **given), inputs.sums)
    packed[0] += 1
    assert (kernel(inputs.input, inputs.weight, output="int32", **given) == INT32.min).all()
    assert kernel(inputs.input, inputs.weight, **given).isnan().all()
    assert not kernel(inputs.input, inputs.weight, output="packed", **given).words.any()


@gpu
@pytest.mark.parametrize("planes", [0, 1])
def test_twenty_runs_give_the_same_bits(planes):
    inputs = testing.make_binary_inputs(a_case(N=32, planes=planes))
    for output in ("int32", "packed"):
        call = functools.partial(kernel, inputs.input, inputs.weight, output=output, **arguments(a_case()))
        first = call()
        for _ in range(20):
            again = call()
            assert torch.equal(again.words, first.words) if output == "packed" else torch.equal(again, first)


@gpu
def test_a_captured_graph_follows_its_inputs():
    case = a_case()
    inputs = testing.make_binary_inputs(case)
    call = functools.partial(kernel, inputs.input, inputs.weight, inputs.scale, inputs.bias, **arguments(case))
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(20):
        inputs.input.copy_(testing.make_binary_inputs(case, seed).input)
        graph.replay()
        assert torch.equal(out, call()), seed


@gpu
def test_two_streams_at_once():
    made = [testing.make_binary_inputs(a_case(N=16), seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    together = []
    for _ in range(50):
        for inputs, stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(kernel(inputs.input, inputs.weight, output="int32", **arguments(a_case())))
    torch.cuda.synchronize()
    assert all(torch.equal(sums, made[i % 2].sums) for i, sums in enumerate(together))


@gpu
def test_gradients_are_those_of_the_reference():
    inputs = testing.make_binary_inputs(a_case(N=2, dtype=torch.float32))
    leaves = [t.nan_to_num(0.5, 2.0, -2.0).requires_grad_() for t in (inputs.input, inputs.weight)]
    leaves += [t.requires_grad_() for t in (inputs.scale, inputs.bias)]
    found = [
        torch.autograd.grad(binary_conv2d(*leaves, backend=backend, **arguments(a_case())).sum(), leaves)
        for backend in ("cuda", "reference")
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **testing.tolerances.FORMULA)


@gpu
def test_a_network_of_bits_compiles():
    first, second = (torch.randn(64, 64, 3, 3, device="cuda") for _ in range(2))
    threshold = Threshold(torch.zeros(64, dtype=torch.int32, device="cuda"), torch.zeros(64, device="cuda").bool())

    def network(x):
        bits = kernel(x, first, padding=1, output="packed", threshold=threshold)
        return kernel(bits, second, padding=1)

    x = torch.randn(2, 64, 14, 14, device="cuda")
    assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@gpu
@pytest.mark.full
def test_offsets_beyond_32_bits():
    """The last image of a batch of more than 2³¹ elements, alone and in its batch."""
    input = torch.empty(1100, 8, 512, 512, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    input.normal_()
    weight = torch.randn(8, 8, 3, 3, device="cuda")
    out = kernel(input, weight, padding=1)
    assert out.numel() > 2**31
    alone = kernel(input[-1:].clone(memory_format=torch.channels_last), weight, padding=1)
    assert torch.equal(out[-1:], alone)
