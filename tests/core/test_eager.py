"""The C of repeated calls: what it looks at, what it refuses, and that it neither leaks nor crashes."""

import sys

import pytest
import torch

eager = pytest.importorskip("basisconv_kernels.core._eager", reason="calls have no short way here")
from basisconv_kernels.core.eager import DISTURBANCES, plain  # noqa: E402

PLAN = torch.zeros(3)


def native(*operands):
    """Stands for a planned op; refuses the number 13."""
    if any(isinstance(operand, torch.Tensor) and operand.numel() == 13 for operand in operands):
        raise RuntimeError("refused")
    return operands


def known(packed, arguments, rest=None):
    return {eager.key(packed, arguments, rest): (arguments, PLAN)}


def test_tensors_that_nobody_watches_are_plain():
    x = torch.zeros(2)
    assert plain()
    assert plain(x, None, torch.nn.Parameter(x, requires_grad=False))
    assert not plain(x, 1)
    assert not plain(x.as_subclass(type("Mine", (torch.Tensor,), {})))
    assert not plain(x.clone().requires_grad_())
    with torch.no_grad():
        assert plain(x.clone().requires_grad_())
    with torch.autocast("cpu"):
        assert not plain(x)
    seen = []
    torch.func.vmap(lambda _: (seen.append(plain(x)), x)[1])(torch.zeros(1, 2))
    torch.jit.trace(lambda t: (seen.append(plain(x)), t)[1], x, check_trace=False)
    assert seen == [False, False]
    assert not any(disturbed() for disturbed in DISTURBANCES)


def test_a_known_call_is_made_and_others_are_not():
    x, packed = torch.zeros(2), torch.zeros(4)
    plans = known(packed, ((1, 1), "same"))
    out = eager.call(plans, native, packed, ((1, 1), "same"), None, x, None)
    assert [*map(id, out)] == [*map(id, (x, None, packed, PLAN))]
    for others in (
        (packed, ((1, 1), "valid"), None),
        (packed, ((1.0, 1), "same"), None),
        (packed, ((True, 1), "same"), None),
        (packed, ([1, 1], "same"), None),
        (packed, ((1, 1), "same"), 5),
        (x, ((1, 1), "same"), None),
    ):
        assert eager.call(plans, native, *others, x, None) is None
    assert eager.call(plans, native, packed, ((1, 1), "same"), None, 3, None) is None
    assert len(plans) == 1
    assert eager.call(plans, native, packed, ((1, 1), "same"), None, torch.zeros(13)) is None
    assert not plans


def test_other_errors_of_an_op_are_not_swallowed():
    def broken(*_):
        raise KeyboardInterrupt

    packed = torch.zeros(4)
    with pytest.raises(KeyboardInterrupt):
        eager.call(known(packed, ()), broken, packed, (), None, packed)


@pytest.mark.parametrize(
    "call",
    [
        lambda: eager.watch(1),
        lambda: eager.watch((), (), 1, 2, 3, 4, [], 5),
        lambda: eager.call({}, native, PLAN, [], None, PLAN),
        lambda: eager.call([], native, PLAN, (), None, PLAN),
        lambda: eager.call(),
        lambda: eager.key(1),
        lambda: eager.repeat((), {}, PLAN),
        lambda: eager.repeat((native, None, (), (), (PLAN,) * 17, (0,)), {}, PLAN),
        lambda: eager.repeat((native, None, (), (), (PLAN,), (1,)), {}, PLAN),
        lambda: eager.repeat((native, None, (), (), (PLAN, PLAN), (0, 1)), {}, PLAN),
        lambda: eager.repeat((native, None, (), (), (PLAN,), (-1,)), {}, PLAN),
    ],
)
def test_wrong_use_is_a_type_error(call):
    with pytest.raises(TypeError):
        call()


def test_malformed_memory_raises_instead_of_crashing():
    for memory in (
        (native, None, ((),), (), (PLAN,), (0,)),
        (native, None, (1,), (), (PLAN,), (0,)),
        (native, None, (), ((),), (PLAN,), (0,)),
        (native, None, 1, (), (PLAN,), (0,)),
        (native, None, (), (), 1, (0,)),
        (native, None, (), (), (PLAN,), ("a",)),
        (native, None, (), (("_buffers", "w", PLAN, (1, 2)),), (PLAN,), (0,)),
    ):
        with pytest.raises((TypeError, IndexError, SystemError, AttributeError)):
            eager.repeat(memory, {"_buffers": {"w": PLAN}}, PLAN)


def test_nothing_is_leaked():
    x, packed, arguments = torch.zeros(2), torch.zeros(4), ((1, 1), "same")
    plans = known(packed, arguments)
    memory = (native, None, (("stride", arguments),), (("_buffers", "w", packed, None),), (None, packed, PLAN), (0,))
    layer = {"stride": arguments, "_buffers": {"w": packed}}
    watched = (x, packed, arguments, PLAN, memory, layer, native)

    def calls():
        for _ in range(1000):
            eager.call(plans, native, packed, arguments, None, x)
            eager.call(plans, native, packed, arguments, 1, x)
            assert eager.repeat(memory, layer, x) is not None
            assert eager.repeat(memory, {**layer, "stride": 1}, x) is None
            plain(x, 1)

    calls()
    before = [sys.getrefcount(thing) for thing in watched]
    calls()
    assert [sys.getrefcount(thing) for thing in watched] == before
