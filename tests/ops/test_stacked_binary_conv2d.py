"""Every backend of ``stacked_binary_conv2d`` on every case and dtype: values, gradients, faults, errors."""

from __future__ import annotations

import doctest
import functools
import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from basisconv_kernels import stacked_binary_conv2d, testing
from basisconv_kernels.core import registry
from basisconv_kernels.core.estimators import ESTIMATORS, slope
from basisconv_kernels.ops import stacked_binary_conv2d as op
from basisconv_kernels.ops import stacked_binary_conv2d_native as native
from basisconv_kernels.ops.bitpack import bitpack
from basisconv_kernels.ops.stacked_binary_conv2d import CANDIDATES
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.testing import StackedCase, tolerances
from basisconv_kernels.testing.compare import Mismatch

OP = "stacked_binary_conv2d"
ANY = StackedBinaryConv2dProblem(C=2, K=1, n=1, splits=1)
AVAILABLE = [c.name for c in CANDIDATES if registry.absent(c.name) is None and not c.supports(ANY)]
backends = pytest.mark.parametrize("backend", AVAILABLE)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("case", testing.STACKED_CASES, ids=lambda case: case.name)
def test_result(kernel, case, dtype):
    testing.check_stacked(kernel.case(case, dtype), kernel.run)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.full] if c.problem.N > 1 or c.problem.H == 56 else [])
     for c in testing.STACKED_PERFORMANCE_CASES],
)  # fmt: skip
def test_result_at_the_sizes_of_the_goals(kernel, case):
    if kernel.name == "reference-cuda":
        pytest.skip("PyTorch's float32 convolution of these sizes sums whole numbers inexactly on an H200")
    testing.check_stacked(kernel.case(case, torch.float32), kernel.run)


@pytest.mark.parametrize("name", ["odd_sizes", "packed_signs", "codes"])
def test_all_operands_of_a_case_are_on_its_device(name):
    inputs = testing.make_stacked_inputs(testing.stacked_case(name).at(device="meta"))
    input = inputs.input if isinstance(inputs.input, torch.Tensor) else inputs.input.words
    operands = (input, *inputs.tensors[1:])
    assert {operand.device.type for operand in operands if operand is not None} == {"meta"}


def test_no_kernel_is_judged_with_tf32(monkeypatch):
    """Nor PyTorch's own convolution beside it, as for all ops."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []

    def watched(*tensors, **more):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return stacked_binary_conv2d(*tensors, **more, backend="reference")

    testing.check_stacked(testing.stacked_case("binary_weights_channels_last"), watched)
    assert set(allowed) == {False}


@st.composite
def problems(draw):
    """Any geometry that leaves an output pixel, in every mode of a real input."""
    size = st.integers(1, 9)
    groups, splits = draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.integers(1, 4))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(pair), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    problem = StackedBinaryConv2dProblem(
        N=draw(st.integers(0, 3)),
        C=groups * splits * draw(st.sampled_from([1, 2, 3, 4, 7, 9, 16, 33])),
        H=max(1, reach[0] - padding[0] - padding[1]) + draw(size),
        W=max(1, reach[1] - padding[2] - padding[3]) + draw(size),
        n=draw(st.integers(1, 20)),
        splits=splits,
        K=groups * draw(st.integers(1, 25)),
        R=kernel[0],
        S=kernel[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        mode=draw(st.sampled_from(["real", "real", "signs"])),
        channels_last=draw(st.booleans()),
        scale=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
    )
    return StackedCase(
        "drawn", "any geometry", problem, draw(st.sampled_from(["dense", "offset", "sliced", "transposed"]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_geometry(kernel, dtype, geometries):
    @settings(max_examples=min(geometries, 60 if geometries < 1000 else 3000))
    @given(case=problems(), seed=st.integers(0, 2**31))
    def check(case, seed):
        testing.check_stacked(kernel.case(case, dtype), kernel.run, seed=seed)

    check()


@pytest.mark.parametrize("name", ["odd_sizes", "channels_last_words", "past_a_block", "groups", "binary_weights"])
def test_nan_and_infinity_spread_as_in_plain_pytorch(kernel, name):
    """To the outputs that read them and to no other: tables and tails spread nothing."""
    case = kernel.case(testing.stacked_case(name), torch.float32)
    inputs = testing.make_stacked_inputs(case)
    middle = tuple(size // 2 for size in inputs.input.shape)
    p = case.problem
    for value in (torch.nan, torch.inf, -torch.inf):
        inputs.input[middle] = value
        filters = torch.cat([inputs.bank[inputs.index[:, i]] for i in range(p.splits)], 1)
        expected = F.conv2d(inputs.input, filters, None, p.stride, p.padding[::2], p.dilation, p.groups)
        if inputs.scale is not None:
            expected = expected * inputs.scale[:, None, None]
        got = kernel.run(*inputs.tensors, **case.arguments())
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


def test_every_bit_of_a_number_counts(kernel):
    """A number of any size that stands alone comes out as it is, with a sign: nothing is rounded on the way."""
    case = kernel.case(testing.stacked_case("channels_last_words"), torch.float32)
    inputs = testing.make_stacked_inputs(case)
    filters = torch.cat([inputs.bank[inputs.index[:, i]] for i in range(case.problem.splits)], 1)
    largest = torch.finfo(torch.float32).max
    for number in (1 + 2.0**-23, -0.1, 1 / 3, 16777215.0, largest, -largest, 2 - 2.0**-15, 2.0**-100 / 3, 2.0**-126):
        inputs.input.zero_()[0, 77, 2, 5] = number
        expected = F.conv2d(inputs.input.double(), filters.double(), padding=1).float()
        assert torch.equal(kernel.run(*inputs.tensors, **case.arguments()), expected), number


@pytest.mark.skipif(not native.PRESENT, reason="no native kernel")
@pytest.mark.parametrize("name", ["four_splits", "full_vectors"])
def test_a_damaged_packing_is_refused(name):
    """Its rows are places in memory: of tables, and of tiles behind them."""
    inputs = testing.make_stacked_inputs(testing.stacked_case(name))
    packed = native.stacked_binary_conv2d_pack(inputs.bank, inputs.index)
    packed[128:] = 255
    with pytest.raises(RuntimeError, match="packed is damaged; call stacked_binary_conv2d_pack again"):
        stacked_binary_conv2d(inputs.input, inputs.bank, inputs.index, padding=1, packed=packed, backend="cpu")


BITS = [case for case in testing.STACKED_CASES if case.problem.mode != "real"]


@dtypes
@pytest.mark.parametrize("case", BITS, ids=lambda case: case.name)
def test_what_runs_on_cuda_runs_here_on_the_native_kernels_of_the_cpu(case, dtype, monkeypatch):
    """Full filters in ``binary_conv2d``: all of that backend but the kernel itself."""
    if dtype == torch.float64 or not native.PRESENT:
        pytest.skip("no native kernel")
    monkeypatch.setitem(op._targets, "cpu", native.forward_on_cuda)
    testing.check_stacked(case.at(dtype=dtype), functools.partial(stacked_binary_conv2d, backend="cpu"))


def test_what_cuda_takes():
    candidate = next(c for c in CANDIDATES if c.name == "cuda")
    problem = StackedBinaryConv2dProblem(C=64, K=64, n=16, splits=2, mode="signs", device="cuda")
    assert candidate.supports(problem) == []
    assert candidate.supports(replace(problem, mode="codes", planes=2)) == []
    assert candidate.supports(replace(problem, mode="real", dtype=torch.bfloat16)) == []
    assert candidate.supports(replace(problem, mode="real")) == ["has no float32 kernel"]
    assert "has no torch.float64 kernel" in candidate.supports(replace(problem, dtype=torch.float64))
    assert registry.check_of(candidate, problem).variant.startswith("binary_conv2d cuda signs float32 NCHW 3×3")
    real = replace(problem, mode="real", dtype=torch.bfloat16)
    assert registry.check_of(candidate, real).variant.startswith("stacked_binary_conv2d cuda bfloat16 NCHW 3×3")


# --- deliberate faults, each of which the checker must find -----------------------------------------------------------


def fault_forgets_a_split(input, bank, index, scale=None, bias=None, **more):
    index = index.clone()
    index[:, -1] = index[:, 0]
    return stacked_binary_conv2d(input, bank, index, scale, bias, **more)


def fault_one_filter_off(input, bank, index, scale=None, bias=None, **more):
    return stacked_binary_conv2d(input, bank, (index + 1) % bank.shape[0], scale, bias, **more)


def fault_pads_with_a_sign(input, bank, index, scale=None, bias=None, *, padding, **more):
    top, bottom, left, right = padding
    padded = F.pad(input, (left, right, top, bottom), value=1.0)
    return stacked_binary_conv2d(padded, bank, index, scale, bias, padding=0, **more)


def fault_scales_after_the_bias(input, bank, index, scale=None, bias=None, **more):
    bias = bias if bias is None or scale is None else bias * scale
    return stacked_binary_conv2d(input, bank, index, scale, bias, **more)


def fault_rounds_to_bfloat16(input, bank, index, scale=None, bias=None, **more):
    return stacked_binary_conv2d(input.bfloat16().to(input.dtype), bank, index, scale, bias, **more)


def fault_writes_to_the_input(input, bank, index, scale=None, bias=None, **more):
    out = stacked_binary_conv2d(input, bank, index, scale, bias, **more)
    input[0, 0, 0, 0] += 1
    return out


@pytest.mark.parametrize("fault", [v for k, v in globals().items() if k.startswith("fault_")], ids=lambda f: f.__name__)
def test_the_checker_finds_faults(fault):
    with pytest.raises(Mismatch):
        testing.check_stacked(testing.stacked_case("odd_sizes"), fault)


# --- gradients --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_every_backend(backend, dtype):
    case = testing.stacked_case("relu").at(dtype=dtype)
    inputs = testing.make_stacked_inputs(case)
    x, bank, index, scale, bias = inputs.tensors
    selection = F.one_hot(index, case.problem.n).to(dtype)

    def gradients(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, bank, selection, scale, bias)]
        out = stacked_binary_conv2d(*leaves, backend=backend, **case.arguments())
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        live = stacked_binary_conv2d(*(t.detach() for t in leaves), backend=backend, **case.arguments()) > 0
        return torch.autograd.grad(out, leaves, grad.to(dtype)), live

    (got, live), (expected, expected_live) = gradients(dtype, backend), gradients(torch.float64, "reference")
    assert torch.equal(live, expected_live)  # or the gradients would differ in earnest
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        testing.check_same_layer(one, other)


def test_gradcheck():
    case = testing.stacked_case("groups").at(dtype=torch.float64, N=1)
    inputs = testing.make_stacked_inputs(case)
    x, bank, index, scale, bias = inputs.tensors
    leaves = [t.detach().requires_grad_() for t in (x, scale, bias)]

    def op(x, scale, bias):
        return stacked_binary_conv2d(x, bank, index, scale, bias, **case.arguments())

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True, **tolerances.GRADCHECK)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_sign_of_the_input_has_a_straight_through_estimator(estimator):
    case = testing.stacked_case("signs").at(dtype=torch.float64)
    inputs = testing.make_stacked_inputs(case)
    x, *others = inputs.tensors
    out = stacked_binary_conv2d(x.requires_grad_(), *others, estimator=estimator, **case.arguments())
    (got,) = torch.autograd.grad(out.sum(), x)
    signs = torch.where(x.detach() >= 0, 1.0, -1.0).double().requires_grad_()
    straight = {**case.arguments(), "binarize_input": False}
    (through,) = torch.autograd.grad(stacked_binary_conv2d(signs, *others, **straight).sum(), signs)
    factor = slope(x.detach(), estimator)
    torch.testing.assert_close(got, through if factor is None else through * factor, **tolerances.FORMULA)


def test_double_backward_and_vmap_are_refused():
    case = testing.stacked_case("odd_sizes")
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    out = stacked_binary_conv2d(x.requires_grad_(), bank, index, scale, bias, **case.arguments())
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda one: stacked_binary_conv2d(one[None], bank, index))(x.detach())


# --- calls ------------------------------------------------------------------------------------------------------------


@backends
def test_packed_bank_and_int8_bank_are_the_same_filters(backend):
    case = testing.stacked_case("full_vectors")
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    settings = {**case.arguments(), "backend": backend}
    expected = stacked_binary_conv2d(x, bank, index, scale, bias, **settings)
    for same in (bitpack(bank), bank.to(torch.int8)):
        for places in (index, index.int(), index.to(torch.uint8)):
            assert torch.equal(stacked_binary_conv2d(x, same, places, scale, bias, **settings), expected)


@backends
def test_autocast_casts_the_input(backend):
    case = testing.stacked_case("odd_sizes")
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    settings = {**case.arguments(), "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        got = stacked_binary_conv2d(x, bank, index, scale, bias, **settings)
    assert torch.equal(got, stacked_binary_conv2d(x.bfloat16(), bank, index, scale, bias, **settings))


def test_doctests():
    module = importlib.import_module(f"basisconv_kernels.ops.{OP}")
    assert doctest.testmod(module).failed == 0


_good = functools.partial(testing.make_stacked_inputs, testing.stacked_case("odd_sizes"))


def _with(**changes):
    x, bank, index, scale, bias = _good().tensors
    return {"input": x, "bank": bank, "index": index, "scale": scale, "bias": bias, "padding": 1, **changes}


BAD = {
    "a zero in the bank": (lambda: {"bank": torch.zeros(5, 7, 3, 3)}, ValueError, r"bank must hold \+1 and −1 only"),
    "NaN in the bank": (lambda: {"bank": torch.full((5, 7, 3, 3), torch.nan)}, ValueError, "got nan"),
    "an index past the bank": (lambda: {"index": torch.full((13, 2), 5)}, ValueError, "0 to 4 .*got 5"),
    "a negative index": (lambda: {"index": torch.full((13, 2), -1)}, ValueError, "got -1"),
    "indivisible channels": (lambda: {"index": torch.zeros(13, 3, dtype=torch.int64)}, ValueError, "C = .* splits"),
    "a bank of another width": (lambda: {"bank": torch.ones(5, 6, 3, 3)}, ValueError, "got cs = 6"),
    "a float index": (lambda: {"index": torch.zeros(13, 2)}, TypeError, "index must be int64"),
    "selections that are not one-hot": (lambda: {"index": torch.ones(13, 2, 5)}, ValueError, "must be one-hot"),
    "a wrong scale": (lambda: {"scale": torch.ones(12)}, ValueError, r"scale must be \[K\] .*13"),
    "a wrong bias": (lambda: {"bias": torch.ones(13, 1)}, ValueError, r"bias must be \[K\]"),
    "an integer input": (lambda: {"input": torch.ones(2, 14, 9, 11).int()}, TypeError, "input must be float32"),
    "mixed devices": (lambda: {"bank": torch.ones(5, 7, 3, 3, device="meta")}, ValueError, "on the device of input"),
    "codes as a bank": (lambda: {"bank": bitpack(torch.ones(5, 7, 3, 3), bits=2)}, ValueError, "must hold signs"),
    "groups": (lambda: {"groups": 0}, ValueError, "groups must be at least 1"),
    "outputs that do not divide": (
        lambda: {"groups": 7, "bank": torch.ones(5, 1, 3, 3)}, ValueError, "divisible by groups = 7"
    ),
    "an unknown activation": (lambda: {"activation": "gelu"}, ValueError, "activation must be"),
    "an unknown estimator": (lambda: {"estimator": "tanh"}, ValueError, "estimator must be"),
    "a kernel past the input": (lambda: {"padding": 0, "dilation": 6}, ValueError, "smaller than the dilated kernel"),
    "signs of codes": (
        lambda: {"input": bitpack(torch.ones(2, 14, 9, 11), bits=2), "binarize_input": True}, ValueError, "2-bit codes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, kind, words = BAD[name]
    with pytest.raises(kind, match=words) as caught:
        stacked_binary_conv2d(**_with(**changes()))
    assert str(caught.value).startswith(f"{OP}: ")
