"""``basis_conv2d`` under ``torch.compile``, ``torch.export`` and ``opcheck``."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from basisconv_kernels import BasisConv2d, basis_conv2d, testing
from basisconv_kernels.core import registry
from basisconv_kernels.ops.basis_conv2d import CANDIDATES
from basisconv_kernels.ops.basis_conv2d_native import FORMAT as PACK_FORMAT
from basisconv_kernels.testing import tolerances

AVAILABLE = [candidate.name for candidate in CANDIDATES if registry.absent(candidate.name) is None]
# No size of 1 and none that equals another size of the problem: torch itself compiles a graph of its own for those.
SIZES = ((2, 8, 11), (3, 12, 10), (5, 6, 16))

pytestmark = pytest.mark.usefixtures("fresh_compiler")
backends = pytest.mark.parametrize("backend", AVAILABLE)
compilers = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])


class Block(torch.nn.Module):
    """The op with weights of its own, as a layer would call it."""

    def __init__(self, backend):
        super().__init__()
        case = testing.case("whole_epilogue")
        inputs = testing.make_inputs(case)
        self.basis_weight = torch.nn.Parameter(inputs.basis_weight.clone())
        self.coefficients = torch.nn.Parameter(inputs.coefficients.clone())
        self.bias = torch.nn.Parameter(inputs.bias.clone())
        self.run = functools.partial(basis_conv2d, padding=(1, 1, 0, 2), activation="relu", backend=backend)

    def forward(self, input, residual=None):
        return self.run(input, self.basis_weight, self.coefficients, self.bias, residual=residual)


def an_input(n, h, w, seed=0):
    return testing.make_inputs(testing.case("whole_epilogue").at(N=n, H=h, W=w), seed).input.detach().clone()


def agrees(block, found, input):
    """Within the op's tolerance of the oracle: a compiler may fuse and reorder."""
    case = testing.case("whole_epilogue").at(
        N=input.shape[0], H=input.shape[2], W=input.shape[3], padding=(1, 1, 0, 2), residual=False, activation="relu"
    )
    weights = [t.detach() for t in (block.basis_weight, block.coefficients, block.bias)]
    bound = tolerances.forward_bound(case.problem, input.detach(), *weights, None)
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
@pytest.mark.parametrize("dynamic", [None, False, True])
@backends
def test_training(backend, dynamic, compiler):
    block = Block(backend)
    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=dynamic)
    for size in SIZES[:2]:
        input = an_input(*size).requires_grad_()
        wanted = [input, *block.parameters()]
        expected_out = block(input)
        out = compiled(input)
        assert agrees(block, out, input)
        grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        expected = torch.autograd.grad(expected_out, wanted, grad_output)
        for name, a, b in zip(("input", "basis", "coefficients", "bias"), torch.autograd.grad(out, wanted, grad_output),
                              expected, strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@backends
def test_channels_last_stays_channels_last(backend):
    block = Block(backend)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    input = an_input(*SIZES[0]).to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = compiled(input)
        assert out.stride() == block(input).stride()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert agrees(block, out, input)


@backends
def test_autocast_inside_a_graph(backend):
    block = Block(backend)

    def step(input):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(input)

    input = an_input(*SIZES[0])
    with torch.no_grad():
        expected = step(input)
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(input)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@backends
def test_bad_arguments_are_named_under_compile_too(backend):
    block = Block(backend)
    compiled = torch.compile(block, backend="eager")
    with pytest.raises(Exception, match=r"basis_conv2d: input must be \[N, C, H, W\]"):
        compiled(torch.zeros(9, 8, 7))


@pytest.mark.parametrize("with_residual", [False, True])
@backends
def test_export_round_trip(backend, with_residual):
    block = Block(backend).eval().requires_grad_(False)
    first = an_input(*SIZES[0])
    arguments = (first, torch.zeros_like(block(first))) if with_residual else (first,)
    batch, height, width = (torch.export.Dim.DYNAMIC,) * 3
    shapes = [{0: batch, 2: height, 3: width}] * len(arguments)
    program = torch.export.export(block, arguments, dynamic_shapes=tuple(shapes))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES[1:]:
        input = an_input(*size)
        more = (torch.rand_like(block(input)),) if with_residual else ()
        assert torch.equal(loaded(input, *more), block(input, *more))
    if backend == "cpu":
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any(name.startswith("basisconv.basis_conv2d") for name in called)
        assert all(name.startswith(("basisconv.", "aten.")) or "operator" in name or "sym" in name for name in called)


@pytest.mark.full
@pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")
def test_a_program_compiled_ahead_of_time_runs_the_kernel(tmp_path):
    """Layers with the packing of their weights inside: no Python of this package is left in the program."""
    network = torch.nn.Sequential(
        BasisConv2d(6, 9, 3, 4, padding=1, activation="relu"), BasisConv2d(9, 5, 3, 3, stride=2)
    ).eval()
    with torch.no_grad():
        shapes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        program = torch.export.export(network, (torch.randn(2, 6, 8, 11),), dynamic_shapes=(shapes,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for size in ((2, 6, 8, 11), (3, 6, 12, 10)):
            input = torch.randn(size)
            assert torch.equal(compiled(input), network(input))


NATIVE_CASES = (
    "odd_sizes", "groups_compact", "asymmetric_padding", "channels_last_stride", "sliced", "empty_batch",
    "one_channel", "one_channel_channels_last", "one_output_channels_last", "one_pixel_channels_last",
)  # fmt: skip
native = pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")


def native_arguments(case):
    inputs = testing.make_inputs(case)
    p = case.problem
    settings = (p.stride, p.padding, p.dilation, p.groups, p.activation, p.precise)
    return (*inputs.tensors, None, *(list(v) if isinstance(v, tuple) else v for v in settings))


@native
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=pytest.mark.full if half and i else [])
        for i, name in enumerate(NATIVE_CASES)
        for half, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_opcheck(name, dtype):
    op = torch.ops.basisconv.basis_conv2d.default
    result = torch.library.opcheck(op, native_arguments(testing.case(name).at(dtype=dtype)))
    assert set(result.values()) == {"SUCCESS"}


@native
def test_opcheck_of_packing():
    inputs = testing.make_inputs(testing.case("odd_sizes"))
    arguments = (inputs.basis_weight, inputs.coefficients, [1, 1], [1, 1], 1, False, PACK_FORMAT)
    result = torch.library.opcheck(torch.ops.basisconv.basis_conv2d_pack.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@native
def test_the_raw_op_refuses_to_lose_a_gradient():
    arguments = native_arguments(testing.case("bias"))
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.ops.basisconv.basis_conv2d.default(arguments[0].detach().requires_grad_(), *arguments[1:])
