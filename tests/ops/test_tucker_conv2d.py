"""Every backend of ``tucker_conv2d`` on every case and dtype: values, packing, choice, faults that must be caught."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BackendUnavailable, testing, tucker_conv2d, tucker_conv2d_pack, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES
from basisconv_kernels.testing import Mismatch

OP = "tucker_conv2d"
AVAILABLE = [candidate.name for candidate in CANDIDATES if registry.absent(candidate.name) is None]
EPILOGUE = {"bias": True, "residual": True, "activation": "relu"}

dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
cases = pytest.mark.parametrize("case", testing.TUCKER_CASES, ids=lambda case: case.name)
backends = pytest.mark.parametrize("backend", AVAILABLE)
native = pytest.mark.skipif("cpu" not in AVAILABLE, reason=f"cpu: {registry.absent('cpu')}")


def call(kernel, inputs, **more):
    return kernel(*inputs.tensors[:5], residual=inputs.residual, **{**inputs.case.arguments(), **more})


@dtypes
@cases
def test_result(kernel, case, dtype):
    testing.check_tucker(kernel.case(case, dtype), kernel.run)


@st.composite
def problems(draw):
    """Any geometry that leaves an output pixel."""
    size, rank = st.integers(1, 9), st.integers(1, 20)
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, reach[0] - padding[0] - padding[1]), max(1, reach[1] - padding[2] - padding[3])]
    problem = TuckerConv2dProblem(
        N=draw(st.integers(0, 3)),
        C=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 19])),
        H=least[0] + draw(size),
        W=least[1] + draw(size),
        rank_in=draw(rank),
        Q=draw(rank),
        K=draw(st.integers(1, 37)),
        R=kernel[0],
        S=kernel[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        channels_last=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
        precise=draw(st.booleans()),
    )
    view = draw(st.sampled_from(["dense", "offset", "sliced", "expanded", "transposed", "mixed"]))
    return testing.TuckerCase("drawn", "any geometry", problem, view)


@dtypes
def test_any_geometry(kernel, dtype, geometries):
    # The kernel below is that of basis_conv2d, which draws many more of its own.
    @settings(max_examples=max(1, geometries // 5))
    @given(case=problems(), seed=st.integers(0, 2**31))
    def check(case, seed):
        testing.check_tucker(kernel.case(case, dtype), kernel.run, seed=seed)

    check()


@pytest.mark.parametrize("name", ["odd_sizes", "channels_last_stride", "past_a_block"])
def test_nan_spreads_as_in_plain_pytorch(kernel, name):
    case = testing.tucker_case(name).at(**EPILOGUE)
    inputs = testing.make_tucker_inputs(kernel.case(case, torch.float32))
    for tensor in inputs.tensors:
        middle = tuple(size // 2 for size in tensor.shape)
        kept = tensor[middle].item()
        tensor[middle] = torch.nan
        assert torch.equal(call(kernel.run, inputs).isnan(), testing.plain_tucker(case, inputs.tensors).isnan())
        tensor[middle] = kept


@dtypes
@cases
def test_packed_weights_change_nothing(case, dtype):
    inputs = testing.make_tucker_inputs(case.at(dtype=dtype))
    p = case.problem
    settings = {"stride": p.stride, "dilation": p.dilation, "precise": p.precise}
    packed = tucker_conv2d_pack(inputs.core, inputs.u_out, **settings)
    assert (packed is not None) == ("cpu" in AVAILABLE and dtype is not torch.float64)
    assert torch.equal(call(tucker_conv2d, inputs, packed=packed), call(tucker_conv2d, inputs))


@native
def test_what_is_no_packing_of_these_weights_is_refused():
    inputs = testing.make_tucker_inputs(testing.tucker_case("channels_last"))
    packed = tucker_conv2d_pack(inputs.core, inputs.u_out)
    other = tucker_conv2d_pack(inputs.core, inputs.u_out, stride=2)
    for wrong in (packed[:-1], packed.float(), torch.zeros_like(packed), other):
        with pytest.raises((RuntimeError, ValueError), match="packed "):
            call(tucker_conv2d, inputs, packed=wrong, backend="cpu")


def test_every_form_of_padding_and_pairs():
    inputs = testing.make_tucker_inputs(testing.tucker_case("odd_sizes"))
    expected = call(tucker_conv2d, inputs)
    for padding in (1, (1, 1), [1, 1], (1, 1, 1, 1), "same"):
        for ones in (1, (1, 1), [1, 1]):
            assert torch.equal(call(tucker_conv2d, inputs, padding=padding, stride=ones, dilation=ones), expected)
    assert torch.equal(call(tucker_conv2d, inputs, padding="valid"), call(tucker_conv2d, inputs, padding=0))


@backends
def test_flop_counter_counts_two_a_multiply_add(backend):
    for name in ("odd_sizes", "stride", "stride_past_kernel"):
        case = testing.tucker_case(name)
        with FlopCounterMode(display=False) as counter:
            call(tucker_conv2d, testing.make_tucker_inputs(case), backend=backend)
        assert counter.get_total_flops() == 2 * case.problem.macs()


def test_the_work_of_a_problem_is_that_of_its_three_convolutions():
    p = testing.tucker_case("stride").problem
    oh, ow = p.output_size
    assert p.macs() == p.N * (p.H * p.W * p.C * p.rank_in + oh * ow * (p.Q * p.rank_in * 9 + p.K * p.Q))
    assert p.dense_macs() == p.N * oh * ow * p.K * p.C * 9
    assert str(p).startswith("N2 6→4→5→8 3×3 @11×14 float32 cpu")
    assert p.to_json()["rank_in"] == 4


@backends
def test_use_backend_is_the_same_as_the_argument(backend):
    inputs = testing.make_tucker_inputs(testing.tucker_case("channels_last"))
    with use_backend(backend):
        wished = call(tucker_conv2d, inputs)
    assert torch.equal(wished, call(tucker_conv2d, inputs, backend=backend))
    with use_backend("nonexistent"), pytest.raises(BackendUnavailable, match="nonexistent"):
        call(tucker_conv2d, inputs)


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
@backends
def test_autocast_casts_first(backend, autocast_to):
    inputs = testing.make_tucker_inputs(testing.tucker_case("whole_epilogue"))
    cast = [t.to(autocast_to) for t in inputs.tensors]
    arguments = {**inputs.case.arguments(), "backend": backend}
    packed = tucker_conv2d_pack(inputs.core, inputs.u_out)
    with torch.autocast("cpu", dtype=autocast_to):
        found = call(tucker_conv2d, inputs, backend=backend, packed=packed)
    assert found.dtype == autocast_to
    assert torch.equal(found, tucker_conv2d(*cast[:5], residual=cast[5], **arguments))


def test_meta_tensors_give_the_shape():
    case = testing.tucker_case("stride")
    p = case.problem
    out = tucker_conv2d(*[t.to("meta") for t in testing.make_tucker_inputs(case).tensors[:4]], **case.arguments())
    assert (out.shape, out.device.type) == ((p.N, p.K, *p.output_size), "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@backends
def test_a_map_without_rows_is_all_padding(backend, dtype):
    inputs = testing.make_tucker_inputs(testing.tucker_case("rank_out_one").at(dtype=dtype))
    out = tucker_conv2d(inputs.input[:, :, :0], *inputs.tensors[1:5], padding=2, backend=backend)
    assert torch.equal(out, inputs.bias[:, None, None].expand_as(out))


@pytest.mark.parametrize("module", ["basisconv_kernels.ops.tucker_conv2d"])
def test_the_examples_of_the_documentation_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_a_kernel_of_ones_own_is_loaded_by_its_signature():
    assert testing.load("basisconv_kernels:tucker_conv2d", OP) is tucker_conv2d
    with pytest.raises(TypeError, match=r"must take .*u_in, core, u_out"):
        testing.load("basisconv_kernels:basis_conv2d", OP)


# --- deliberately wrong kernels ---------------------------------------------------------------------------------------


def right(*tensors, **settings):
    return tucker_conv2d(*tensors, **settings, backend="reference")


def first_map_has_a_bias(input, u_in, core, u_out, bias=None, **settings):
    """An offset of the input before the padding: right inside, wrong at the borders."""
    offset = 0.05
    inside = (u_out @ torch.einsum("oirs,i->o", core.float(), u_in.float().sum(0) * offset).to(core.dtype)).to(
        bias.dtype
    )
    return right(input + offset, u_in, core, u_out, bias - inside, **settings)


def maps_not_rounded(*tensors, **settings):
    return right(*tensors, **{**settings, "precise": True})


def only_the_second_map_rounded(input, u_in, core, u_out, bias=None, **settings):
    """M kept in float32: one rounding too few."""
    reduced = torch.einsum("nchw,ci->nihw", input.float(), u_in.float())
    top, bottom, left, right_ = settings["padding"]
    padded = torch.nn.functional.pad(reduced, (left, right_, top, bottom))
    maps = torch.nn.functional.conv2d(padded, core.float(), None, settings["stride"], 0, settings["dilation"])
    out = torch.einsum("nqyx,kq->nkyx", maps.to(input.dtype).float(), u_out.float())
    return out.to(input.dtype).contiguous()


FAULTS = [
    (first_map_has_a_bias, testing.tucker_case("whole_epilogue").at(activation=None, residual=False), "first mismatch"),
    (maps_not_rounded, testing.tucker_case("odd_sizes").at(dtype=torch.bfloat16), "on whole numbers"),
    (only_the_second_map_rounded, testing.tucker_case("odd_sizes").at(dtype=torch.bfloat16), "on whole numbers"),
]


@pytest.mark.parametrize(("fault", "case", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_faults_are_caught(fault, case, message):
    testing.check_tucker(case, right)
    with pytest.raises(Mismatch, match=message):
        testing.check_tucker(case, fault)
