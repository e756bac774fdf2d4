"""The short way of repeated calls with packed weights on a GPU: same bits, same refusals, also in a captured graph."""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import (
    basis_conv2d,
    basis_conv2d_pack,
    binary_conv2d,
    binary_conv2d_pack,
    bitpack,
    testing,
    tucker_conv2d,
)
from basisconv_kernels.ops import basis_conv2d_planned as planned
from basisconv_kernels.ops import binary_conv2d_planned as binary
from basisconv_kernels.ops import tucker_conv2d_planned as chains
from basisconv_kernels.ops.basis_conv2d_native import cuda_supports
from basisconv_kernels.ops.tucker_conv2d_native import tucker_conv2d_pack
from tests.ops.planned_calls import counted, same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache")]
CASES = [case for case in testing.CASES if not cuda_supports(case.at(device="cuda", dtype=torch.bfloat16).problem)]
LAST = torch.channels_last


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def tensors(layout=LAST):
    """Input, basis, coefficients, bias and residual of C = 64, Q = 24, K = 40, 3×3 taps on 9×11 pixels."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"input": (3, 64, 9, 11), "basis_weight": (24, 64, 3, 3), "coefficients": (40, 24), "bias": (40,)}
    shapes["residual"] = (3, 40, 9, 11)
    made = {name: torch.randn(shape, generator=generator, device="cuda") for name, shape in shapes.items()}
    made = {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}
    return made | {name: made[name].contiguous(memory_format=layout) for name in ("input", "residual")}


def a_call(given, **settings):
    packed = basis_conv2d_pack(given["basis_weight"], given["coefficients"])
    return functools.partial(basis_conv2d, **given, packed=packed, padding=1, activation="relu", **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_short_way_gives_the_bits_and_the_strides_of_the_long_one(case, dtype, short):
    inputs = testing.make_inputs(case.at(dtype=dtype, device="cuda"))
    p = case.problem
    geometry = {"stride": p.stride, "dilation": p.dilation, "groups": p.groups, "precise": p.precise}
    call = functools.partial(
        basis_conv2d,
        *inputs.tensors[:4],
        residual=inputs.residual,
        packed=basis_conv2d_pack(inputs.basis_weight, inputs.coefficients, **geometry),
        backend="cuda",
        **case.arguments(),
    )
    found = [call() for _ in range(3)]
    assert (short.calls, short.refused) == (2, 0)
    for again in found[1:]:
        same(found[0], again)


def test_each_layout_has_its_own_choice(short):
    given = tensors()
    call = a_call(given, backend="cuda")
    same(call(), call())
    nchw = {name: given[name].contiguous() for name in ("input", "residual")}
    expected = a_call({**given, **nchw}, backend="cuda")()
    assert not expected.is_contiguous(memory_format=LAST)
    same(call(**nchw), expected)
    assert short.refused == 1
    same(call(), a_call(given, backend="cuda")())


BAD = {
    "input on the processor": ({"input": "cpu"}, ValueError),
    "bias on the processor": ({"bias": "cpu"}, ValueError),
    "residual on the processor": ({"residual": "cpu"}, ValueError),
    "packed weights on the processor": ({"packed": "cpu"}, ValueError),
    "input of another dtype": ({"input": torch.float16}, TypeError),
    "bias of another dtype": ({"bias": torch.float32}, TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_at_first_is_refused_in_the_same_words_later(name, short):
    changes, error = BAD[name]
    call = a_call(tensors(), backend="cuda")
    changed = {key: call.keywords[key].to(what) for key, what in changes.items()}
    with pytest.raises(error) as before:
        call(**changed)
    expected = call()
    same(call(), expected)
    with pytest.raises(error) as after:
        call(**changed)
    assert str(after.value) == str(before.value)
    same(call(), expected)


def test_the_last_two_stages_of_a_chain_go_the_short_way(monkeypatch):
    short = counted(monkeypatch, chains.plans)
    case = testing.tucker_case("whole_epilogue").at(device="cuda", dtype=torch.bfloat16, channels_last=True)
    given = testing.make_tucker_inputs(case)
    p = case.problem
    packed = tucker_conv2d_pack(*given.tensors[2:4], stride=p.stride, dilation=p.dilation, precise=p.precise)
    call = functools.partial(
        tucker_conv2d, *given.tensors[:5], residual=given.tensors[5], packed=packed, backend="cuda", **case.arguments()
    )
    with torch.no_grad():
        first = call()
        same(first, call())
    assert (short.calls, short.refused) == (1, 0)


def test_a_captured_graph_holds_a_short_call(short):
    given = tensors()
    call = a_call(given, backend="cuda")
    with torch.inference_mode():
        call()
        graph = torch.cuda.CUDAGraph()
        before = short.calls
        with torch.cuda.graph(graph):
            out = call()
        assert (short.calls, short.refused) == (before + 1, 0)
        given["input"].normal_()
        graph.replay()
        same(out.clone(), call())


def test_another_stream_is_the_one_that_is_current(short):
    given = tensors()
    call = a_call(given, backend="cuda")
    expected = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        given["input"].neg_()
        found = call()
        given["input"].neg_()
    torch.cuda.current_stream().wait_stream(side)
    assert short.refused == 0
    assert not torch.equal(found, expected)
    given["input"].neg_()
    same(found, call())


@pytest.mark.parametrize("output", ["float", "int32", "packed"])
@pytest.mark.parametrize("packed_input", [True, False], ids=["bits", "numbers"])
def test_binary_layers_go_the_short_way(output, packed_input, monkeypatch):
    short = counted(monkeypatch, binary.plans)
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, device="cuda") for s in ((3, 128, 9, 11), (64, 128, 3, 3)))
    x = x.to(torch.bfloat16).contiguous(memory_format=LAST)
    scale = torch.rand(64, generator=generator, device="cuda") if output == "float" else None
    call = functools.partial(
        binary_conv2d, bitpack(x) if packed_input else x, weight, scale, packed=binary_conv2d_pack(weight), padding=1,
        output=output, backend="cuda",
    )  # fmt: skip
    first = call()
    same(first, call())
    assert (short.calls, short.refused) == (1, 0)
    with pytest.raises(ValueError, match="packed must be"):
        call(packed=call.keywords["packed"].cpu())
