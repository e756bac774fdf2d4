"""The short way of repeated calls of ``basis_conv2d`` with packed weights: same bits, same refusals, nothing unseen."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BasisConv2d, basis_conv2d, basis_conv2d_pack, testing, use_backend
from basisconv_kernels.core import registry, tuning
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_planned as planned
from tests.ops.planned_calls import counted, same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.usefixtures("cache"),
]
LAST = torch.channels_last
CASES = [case for case in testing.CASES if "64" not in str(case.problem.dtype)]


@pytest.fixture
def short(monkeypatch):
    """What went the short way."""
    return counted(monkeypatch, planned.plans)


def tensors(dtype=torch.float32, layout=LAST, seed=0):
    """Input, basis, coefficients, bias and residual of C = 6, Q = 9, K = 12, 3×2 taps; outputs 5×7."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"input": (2, 6, 7, 8), "basis_weight": (9, 6, 3, 2), "coefficients": (12, 9), "bias": (12,)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    made["input"] = made["input"].contiguous(memory_format=layout)
    made["residual"] = torch.randn(2, 12, 5, 7, generator=generator).to(dtype)
    return made


def packed_of(given, **geometry):
    return basis_conv2d_pack(given["basis_weight"], given["coefficients"], **geometry)


def known(given, packed, **settings):
    """A function of changes to a call that went the long way and the short way, with equal results."""
    same(*(basis_conv2d(**given, packed=packed, **settings) for _ in range(2)))
    return functools.partial(basis_conv2d, **{**given, "packed": packed, **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_short_way_gives_the_bits_and_the_strides_of_the_long_one(case, dtype, short):
    inputs = testing.make_inputs(case.at(dtype=dtype))
    p = case.problem
    geometry = {"stride": p.stride, "dilation": p.dilation, "groups": p.groups, "precise": p.precise}
    packed = basis_conv2d_pack(inputs.basis_weight, inputs.coefficients, **geometry)
    call = functools.partial(
        basis_conv2d, *inputs.tensors[:4], residual=inputs.residual, packed=packed, **case.arguments()
    )
    found = [call() for _ in range(3)]
    assert (short.calls, short.refused) == (2, 0)
    for again in found[1:]:
        assert torch.equal(found[0], again)
        assert found[0].stride() == again.stride()
        assert again.dtype == dtype
        assert again.data_ptr() != found[0].data_ptr() or not again.numel()


def test_other_sizes_and_layouts_of_the_input_share_a_plan(short):
    given = {**tensors(), "residual": None}
    call = known(given, packed_of(given), padding=1)
    for size in ((2, 6, 7, 8), (3, 6, 20, 5), (0, 6, 7, 8)):
        x = torch.randn(size)
        for layout in (LAST, torch.contiguous_format):
            x = x.contiguous(memory_format=layout)
            expected = basis_conv2d(x, given["basis_weight"], given["coefficients"], given["bias"], padding=1)
            found = call(input=x)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
    assert short.refused == 0


BAD = {
    "input channels": ({"input": torch.zeros(2, 5, 7, 8)}, ValueError),
    "input rank": ({"input": torch.zeros(6, 7, 8)}, ValueError),
    "input dtype": ({"input": torch.zeros(2, 6, 7, 8).half()}, TypeError),
    "input too small": ({"input": torch.zeros(2, 6, 2, 1), "residual": None}, ValueError),
    "input sparse": ({"input": torch.zeros(2, 6, 7, 8).to_sparse()}, TypeError),
    "input elsewhere": ({"input": torch.zeros(2, 6, 7, 8, device="meta")}, ValueError),
    "no input": ({"input": None}, TypeError),
    "basis of other channels": ({"basis_weight": torch.zeros(9, 5, 3, 2)}, ValueError),
    "basis of other taps": ({"basis_weight": torch.zeros(9, 6, 2, 3)}, (RuntimeError, ValueError)),
    "basis of fewer filters": ({"basis_weight": torch.zeros(8, 6, 3, 2)}, ValueError),
    "coefficients of other rows": ({"coefficients": torch.zeros(11, 9)}, ValueError),
    "other weights": ({"basis_weight": torch.zeros(8, 6, 3, 2), "coefficients": torch.zeros(12, 8)}, RuntimeError),
    "all in another dtype": (
        {k: v.half() for k, v in tensors().items()},
        RuntimeError,
    ),
    "bias of another size": ({"bias": torch.zeros(11)}, ValueError),
    "bias of another dtype": ({"bias": torch.zeros(12).half()}, TypeError),
    "bias elsewhere": ({"bias": torch.zeros(12, device="meta")}, ValueError),
    "bias no tensor": ({"bias": [0.0] * 12}, TypeError),
    "residual of another size": ({"residual": torch.zeros(2, 12, 5, 1)}, ValueError),
    "residual of another dtype": ({"residual": torch.zeros(2, 12, 5, 7).double()}, TypeError),
    "stride a float": ({"stride": 1.0}, TypeError),
    "stride a bool": ({"stride": True}, TypeError),
    "strides of bools": ({"stride": (True, 1)}, TypeError),
    "dilation of floats": ({"dilation": (1.0, 1.0)}, TypeError),
    "padding a bool": ({"padding": False}, TypeError),
    "groups a bool": ({"groups": True}, TypeError),
    "groups a float": ({"groups": 1.0}, TypeError),
    "another stride": ({"stride": 2, "residual": None}, RuntimeError),
    "activation": ({"activation": "tanh"}, ValueError),
    "backend": ({"backend": "cuda"}, RuntimeError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_at_first_is_refused_in_the_same_words_later(name, short):
    changes, error = BAD[name]
    given = tensors()
    packed = packed_of(given)
    settings = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    with pytest.raises(error) as before:
        basis_conv2d(**{**given, "packed": packed, **settings, **changes})
    call = known(given, packed, **settings)
    with pytest.raises(error) as after:
        call(**changes)
    assert str(after.value) == str(before.value)
    expected = basis_conv2d(**given, **settings)
    assert torch.equal(call(), expected)
    assert torch.equal(call(), expected)


def test_packed_bytes_that_became_those_of_other_weights_are_refused(short):
    given = tensors()
    packed = packed_of(given)
    call = known(given, packed)
    packed.copy_(basis_conv2d_pack(given["basis_weight"], given["coefficients"], dilation=(1, 2)))
    with pytest.raises(RuntimeError, match="packed was made for other weights"):
        call()
    packed.zero_()
    with pytest.raises(RuntimeError, match="packed was made for other weights"):
        call()


def test_an_address_that_was_given_out_again_does_no_harm(short):
    first, second = tensors(), tensors(seed=1)
    second["basis_weight"], second["coefficients"] = torch.randn(7, 6, 3, 2), torch.randn(12, 7)
    packed = packed_of(second)
    known(first, packed_of(first))
    ((key, stale),) = planned.plans.known.items()
    planned.plans.known.clear()
    planned.plans.known[(id(packed), *key[1:])] = stale
    expected = basis_conv2d(**second)
    for _ in range(3):
        assert torch.equal(basis_conv2d(**second, packed=packed), expected)
    assert (short.calls, short.refused) == (4, 1)  # one of them in `known`


def test_lists_and_odd_kinds_of_arguments_go_the_long_way(short):
    class Two(tuple):
        """A tuple that may say something else tomorrow."""

    given = tensors()
    packed = packed_of(given)
    for stride in ([1, 1], Two((1, 1))):
        for _ in range(3):
            basis_conv2d(**given, packed=packed, stride=stride)
    basis_conv2d(**given, packed=packed, precise=[])
    assert short.calls == 0
    assert not planned.plans.known


def test_equal_arguments_of_the_same_kinds_share_a_plan(short):
    given = tensors()
    packed = packed_of(given)
    for _ in range(4):
        basis_conv2d(**given, packed=packed, padding=tuple(map(int, "00")), stride=tuple(map(int, "11")))
    assert short.calls == 3


def test_a_wish_counts_from_its_first_call_on(short, monkeypatch):
    given = tensors()
    call = known(given, packed_of(given))
    expected = basis_conv2d(**given, backend="reference")
    before = short.calls
    with use_backend("reference"):
        assert torch.equal(call(), expected)
        assert torch.equal(call(), expected)
    monkeypatch.setenv("BASISCONV_BACKEND", "reference")
    assert torch.equal(call(), expected)
    assert torch.equal(call(backend="reference"), expected)
    assert short.calls == before
    monkeypatch.delenv("BASISCONV_BACKEND")
    call()
    assert short.calls == before + 1


def test_a_layout_that_was_measured_slower_keeps_its_backend(short):
    given = tensors()
    packed = packed_of(given)
    problem = op.problem_of(
        "cpu", torch.float32, torch.contiguous_format, (6, 9, 12, 3, 2, 9),
        op.Settings((1, 1), (0, 0, 0, 0), (1, 1), 1, None, False, ""),
    )  # fmt: skip
    ms = {name: {"median": t, "q1": t, "q3": t} for name, t in (("cpu", 2.0), ("reference", 1.0))}
    entry = {
        "op": op.OP,
        "problem": dataclasses.replace(problem, N=2, H=7, W=8).to_json(),
        "threads": torch.get_num_threads(),
    }
    tuning.write([{**entry, "ms": ms, "disturbed": 0.0}], tuning.user_file())
    call = known(given, packed)
    assert short.calls == 1
    nchw = given["input"].contiguous()
    assert torch.equal(call(input=nchw), basis_conv2d(**{**given, "input": nchw}, backend="reference"))
    assert short.refused == 1
    call()
    assert torch.equal(call(), basis_conv2d(**given, backend="cpu"))


def test_gradients_autocast_and_modes_are_not_passed_by(short):
    given = tensors()
    call = known(given, packed_of(given))
    before = short.calls
    for name in ("input", "bias", "coefficients"):
        leaf = given[name].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(**{name: leaf}).sum(), leaf)
        assert gradient.shape == leaf.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * (9 * 6 * 3 * 2 + 12 * 9)

    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function.name())
            return function(*arguments, **(keywords or {}))

    with Names():
        call()
    assert seen == ["basisconv::basis_conv2d"]
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: call(input=x))(given["input"][None])
    with torch.device("meta"):
        assert call().device.type == "cpu"
    with testing.poisoned_allocations():
        call()
    assert short.calls == before


def test_inference_mode_and_frozen_weights_in_grad_mode_go_the_short_way(short):
    given = tensors()
    call = known(given, packed_of(given))
    with torch.inference_mode():
        made = call()
    assert made.is_inference()
    assert torch.equal(made, call())
    assert short.calls == 3
    assert not call().requires_grad


def test_a_compiled_call_sees_the_ordinary_op():
    given = tensors()
    packed = packed_of(given)
    call = known(given, packed)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(input=x), fullgraph=True, backend=backend)
    assert torch.equal(compiled(given["input"]), call())
    assert [name for name in seen if name.startswith("basisconv")] == ["basisconv.basis_conv2d.default"]


def test_threads_share_the_plans(short):
    layers = [BasisConv2d(6, 12, 3, 9, padding=1).eval().requires_grad_(False) for _ in range(4)]
    inputs = [torch.randn(1, 6, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [[layer(x) for x in inputs] for layer in layers]

    def work(turn):
        return all(
            torch.equal(layers[i % 4](inputs[j % 4]), expected[i % 4][j % 4])
            for i in range(turn, turn + 40)
            for j in range(turn, turn + 4)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert short.refused == 0


# --- the native op itself, which trusts nobody ------------------------------------------------------------------------


def native(given, packed, plan):
    return torch.ops.basisconv.basis_conv2d_planned.default(
        *(given[name] for name in ("input", "basis_weight", "coefficients", "bias", "residual")), packed, plan
    )


def plan_of(given, any_layout=False):
    weights = (given["input"], given["basis_weight"], given["coefficients"])
    return torch.ops.basisconv.basis_conv2d_plan.default(
        *weights, [1, 1], [0, 0, 0, 0], [1, 1], 1, "relu", False, any_layout
    )


def test_the_planned_op_computes_what_its_plan_says():
    given = tensors()
    expected = basis_conv2d(**given, activation="relu", backend="cpu")
    assert torch.equal(native(given, packed_of(given), plan_of(given)), expected)
    nchw = {**given, "input": given["input"].contiguous()}
    with pytest.raises(RuntimeError, match="plan was made for another dtype, layout or other weights"):
        native(nchw, packed_of(given), plan_of(given))
    assert torch.equal(native(nchw, packed_of(given), plan_of(given, any_layout=True)), expected)


def test_plans_that_are_none_are_refused():
    given = tensors()
    packed, plan = packed_of(given), plan_of(given)
    for wrong in (plan[:-1], torch.cat([plan, plan]), plan.to(torch.int8), plan.to("meta"), plan[:0], packed):
        with pytest.raises((RuntimeError, NotImplementedError)):
            native(given, packed, wrong)
    with pytest.raises(RuntimeError, match="plan was made for"):
        native(given, packed, torch.zeros_like(plan))


def test_no_plan_makes_the_planned_op_read_or_write_beyond_its_tensors():
    """Numbers of a plan replaced one by one: refused, or the result of some other valid geometry."""
    given = tensors()
    packed, plan = packed_of(given), plan_of(given)
    expected = native(given, packed, plan)
    words = plan.view(torch.int64)
    for i in range(words.numel()):
        for value in (-(2**40), -1, 0, 1, 2, 3, 2**40):
            changed = words.clone()
            changed[i] = value
            try:
                found = native({**given, "residual": None}, packed, changed.view(torch.uint8))
            except RuntimeError:
                continue
            assert found.shape[:2] == expected.shape[:2]
            assert not found.isnan().any()
    assert torch.equal(native(given, packed, plan), expected)


@pytest.mark.parametrize("wrong", ["too short", "too long", "another type", "zeros", "another stride"])
def test_the_planned_op_refuses_what_is_no_packing(wrong):
    given = tensors()
    packed = packed_of(given)
    bad = {
        "too short": packed[:-1],
        "too long": torch.cat([packed, packed]),
        "another type": packed.to(torch.int8),
        "zeros": torch.zeros_like(packed),
        "another stride": packed_of(given, stride=2),
    }[wrong]
    with pytest.raises(RuntimeError, match="basis_conv2d: packed "):
        native(given, bad, plan_of(given))


def test_a_gradient_lost_in_the_planned_op_is_not_lost_silently():
    given = tensors()
    leaf = given["input"].clone().requires_grad_()
    out = native({**given, "input": leaf}, packed_of(given), plan_of(given))
    with pytest.warns(UserWarning, match="autograd kernel was not registered"), pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), leaf)
