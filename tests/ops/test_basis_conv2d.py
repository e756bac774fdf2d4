"""Every backend of ``basis_conv2d`` on every case and dtype: values, packing, threads, choice of the backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BackendUnavailable, basis_conv2d, basis_conv2d_pack, testing, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d import CANDIDATES
from basisconv_kernels.testing import tolerances

OP = "basis_conv2d"
NATIVE = ("cpu", "cuda")
# The backends that run on CPU tensors here.
AVAILABLE = [name for name, why in registry.reasons(CANDIDATES, Conv2dProblem(C=8, Q=4, K=8)).items() if not why]

dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EPILOGUE = {"bias": True, "residual": True, "activation": "relu"}


def parameters(cases, above=float("inf")):
    """Cases as readable ids; those with a batch go into the long run where ``above`` says so."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.full] if above < case.problem.N else []) for case in cases
    ]


def call(kernel, inputs, **more):
    return kernel(*inputs.tensors[:4], residual=inputs.residual, **{**inputs.case.arguments(), **more})


@dtypes
@pytest.mark.parametrize("case", parameters(testing.CASES))
def test_result(kernel, case, dtype):
    testing.check(kernel.case(case, dtype), kernel.run)


@dtypes
@pytest.mark.parametrize("case", parameters(testing.PERFORMANCE_CASES, above=1))
def test_result_at_the_sizes_of_the_goals(kernel, case, dtype):
    testing.check(kernel.case(case, dtype), kernel.run)


@st.composite
def problems(draw):
    """Any geometry that leaves an output pixel, with sizes that reach past one register block now and then."""
    size = st.integers(1, 9)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, reach[0] - padding[0] - padding[1]), max(1, reach[1] - padding[2] - padding[3])]
    compact = groups > 1 and draw(st.booleans())
    problem = Conv2dProblem(
        N=draw(st.integers(0, 3)),
        C=groups * draw(st.sampled_from([1, 2, 3, 5, 8, 16, 19])),
        H=least[0] + draw(size),
        W=least[1] + draw(size),
        Q=groups * draw(st.integers(1, 20)),
        K=draw(st.integers(1, 37)) * (groups if compact else 1),
        R=kernel[0],
        S=kernel[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        compact=compact,
        channels_last=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
        precise=draw(st.booleans()),
    )
    view = draw(st.sampled_from(["dense", "offset", "sliced", "expanded", "transposed", "mixed"]))
    return testing.Case("drawn", "any geometry", problem, view)


@dtypes
def test_any_geometry(kernel, dtype, geometries):
    # The number asked for is that of a native kernel; plain PyTorch, and kernels that are interpreted, draw fewer.
    @settings(max_examples=geometries if kernel.name in NATIVE else min(geometries, 500))
    @given(case=problems(), seed=st.integers(0, 2**31))
    def check(case, seed):
        testing.check(kernel.case(case, dtype), kernel.run, seed=seed)

    check()


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("name", ["odd_sizes", "channels_last_stride", "past_a_block", "n1_64to64_at56_q12"])
def test_nan_spreads_as_in_plain_pytorch(kernel, name, activation, precise):
    """From every tensor to the outputs that read it and to no other: no activation hides one, no tile spreads one.

    Where wide Winograd tiles are allowed, the native kernel may carry it two columns further.
    """
    case = testing.case(name).at(bias=True, residual=True, activation=activation, precise=precise)
    inputs = testing.make_inputs(kernel.case(case, torch.float32))
    for tensor in inputs.tensors:
        middle = tuple(size // 2 for size in tensor.shape)
        kept = tensor[middle].item()
        tensor[middle] = torch.nan
        got, plain = call(kernel.run, inputs).isnan(), testing.plain(case, inputs.tensors).isnan()
        at_most = plain
        if kernel.name == "cpu" and tolerances.winograd_growth(case.problem) == tolerances.WINOGRAD_WIDE:
            at_most = F.max_pool2d(plain.float(), (1, 5), 1, (0, 2)) > 0
        assert not (plain & ~got).any()
        assert not (got & ~at_most).any()
        tensor[middle] = kept


# Cases of so much work that the native kernel shares it among threads, and what is special about the sharing. Small
# ones run on the thread that called, whatever the number of threads.
SHARED = {
    "n1_64to64_at56_q12": "Winograd, some tile rows a thread",
    "n1_512to512_at7_q128": "weights beyond the cache, fewer rows than threads could take",
    "n1_128to256_at28_q64_stride2": "direct, with a stride",
    "n1_32to96_at28_q24_5x5": "direct, rows that two threads both read",
}
WORTH_A_THREAD = 2**19  # multiply-accumulates; kMacsWorthAThread of csrc/ops/basis_conv2d.cpp


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHARED)
def test_number_of_threads_does_not_change_a_bit(kernel, name, dtype, channels_last, threads):
    if kernel.name.startswith("reference"):
        pytest.skip("PyTorch's convolutions choose their algorithm by the number of threads")
    case = kernel.case(testing.case(name).at(channels_last=channels_last, **EPILOGUE), dtype)
    assert case.problem.macs() >= 3 * WORTH_A_THREAD
    inputs = testing.make_inputs(case)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with testing.poisoned_allocations():
            results.append(call(kernel.run, inputs))
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("count", [1, 2])
def test_two_threads_at_once(kernel, count, threads):
    """Calls of several sizes at the same time, each on one or two threads of torch, give what they give alone."""
    threads(count)
    names = ("odd_sizes", "channels_last", "whole_epilogue", "large_kernel", "n1_128to256_at28_q64_stride2")
    made = [testing.make_inputs(kernel.case(testing.case(name), torch.float32)) for name in names]
    alone = [call(kernel.run, inputs) for inputs in made]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: call(kernel.run, made[i % len(made)]), range(40)))
    assert all(torch.equal(result, alone[i % len(made)]) for i, result in enumerate(together))


@dtypes
@pytest.mark.parametrize("case", parameters(testing.CASES))
def test_packed_weights_change_nothing(case, dtype):
    inputs = testing.make_inputs(case.at(dtype=dtype))
    p = case.problem
    packed = basis_conv2d_pack(
        inputs.basis_weight, inputs.coefficients,
        stride=p.stride, dilation=p.dilation, groups=p.groups, precise=p.precise,
    )  # fmt: skip
    native = "cpu" in AVAILABLE and dtype is not torch.float64
    assert (packed is not None) == native
    assert torch.equal(call(basis_conv2d, inputs, packed=packed), call(basis_conv2d, inputs))


@pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")
@pytest.mark.parametrize(
    "wrong",
    ["too short", "too long", "another type", "another device", "zeros", "another stride", "other weights", "halves"],
)
def test_what_is_no_packing_of_these_weights_is_refused(wrong):
    inputs = testing.make_inputs(testing.case("channels_last"))
    packed = basis_conv2d_pack(inputs.basis_weight, inputs.coefficients)
    packed = {
        "too short": packed[:-1],
        "too long": torch.cat([packed, packed]),
        "another type": packed.float(),
        "another device": packed.to("meta"),
        "zeros": torch.zeros_like(packed),
        "halves": basis_conv2d_pack(inputs.basis_weight.half(), inputs.coefficients.half()),
        "another stride": basis_conv2d_pack(inputs.basis_weight, inputs.coefficients, stride=2),
        "other weights": basis_conv2d_pack(inputs.basis_weight[1:], inputs.coefficients[:, 1:]),
    }[wrong]
    with pytest.raises((RuntimeError, ValueError), match="basis_conv2d: packed "):
        call(basis_conv2d, inputs, packed=packed, backend="cpu")


def test_every_form_of_padding_and_pairs():
    case = testing.case("odd_sizes")
    inputs = testing.make_inputs(case)
    forms = [1, (1, 1), [1, 1], (1, 1, 1, 1), "same"]
    expected = call(basis_conv2d, inputs)
    for padding in forms:
        for ones in (1, (1, 1), [1, 1]):
            assert torch.equal(call(basis_conv2d, inputs, padding=padding, stride=ones, dilation=ones), expected)
    assert torch.equal(call(basis_conv2d, inputs, padding="valid"), call(basis_conv2d, inputs, padding=0))


def test_same_padding_puts_the_odd_excess_to_the_bottom_and_the_right():
    inputs = testing.make_inputs(testing.case("even_kernel"))
    found = call(basis_conv2d, inputs, padding="same")
    assert found.shape[2:] == inputs.input.shape[2:]
    assert torch.equal(found, call(basis_conv2d, inputs, padding=(0, 1, 1, 2)))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_flop_counter_counts_two_a_multiply_add(backend):
    for name in ("odd_sizes", "stride", "groups_compact"):
        case = testing.case(name)
        inputs = testing.make_inputs(case)
        with FlopCounterMode(display=False) as counter:
            call(basis_conv2d, inputs, backend=backend)
        assert counter.get_total_flops() == 2 * case.problem.macs()


@pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")
def test_the_profiler_shows_the_op_and_its_gradient_by_name():
    inputs = testing.make_inputs(testing.case("odd_sizes"))
    coefficients = inputs.coefficients.clone().requires_grad_()
    with torch.profiler.profile() as profile:
        basis_conv2d(inputs.input, inputs.basis_weight, coefficients, backend="cpu").sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"basisconv::basis_conv2d_maps", "BasisConv2dEagerFunction", "BasisConv2dEagerFunctionBackward"} <= names


@pytest.mark.parametrize("backend", AVAILABLE)
def test_use_backend_is_the_same_as_the_argument(backend):
    inputs = testing.make_inputs(testing.case("channels_last"))
    with use_backend(backend):
        wished = call(basis_conv2d, inputs)
    assert torch.equal(wished, call(basis_conv2d, inputs, backend=backend))


def test_the_argument_wins_over_use_backend():
    inputs = testing.make_inputs(testing.case("channels_last"))
    with use_backend("nonexistent"):
        assert torch.equal(
            call(basis_conv2d, inputs, backend="reference"), call(basis_conv2d, inputs, backend="reference")
        )
        with pytest.raises(BackendUnavailable, match="nonexistent"):
            call(basis_conv2d, inputs)
        with use_backend(None):
            call(basis_conv2d, inputs)


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_autocast_casts_first(backend, autocast_to):
    case = testing.case("whole_epilogue")
    inputs = testing.make_inputs(case)
    cast = [t.to(autocast_to) for t in inputs.tensors]
    with torch.autocast("cpu", dtype=autocast_to):
        found = call(basis_conv2d, inputs, backend=backend)
        mixed = basis_conv2d(
            cast[0], *inputs.tensors[1:4], residual=inputs.residual, **case.arguments(), backend=backend
        )
    expected = basis_conv2d(*cast[:4], residual=cast[4], **case.arguments(), backend=backend)
    assert found.dtype == autocast_to
    assert torch.equal(found, expected)
    assert torch.equal(mixed, expected)


def test_autocast_leaves_float64_alone_as_conv2d_does():
    inputs = testing.make_inputs(testing.case("bias").at(dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.conv2d(inputs.input, inputs.basis_weight).dtype == torch.float64
        assert call(basis_conv2d, inputs).dtype == torch.float64


def test_meta_tensors_give_the_shape():
    case = testing.case("stride")
    tensors = [t.to("meta") for t in testing.make_inputs(case).tensors[:3]]
    out = basis_conv2d(*tensors, **case.arguments())
    p = case.problem
    assert out.shape == (p.N, p.K, *p.output_size)
    assert out.device.type == "meta"


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_map_without_rows_is_all_padding(backend):
    inputs = testing.make_inputs(testing.case("bias"))
    out = basis_conv2d(inputs.input[:, :, :0], *inputs.tensors[1:4], padding=2, backend=backend)
    assert torch.equal(out, inputs.bias[:, None, None].expand_as(out))
