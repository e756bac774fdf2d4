"""``tucker_conv2d`` under ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from basisconv_kernels import testing, tucker_conv2d
from basisconv_kernels.core import registry
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES
from basisconv_kernels.testing import tucker_conv2d_bounds

AVAILABLE = [candidate.name for candidate in CANDIDATES if registry.absent(candidate.name) is None]
# No size of 1 and none that equals another size of the problem: torch itself compiles a graph of its own for those.
SIZES = ((2, 8, 11), (3, 12, 10), (4, 6, 16))

pytestmark = pytest.mark.usefixtures("fresh_compiler")
backends = pytest.mark.parametrize("backend", AVAILABLE)
compilers = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
CASE = testing.tucker_case("whole_epilogue").at(padding=(1, 1, 0, 2), activation="relu", residual=False)


class Block(torch.nn.Module):
    """The op with weights of its own, as a layer would call it."""

    def __init__(self, backend):
        super().__init__()
        for name, tensor in zip(("u_in", "core", "u_out", "bias"), testing.make_tucker_inputs(CASE).tensors[1:5],
                                strict=True):  # fmt: skip
            setattr(self, name, torch.nn.Parameter(tensor.clone()))
        self.run = functools.partial(tucker_conv2d, padding=(1, 1, 0, 2), activation="relu", backend=backend)

    def forward(self, input, residual=None):
        return self.run(input, self.u_in, self.core, self.u_out, self.bias, residual=residual)


def an_input(n, h, w):
    return testing.make_tucker_inputs(CASE.at(N=n, H=h, W=w)).input.detach().clone()


def agrees(block, found, input):
    """Within the op's tolerance of the oracle: a compiler may fuse and reorder."""
    case = CASE.at(N=input.shape[0], H=input.shape[2], W=input.shape[3])
    weights = [t.detach() for t in (block.u_in, block.core, block.u_out, block.bias)]
    bound = tucker_conv2d_bounds.forward_bound(case.problem, input.detach(), *weights, None)
    return bool(((found.double() - bound.expected).abs() <= bound.allowed).all())


@compilers
@backends
def test_one_graph_serves_all_batches_and_maps(backend, compiler):
    block = Block(backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in SIZES:
            input = an_input(*size)
            assert agrees(block, compiled(input), input)
    assert counter.frame_count == 1


@compilers
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.full), True])
@backends
def test_training(backend, dynamic, compiler):
    block = Block(backend)
    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=dynamic)
    input = an_input(*SIZES[0]).requires_grad_()
    wanted = [input, *block.parameters()]
    expected_out, out = block(input), compiled(input)
    assert agrees(block, out, input)
    grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_out, wanted, grad_output)
    for a, b in zip(torch.autograd.grad(out, wanted, grad_output), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@backends
def test_channels_last_stays_channels_last(backend, dtype):
    block = Block(backend).to(dtype)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    input = an_input(*SIZES[0]).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = compiled(input)
        assert out.stride() == block(input).stride()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, block(input))


@backends
def test_autocast_inside_a_graph(backend):
    block = Block(backend)

    def step(input):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(input)

    input = an_input(*SIZES[0])
    with torch.no_grad():
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(input)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, step(input))


@pytest.mark.parametrize("with_residual", [False, True])
@backends
def test_export_round_trip(backend, with_residual):
    block = Block(backend).eval().requires_grad_(False)
    first = an_input(*SIZES[0])
    arguments = (first, torch.zeros_like(block(first))) if with_residual else (first,)
    shapes = [dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)] * len(arguments)
    program = torch.export.export(block, arguments, dynamic_shapes=tuple(shapes))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES[1:]:
        input = an_input(*size)
        more = (torch.rand_like(block(input)),) if with_residual else ()
        assert torch.equal(loaded(input, *more), block(input, *more))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("basisconv.basis_conv2d") for name in called) == (backend == "cpu")
