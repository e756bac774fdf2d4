"""The Triton kernels of ``basis_conv2d`` on a GPU: every row, the matrix, determinism, graphs, streams, large tensors.

The cases that every backend has to pass run in ``tests/ops``, on a GPU for this backend too. First of all comes what
the interpreter cannot show: bfloat16.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.core import selfcheck
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d_selfcheck
from tests.triton import matrix

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import configs
from tests.triton import rows

kernel = functools.partial(basis_conv2d, backend="triton")
gpu = pytest.mark.gpu


def sized(row: rows.Row) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] if row.arithmetic == configs.HALF else [torch.float32]


@gpu
@pytest.mark.parametrize(
    ("row", "dtype"),
    [pytest.param(row, dtype, id=f"{row} {dtype}") for row in rows.ROWS for dtype in sized(row)],
)
def test_every_row_of_the_tile_table(row, dtype):
    if row.path != "pointers" and torch.cuda.get_device_capability() < configs.DESCRIPTORS_FROM:
        pytest.skip("no tensor memory unit")
    rows.check(row, dtype, "cuda")


def test_the_matrix_covers_all_pairs():
    """On any machine: what a GPU will be asked."""
    choices = matrix.covering()
    assert all(matrix.possible(choice) for choice in choices)
    assert set().union(*map(matrix.pairs_of, choices)) == matrix.all_pairs()
    assert len(choices) < 60


@gpu
@pytest.mark.parametrize("choice", matrix.covering(), ids=lambda choice: "-".join(str(v) for v in choice.values()))
def test_the_matrix(choice):
    case = testing.Case("matrix", "", matrix.problem(choice, "cuda"))
    testing.check(case, kernel, tf32=choice["arithmetic"] == "TF32")


def a_case(dtype=torch.bfloat16, **sizes):
    sizes = {"N": 4, "C": 64, "H": 28, "W": 28, "Q": 32, "K": 96, **sizes}
    problem = Conv2dProblem(
        **sizes, padding=(1, 1, 1, 1), dtype=dtype, device="cuda", channels_last=True, bias=True, residual=True,
        activation="relu",
    )  # fmt: skip
    return testing.Case("gpu", "", problem)


@gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_by_our_own_kernels(monkeypatch, dtype, stride):
    monkeypatch.setattr(configs, "own_gradients", lambda *_: True)
    testing.check_gradients(a_case(dtype, H=14, W=12).at(stride=(stride, stride)), kernel, tf32=True)


@gpu
@pytest.mark.parametrize("sizes", [(24, 16, 40), (24, 13, 40), (13, 21, 35), (64, 16, 64), (8, 64, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_odd_sizes_by_our_own_kernels(monkeypatch, dtype, sizes):
    """The check's upstream gradient is in NCHW: with C or K no multiple of 16 the most addresses of all."""
    monkeypatch.setattr(configs, "own_gradients", lambda *_: True)
    C, Q, K = sizes
    testing.check_gradients(a_case(dtype, N=2, H=9, W=11, C=C, Q=Q, K=K), kernel)


@gpu
def test_gradients_where_cudnn_is_off():
    with torch.backends.cudnn.flags(enabled=False):
        testing.check_gradients(a_case(H=9, W=11), kernel)


@gpu
def test_gradients_by_cudnn():
    testing.check_gradients(a_case(H=14, W=12), kernel)


def call(inputs):
    return kernel(*inputs.tensors[:4], residual=inputs.residual, **inputs.case.arguments())


@gpu
def test_twenty_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(configs, "own_gradients", lambda *_: True)
    inputs = testing.make_inputs(a_case())
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    runs = []
    for _ in range(20):
        out = kernel(*leaves[:4], residual=leaves[4], **inputs.case.arguments())
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@gpu
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
def test_a_captured_graph_follows_its_inputs(channels_last):
    case = a_case().at(channels_last=channels_last)
    inputs = testing.make_inputs(case)
    call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(inputs)
    for seed in range(100):
        inputs.input.copy_(testing.make_inputs(case, seed).input)
        graph.replay()
        assert torch.equal(out, call(inputs))


@gpu
def test_two_streams_at_once():
    made = [testing.make_inputs(a_case(), seed) for seed in range(2)]
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
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts():
    inputs = testing.make_inputs(a_case())
    there = [t.to("cuda:1") for t in inputs.tensors]
    with torch.cuda.device(0):
        out = kernel(*there[:4], residual=there[4], **inputs.case.arguments())
    assert out.device.index == 1
    assert torch.equal(out.to("cuda:0"), call(inputs))


@gpu
@pytest.mark.full
@pytest.mark.parametrize("C", [8, 7], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(C):
    """The last image of a batch of more than 2³¹ elements, alone and in its batch."""
    N, side, K = 1100, 512, 8
    input = torch.empty(N, C, side, side, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    input.normal_()
    assert N * K * side * side > 2**31
    basis = torch.randn(4, C, 3, 3, dtype=torch.bfloat16, device="cuda")
    mixing = torch.randn(K, 4, dtype=torch.bfloat16, device="cuda")
    out = kernel(input, basis, mixing, padding=1)
    assert torch.equal(out[-1:], kernel(input[-1:].clone(memory_format=torch.channels_last), basis, mixing, padding=1))


@gpu
def test_automatic_choice_passes_its_self_check():
    problem = a_case().problem
    assert selfcheck.against(basis_conv2d_selfcheck.triton(problem)) is None
