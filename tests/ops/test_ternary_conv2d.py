"""Every backend of ``ternary_conv2d`` on every case and dtype: values, gradients, errors, tracing, faulty kernels."""

from __future__ import annotations

import doctest
import functools
import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BackendUnavailable, bitpack, testing
from basisconv_kernels.core import registry
from basisconv_kernels.ops.ternary_conv2d import CANDIDATES, ternary_conv2d, ternary_planes, ternary_weight
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import Mismatch
from basisconv_kernels.testing import ternary_conv2d as ternary

# Triton's kernel runs in tests/triton and tests/gpu.
AVAILABLE = [c.name for c in CANDIDATES if c.name != "triton" and registry.absent(c.name) is None]
BY_NAME = {case.name: case for case in ternary.TERNARY_CASES}

dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", AVAILABLE)


def run_on(backend, case):
    """The op bound to a backend; skips where it cannot run the case."""
    against = next(c for c in CANDIDATES if c.name == backend).supports(case.problem)
    if against:
        pytest.skip("; ".join(against))
    return functools.partial(ternary_conv2d, backend=backend)


@backends
@dtypes
@pytest.mark.parametrize("name", BY_NAME)
def test_result(backend, dtype, name):
    if backend == "reference" and dtype is torch.float16:
        pytest.skip("computes as in bfloat16")
    case = BY_NAME[name].at(dtype=dtype)
    ternary.check(case, run_on(backend, case))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["odd_sizes", "two_scales", "no_scale", "groups", "stride", "sliced", "transposed", "empty"]
)
def test_gradients(backend, dtype, name):
    case = BY_NAME[name].at(dtype=dtype)
    ternary.check_gradients(case, run_on(backend, case))


@st.composite
def cases(draw):
    """Any geometry that leaves an output pixel, any density."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    problem = TernaryConv2dProblem(
        N=draw(st.integers(0, 3)),
        C=groups * draw(st.sampled_from([1, 2, 3, 8, 19, 33, 70])),
        H=max(1, (kernel[0] - 1) * dilation[0] + 1 - padding[0] - padding[1]) + draw(st.integers(1, 9)),
        W=max(1, (kernel[1] - 1) * dilation[1] + 1 - padding[2] - padding[3]) + draw(st.integers(1, 40)),
        K=groups * draw(st.integers(1, 19)),
        R=kernel[0],
        S=kernel[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        scales=draw(st.sampled_from(["none", "one", "two"])),
        channels_last=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
    )
    view = draw(st.sampled_from(["dense", "offset", "sliced", "expanded", "transposed"]))
    density = draw(st.sampled_from([0.0, 0.03, 0.3, 0.7, 1.0]))
    return ternary.TernaryCase("drawn", "any geometry", problem, view, density)


@backends
@dtypes
def test_any_geometry(backend, dtype, geometries):
    run = run_on(backend, BY_NAME["odd_sizes"].at(dtype=dtype))

    ordinary = 20 if backend == "reference" else 60  # the long run draws as many as it is told, of a native kernel

    @settings(max_examples=geometries if geometries > 150 and backend != "reference" else ordinary)
    @given(case=cases(), seed=st.integers(0, 2**31))
    def check(case, seed):
        ternary.check(case.at(dtype=dtype), run, seed=seed)

    check()


@backends
@pytest.mark.parametrize("name", ["odd_sizes", "two_scales", "channels_last", "stride"])
def test_nan_reaches_the_outputs_that_read_it_and_no_other(backend, name):
    """A weight of 0 reads nothing; plain PyTorch multiplies by it, so NaN there spreads further."""
    case = BY_NAME[name]
    inputs = ternary.make_inputs(case)
    inputs.input[0, 1, 3, 4] = torch.nan
    found = ternary.call(run_on(backend, case), inputs).isnan()
    dense = ternary.plain(inputs).isnan()
    assert not (found & ~dense).any()
    assert found.any()


FAULTS = {
    "forgets the bias": lambda x, p, s, b, **a: ternary_conv2d(x, p, s, None, **a),
    "forgets the scale": lambda x, p, s, b, **a: ternary_conv2d(x, p, None, b, **{**a, "negative_scale": None}),
    "one scale for both": lambda x, p, s, b, **a: ternary_conv2d(x, p, s, b, **{**a, "negative_scale": None}),
    "planes swapped": lambda x, p, s, b, **a: ternary_conv2d(x, p.flip(1), s, b, **a),
    "bit order reversed": lambda x, p, s, b, **a: ternary_conv2d(
        x, ternary_planes(ternary_weight(p, x.shape[1]).flip(1)), s, b, **a
    ),
    "pads with ones": lambda x, p, s, b, **a: ternary_conv2d(
        torch.nn.functional.pad(x, (1, 1, 1, 1), value=1.0), p, s, b, **{**a, "padding": 0}
    ),
    "rounds in between": lambda x, p, s, b, **a: ternary_conv2d(x, p, s, b, **a).to(torch.bfloat16).to(x.dtype),
    "the other memory format": lambda x, p, s, b, **a: ternary_conv2d(x, p, s, b, **a).to(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_catches(fault):
    with pytest.raises(Mismatch):
        ternary.check(BY_NAME["two_scales"], FAULTS[fault])


WRONG = {
    "input must be [N, C, H, W]": {"input": torch.zeros(3, 4, 4)},
    "planes must be int32": {"planes": torch.zeros(4, 2, 3, 3, 1)},
    "planes must be a Tensor": {"planes": None},
    "and of -1 and no empty side, got [2, 4, 3, 3, 1]": {"planes": torch.zeros(2, 4, 3, 3, 1, dtype=torch.int32)},
    "words = ceil(C/groups / 32) = 1": {"planes": torch.zeros(4, 2, 3, 3, 2, dtype=torch.int32)},
    "scale must be [K] with K = planes.shape[0] = 4": {"scale": torch.ones(3)},
    "negative_scale needs scale": {"scale": None, "negative_scale": torch.ones(4)},
    "scale must have the dtype of input": {"scale": torch.ones(4, dtype=torch.float64)},
    "bias must be [K] with K": {"bias": torch.zeros(5)},
    "groups must be at least 1": {"groups": 0},
    "divisible by groups = 4": {"groups": 4},
    "groups must be an int": {"groups": 1.0},
    "activation must be": {"activation": "tanh"},
    "stride must be at least 1": {"stride": 0},
    "smaller than the dilated kernel": {"dilation": 5},
    "float32, bfloat16, float16 or float64": {"input": torch.zeros(1, 5, 6, 6, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_what_is_wrong(message):
    good = {
        "input": torch.zeros(1, 5, 6, 6),
        "planes": torch.zeros(4, 2, 3, 3, 1, dtype=torch.int32),
        "scale": torch.ones(4),
        "bias": torch.zeros(4),
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as raised:
        ternary_conv2d(**{**good, **WRONG[message]})
    assert str(raised.value).startswith("ternary_conv2d: ")


def test_an_unknown_backend_is_refused_with_reasons():
    inputs = ternary.make_inputs(BY_NAME["odd_sizes"])
    with pytest.raises(BackendUnavailable, match="reference: can run"):
        ternary.call(functools.partial(ternary_conv2d, backend="nonexistent"), inputs)


@backends
def test_one_number_scales_all_outputs(backend):
    inputs = ternary.make_inputs(BY_NAME["odd_sizes"])
    call = functools.partial(ternary_conv2d, inputs.input, inputs.planes, padding=1, backend=backend)
    number = torch.tensor(0.375, requires_grad=True)
    found = call(number)
    assert torch.equal(found, call(torch.full((13,), 0.375)))
    assert torch.equal(found, call(torch.tensor([0.375])))
    found.sum().backward()
    assert number.grad.shape == ()


native = pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")


@native
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("size", [(1, 40, 30), (3, 24, 9)], ids=str)
def test_number_of_threads_does_not_change_a_bit(size, channels_last, threads):
    N, C, side = size
    problem = TernaryConv2dProblem(
        N=N, C=C, K=50, H=side, W=side, padding=(1, 1, 1, 1), channels_last=channels_last, bias=True
    )
    assert problem.macs() > 3 * 2**19 or N > 1  # kMacsWorthAThread of csrc/ops/ternary_conv2d.cpp
    case = ternary.TernaryCase("threads", "shared among threads", problem)
    inputs = ternary.make_inputs(case)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with testing.poisoned_allocations():
            results.append(ternary.call(run_on("cpu", case), inputs))
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@native
@pytest.mark.parametrize("name", ["odd_sizes", "past_a_word", "groups", "empty", "linear"])
def test_packed_planes_change_nothing(name):
    case = BY_NAME[name]
    inputs = ternary.make_inputs(case)
    p = case.problem
    packed = ternary_conv2d_pack(inputs.planes, p.C // p.groups, groups=p.groups)
    run = run_on("cpu", case)
    expected = ternary.call(run, inputs)
    assert torch.equal(ternary.call(functools.partial(run, packed=packed), inputs), expected)
    # As in a compiled graph, with room for filters without a zero.
    sizes = (p.C // p.groups, p.groups)
    roomy = torch.ops.basisconv.ternary_conv2d_pack_fixed(inputs.planes, *sizes)
    assert roomy.numel() == torch.ops.basisconv.ternary_conv2d_fixed_bytes(list(inputs.planes.shape), *sizes)
    assert torch.equal(roomy[: packed.numel()], packed)
    assert not roomy[packed.numel() :].any()
    assert torch.equal(ternary.call(functools.partial(run, packed=roomy), inputs), expected)


@native
@pytest.mark.parametrize("wrong", ["too short", "another type", "zeros", "other planes", "beyond", "out of order"])
def test_what_is_no_packing_of_these_planes_is_refused(wrong):
    inputs = ternary.make_inputs(BY_NAME["sparse"])  # few weights: lists are read, where there is a matrix unit too
    packed = ternary_conv2d_pack(inputs.planes, 20)
    beyond, shuffled = packed.clone(), packed.clone()
    beyond[-2:] = 255  # an entry that names no tap
    shuffled[64] = 255  # a list that begins behind the next one
    made = {
        "too short": packed[:-2],
        "another type": packed.float(),
        "zeros": torch.zeros_like(packed),
        "other planes": ternary_conv2d_pack(inputs.planes[1:], 20),
        "beyond": beyond,
        "out of order": shuffled,
    }[wrong]
    with pytest.raises((RuntimeError, ValueError), match="ternary_conv2d: packed "):
        ternary.call(functools.partial(ternary_conv2d, packed=made, backend="cpu"), inputs)


@backends
def test_flop_counter_counts_two_a_multiply_add_of_the_dense_convolution(backend):
    for name in ("odd_sizes", "groups", "stride"):
        inputs = ternary.make_inputs(BY_NAME[name].at(scales="one"))
        with FlopCounterMode(display=False) as counter:
            ternary.call(run_on(backend, inputs.case), inputs)
        assert counter.get_total_flops() == 2 * inputs.case.problem.macs()


@backends
@pytest.mark.parametrize("planes", [None, 1, 3])
def test_packed_activations_are_whole_numbers(backend, planes):
    """Signs and codes: exact sums, true zero padding, channels past a word."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-1, 2, (6, 37, 3, 3), generator=generator)
    if planes is None:
        values = torch.randint(0, 2, (2, 37, 5, 7), generator=generator) * 2 - 1
        packed = bitpack(values.float())
    else:
        values = torch.randint(0, 2**planes, (2, 37, 5, 7), generator=generator)
        packed = bitpack(values.float(), bits=planes, unsigned=True)
    settings = {"padding": (1, 2), "stride": (2, 1), "backend": backend}
    found = ternary_conv2d(packed, ternary_planes(weight), **settings)
    expected = torch.nn.functional.conv2d(values.double(), weight.double(), padding=(1, 2), stride=(2, 1))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.double(), expected)
    many = torch.randint(-1, 2, (40, 37, 3, 3), generator=generator)
    scale, negative, bias = (torch.randint(-3, 4, (40,), generator=generator).float() for _ in range(3))
    epilogue = {"negative_scale": negative, "activation": "relu"}
    fused = ternary_conv2d(packed, ternary_planes(many), scale, bias, padding=1, backend=backend, **epilogue)
    real = ternary_conv2d(values.float(), ternary_planes(many), scale, bias, padding=1, backend=backend, **epilogue)
    assert torch.equal(fused, real)
    scaled = ternary_conv2d(packed, ternary_planes(weight), torch.tensor(0.5, dtype=torch.bfloat16), **settings)
    assert torch.equal(scaled, (0.5 * expected).to(torch.bfloat16))


@backends
def test_sums_of_packed_activations_that_need_more_than_16_bits(backend):
    """300 channels of 15, all weights +1: 40500 is past 2^15."""
    packed = bitpack(torch.full((1, 300, 3, 3), 15.0), bits=4, unsigned=True)
    found = ternary_conv2d(packed, ternary_planes(torch.ones(2, 300, 3, 3)), backend=backend)
    assert found.flatten().tolist() == [300 * 9 * 15.0] * 2


@backends
def test_scales_of_packed_activations_have_gradients(backend):
    packed = bitpack(torch.randn(2, 20, 5, 5, generator=torch.Generator().manual_seed(1)))
    scale = torch.rand(4).requires_grad_()
    planes = ternary_planes(torch.randint(-1, 2, (4, 20, 3, 3), generator=torch.Generator().manual_seed(2)))
    ternary_conv2d(packed, planes, scale, backend=backend).sum().backward()
    torch.testing.assert_close(scale.grad, ternary_conv2d(packed, planes, backend=backend).sum((0, 2, 3)))


@backends
def test_autocast_casts_numbers_and_leaves_planes(backend):
    inputs = ternary.make_inputs(BY_NAME["two_scales"])
    cast = ternary.make_inputs(BY_NAME["two_scales"].at(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ternary.call(run_on(backend, inputs.case), inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ternary.call(run_on(backend, cast.case), cast))


def test_double_backward_and_vmap_are_refused_by_name():
    inputs = ternary.make_inputs(BY_NAME["two_scales"])
    x = inputs.input.detach().requires_grad_()
    out = ternary_conv2d(x, inputs.planes, inputs.scale, padding=1)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="ternary_conv2d: double backward"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match=r"ternary_conv2d: torch\.vmap"):
        torch.vmap(lambda image: ternary_conv2d(image[None], inputs.planes))(x)


@backends
def test_compiled_without_a_break(backend, fresh_compiler):
    case = BY_NAME["two_scales"]
    inputs = ternary.make_inputs(case)
    run = run_on(backend, case)

    def network(x, scale):
        return run(x, inputs.planes, scale, inputs.bias, negative_scale=inputs.negative_scale, padding=1).sin()

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [[t.detach().requires_grad_() for t in (inputs.input, inputs.scale)] for _ in range(2)]
    results = [f(*own) for f, own in zip((network, compiled), leaves, strict=True)]
    testing.check_same_layer(results[1], results[0])
    for result in results:
        result.sum().backward()
    for ours, theirs in zip(leaves[1], leaves[0], strict=True):
        testing.check_same_layer(ours.grad, theirs.grad)


@backends
def test_meta_tensors_and_an_empty_map(backend):
    inputs = ternary.make_inputs(BY_NAME["stride"])
    if backend == "reference":
        meta = ternary_conv2d(inputs.input.to("meta"), inputs.planes.to("meta"), stride=(2, 3), padding=1)
        assert meta.shape == (2, 8, 6, 5)
    bias = torch.randn(8)
    out = ternary_conv2d(inputs.input[:, :, :0], inputs.planes, None, bias, padding=2, backend=backend)
    assert torch.equal(out, bias[:, None, None].expand_as(out))


def test_the_examples_of_the_documentation_run():
    assert doctest.testmod(importlib.import_module("basisconv_kernels.ops.ternary_conv2d")).failed == 0
