"""Every backend of ``binary_conv2d`` on every case, output and memory format: whole numbers bit for bit."""

from __future__ import annotations

import doctest
import functools
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basisconv_kernels import PackedTensor, Threshold, binary_conv2d, bitpack, filter_scale, magnitude_map, testing
from basisconv_kernels.core import registry
from basisconv_kernels.ops.binary_conv2d import CANDIDATES
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing.binary_conv2d import VIEWS, BinaryCase, arguments

DEVICE = {"cuda": "cuda"}  # of the tensors; the CPU for all others
# A GPU's backends are listed anywhere and run where there is a device; Triton's run in tests/triton and tests/gpu.
AVAILABLE = [c.name for c in CANDIDATES if c.name in DEVICE or (c.name != "triton" and not registry.absent(c.name))]
# What a backend does differently by dtype: the native one in 16 bits, the reference in float64.
NATIVE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"cpu": NATIVE, "cuda": NATIVE, "reference": (torch.float32, torch.float64)}


def marks(backend):
    return [pytest.mark.gpu] if backend in DEVICE else []


backends = pytest.mark.parametrize("backend", [pytest.param(name, marks=marks(name)) for name in AVAILABLE])
backends_and_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}", marks=marks(backend))
        for backend in AVAILABLE
        for dtype in DTYPES.get(backend, (torch.float32,))
    ],
)
cases = pytest.mark.parametrize("case", testing.BINARY_CASES, ids=lambda case: case.name)


def on(backend, case):
    """The case with its tensors where the backend wants them."""
    return case.at(device=DEVICE.get(backend, "cpu"))


def there(backend, *values):
    """Tensors where the backend wants them."""
    return [value.to(DEVICE.get(backend, "cpu")) for value in values]


def runs(backend, case):
    """The op on this backend, which must not say that it cannot run the case."""
    candidate = next(c for c in CANDIDATES if c.name == backend)
    assert not candidate.supports(case.problem)
    return functools.partial(binary_conv2d, backend=backend)


@backends_and_dtypes
@cases
def test_result(backend, dtype, case):
    case = on(backend, case.at(dtype=dtype))
    testing.check_binary(case, runs(backend, case))


@backends
@pytest.mark.parametrize("planes", [0, 1, 3])
def test_every_number_of_channels(backend, planes):
    for channels in range(1, 131):
        case = testing.binary_case("odd_sizes").at(
            C=channels, K=1 + channels % 41, H=2, W=3, N=1, planes=planes, unsigned=planes > 1
        )
        case = on(backend, case)
        testing.check_binary(case, runs(backend, case), seed=channels)


@st.composite
def drawn(draw):
    """Any geometry that leaves an output pixel."""
    size, pair = st.integers(1, 9), st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, reach[0] - padding[0] - padding[1]), max(1, reach[1] - padding[2] - padding[3])]
    planes = draw(st.integers(0, 4))
    unsigned = planes > 1 or (planes == 1 and draw(st.booleans()))
    problem = BinaryConv2dProblem(
        N=draw(st.integers(0, 3)),
        C=groups * draw(st.integers(1, 70)),
        H=least[0] + draw(size) - 1,
        W=least[1] + draw(size) - 1,
        K=groups * draw(st.integers(1, 70)),
        R=kernel[0],
        S=kernel[1],
        stride=stride,
        padding=padding,
        padding_value=0 if unsigned else draw(st.sampled_from([0, 0, -1, 1])),
        dilation=dilation,
        groups=groups,
        planes=planes,
        unsigned=unsigned,
        channels_last=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    return BinaryCase("drawn", "any geometry", problem, draw(st.sampled_from(VIEWS)))


@backends
def test_any_geometry(backend, request):
    """In the long run the native kernel draws 1e5."""
    long = request.config.getoption("--full")
    count = request.config.getoption("--geometries") or (100_000 if long else 100)

    @settings(max_examples=count if backend == "cpu" else min(count, 40))
    @given(case=drawn(), seed=st.integers(0, 2**31))
    def check(case, seed):
        testing.check_binary(on(backend, case), functools.partial(binary_conv2d, backend=backend), seed=seed)

    check()


@backends
@cases
def test_packed_operands_are_real_ones(backend, case):
    """Input and weight packed by ``bitpack``, in every combination, give the sums of real ones."""
    case = on(backend, case)
    inputs = testing.make_binary_inputs(case)
    call = functools.partial(binary_conv2d, output="int32", backend=backend, **arguments(case))
    packed_input = inputs.input if case.problem.planes else bitpack(inputs.input)
    for input in (inputs.input, packed_input):
        for weight in (inputs.weight, bitpack(inputs.weight)):
            assert torch.equal(call(input, weight), inputs.sums)


@backends
def test_packed_to_packed_is_batchnorm_and_sign_between_layers(backend):
    """Two layers: floats with BatchNorm and sign in between, and bits all the way; γ and α of both signs and zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 40, 9, 8, generator=generator)
    first, second = (torch.randn(*s, 3, 3, generator=generator) for s in ((50, 40), (20, 50)))
    norm = torch.nn.BatchNorm2d(50).double().eval()
    scale = torch.randn(50, generator=generator, dtype=torch.float64)
    scale[::7] = 0
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(50, generator=generator))
        norm.weight[::5] = 0
    norm.to(DEVICE.get(backend, "cpu"))
    x, first, second, scale = there(backend, x, first, second, scale)
    args = {"padding": 1, "backend": backend}
    with torch.no_grad():
        sums = binary_conv2d(x, first, output="int32", **args)
        by_hand = (sums.double() * scale[:, None, None] - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    threshold = Threshold.fold(
        norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, scale=scale
    )  # fmt: skip
    bits = binary_conv2d(x, first, output="packed", threshold=threshold, **args)
    through = binary_conv2d(bits, second, output="int32", **args)
    assert torch.equal(through, binary_conv2d(by_hand.float(), second, output="int32", **args))
    assert bits.words.count_nonzero().item() / bits.words.numel() > 0.1


@backends
def test_scales_shared_by_filters(backend):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 40, 6, 7, generator=generator), torch.randn(8, 40, 3, 3, generator=generator)
    x, weight, group = there(backend, x, weight, torch.tensor([0, 0, 2, 1, 1, 1, 2, 0]))
    scale = filter_scale(weight, group)
    assert torch.allclose(scale[1], weight[[3, 4, 5]].abs().mean())
    shared = binary_conv2d(x, weight, scale, scale_group=group, backend=backend)
    assert torch.equal(shared, binary_conv2d(x, weight, scale[group], backend=backend))
    assert filter_scale(weight, group, groups=5)[3:].tolist() == [0, 0]


def test_magnitude_map_is_the_box_mean_of_the_magnitudes():
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    found = magnitude_map(x, (3, 2), stride=(2, 1), padding=(1, 0, 0, 1), dilation=(1, 2))
    window = torch.nn.functional.pad(x.abs().mean(1, keepdim=True), (0, 1, 1, 0))
    columns = window.unfold(2, 3, 2).unfold(3, 3, 1)[..., [0, 2]]
    torch.testing.assert_close(found, columns.mean((-1, -2)), **testing.tolerances.FORMULA)


@backends
@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_result_and_takes_signs_before(backend, autocast_to):
    x, weight = there(backend, torch.full((1, 3, 4, 4), -1e-12), torch.randn(2, 3, 3, 3))
    with torch.autocast(x.device.type, dtype=autocast_to):
        found = binary_conv2d(x, weight, backend=backend)
        packed = binary_conv2d(bitpack(x), weight, backend=backend)
    assert found.dtype == packed.dtype == autocast_to
    expected = binary_conv2d(x, weight, backend=backend).to(autocast_to)
    assert torch.equal(found, expected)
    assert torch.equal(packed, expected)


def test_float_results_of_packed_inputs_take_the_dtype_of_their_factors():
    packed, weight = bitpack(torch.randn(1, 3, 4, 4)), torch.randn(2, 3, 3, 3).double()
    assert binary_conv2d(packed, weight).dtype == torch.float32
    assert binary_conv2d(packed, weight, bias=torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_tensors_give_the_shape():
    x, weight = torch.empty(2, 5, 8, 9, device="meta"), torch.empty(6, 5, 3, 3, device="meta")
    assert binary_conv2d(x, weight, stride=2).shape == (2, 6, 3, 4)
    bits = binary_conv2d(x, weight, output="packed")
    assert isinstance(bits, PackedTensor)
    assert bits.shape == (2, 6, 6, 7)


def test_the_examples_of_the_documentation_run():
    assert doctest.testmod(importlib.import_module("basisconv_kernels.ops.binary_conv2d")).failed == 0
