"""As ``interpreted``, for the kernels of bits: what the interpreting process runs for the fixture ``interpreter``."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BackendUnavailable, binary_conv2d, bitpack, stacked_binary_conv2d, ternary_conv2d, testing
from basisconv_kernels.core.packed import PackedTensor, pack_planes
from basisconv_kernels.ops import (
    binary_conv2d_selfcheck,
    bitpack_selfcheck,
    stacked_binary_conv2d_selfcheck,
    ternary_conv2d_selfcheck,
)
from basisconv_kernels.ops import ternary_conv2d as ternary_op
from basisconv_kernels.testing import stacked_binary_conv2d as stacked
from basisconv_kernels.testing import ternary_conv2d as ternary
from basisconv_kernels.testing.binary_conv2d import arguments, check_pack
from basisconv_kernels.triton_kernels import _common
from basisconv_kernels.triton_kernels import _signed_conv2d as signed
from basisconv_kernels.triton_kernels import bitpack as packing
from tests.triton.interpreted import CompileCounterWithBackend

OPS: dict[str, Any] = {
    "ternary_conv2d": (ternary.check, ternary_conv2d, ternary_conv2d_selfcheck),
    "stacked_binary_conv2d": (stacked.check_stacked, stacked_binary_conv2d, stacked_binary_conv2d_selfcheck),
    "binary_conv2d": (testing.check_binary, binary_conv2d, binary_conv2d_selfcheck),
    "bitpack": (check_pack, bitpack, bitpack_selfcheck),
}


def check(op: str, case: Any, seed: int = 0) -> None:
    """The whole contract of an op's forward pass."""
    checked, function, _ = OPS[op]
    checked(case, functools.partial(function, backend="triton"), seed=seed)


def check_wide(op: str, case: Any) -> None:
    """The same as for tensors of more than 2³¹ elements, with offsets of 64 bits."""
    limit, _common.FAR = _common.FAR, 0
    try:
        check(op, case)
    finally:
        _common.FAR = limit


def check_tile(op: str, case: Any, tile: Any) -> None:
    """The same on one row of a table of tiles."""
    choose, signed.bits_configs.product_tile = signed.bits_configs.product_tile, lambda *_: tile
    signed._plans.clear()
    try:
        check(op, case)
    finally:
        signed.bits_configs.product_tile = choose
        signed._plans.clear()


def check_ternary_gradients(case: ternary.TernaryCase) -> None:
    """All gradients against the explicit formulas."""
    ternary.check_gradients(case, functools.partial(ternary_conv2d, backend="triton"))


def any_geometry(op: str, name: str, count: int) -> None:
    """Geometries in float16 as the tests of the op draw them, each with its own seed of values."""
    cases = getattr(importlib.import_module(f"tests.ops.test_{op}"), name)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(), seed=st.integers(0, 2**31))
    def drawn(case: Any, seed: int) -> None:
        check(op, case.at(dtype=torch.float16), seed)

    drawn()


def packed_input_of_ternary(planes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed signs or codes against the same numbers in float64."""
    generator = torch.Generator().manual_seed(planes)
    codes = torch.randint(2**planes, (2, 37, 6, 7), generator=generator)
    bits = torch.stack([(codes >> plane) & 1 for plane in range(planes)], 1).bool()
    packed = PackedTensor(pack_planes(bits), 37, planes, "unsigned" if planes > 1 else "sign")
    weight = torch.randint(-1, 2, (9, 37, 3, 3), generator=generator)
    values = codes.double() if planes > 1 else 2.0 * codes.double() - 1.0
    found = ternary_conv2d(packed, ternary_op.ternary_planes(weight), padding=1, backend="triton")
    return found, torch.nn.functional.conv2d(values, weight.double(), padding=1)


def large_binary_sums() -> tuple[torch.Tensor, torch.Tensor]:
    """Real input whose sums the products in float32 may not hold: it is packed and counted instead."""
    case = testing.binary_case("odd_sizes")
    inputs = testing.make_binary_inputs(case)
    kept, signed.EXACT = signed.EXACT, 1
    try:
        found = binary_conv2d(inputs.input, inputs.weight, output="int32", backend="triton", **arguments(case))
        return found, inputs.sums
    finally:
        signed.EXACT = kept


def self_check(op: str, problem: tuple[Any, ...], wrong: bool) -> str | None:
    """What the check before automatic choice says of the kernel, or of one whose result is off by a little."""
    *_, module = OPS[op]
    target = packing if op == "bitpack" else signed
    own = target.forward

    def off(*arguments: Any) -> torch.Tensor:
        out = own(*arguments)
        return out * 1.01 if out.is_floating_point() else out + 1

    if wrong:
        target.forward = off
    try:
        module.against_reference("triton", *problem)
    except AssertionError as error:
        return str(error)
    finally:
        target.forward = own
    return None


def compiled() -> int:
    """One graph for two sizes, forward and backward, as eager computes them; how many graphs there were."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    planes = ternary_op.ternary_planes(torch.randint(-1, 2, (9, 7, 3, 3)))
    scale = torch.rand(9, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ternary_conv2d(x, planes, scale, padding=1, activation="relu", backend="triton")

    step = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for width in (11, 13):
        x = torch.randn(2, 7, 5, width, requires_grad=True)
        out, expected = step(x), call(x)
        assert torch.equal(out, expected)
        ours, theirs = (torch.autograd.grad(o, (x, scale), torch.ones_like(o)) for o in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return counter.frame_count


def opcheck() -> dict[str, dict[str, str]]:
    """Fake, schema and dispatch of the torch ops, by torch's own tests."""
    x = torch.randn(2, 5, 6, 7)
    planes = ternary_op.ternary_planes(torch.randint(-1, 2, (8, 5, 3, 3)))
    weight, index = torch.randn(8, 5, 3, 3).sign(), torch.randint(8, (6, 1))
    geometry: tuple[Any, ...] = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    stride, padding, dilation, groups = geometry
    ops = torch.ops.basisconv_triton
    calls: dict[Any, tuple[Any, ...]] = {
        ops.ternary_conv2d.default: (x, planes, torch.rand(8), None, None, *geometry, "relu"),
        ops.stacked_binary_conv2d.default: (
            x, weight, index, None, torch.rand(6), *geometry, False, None, "float32", 5, None,
        ),
        ops.binary_conv2d.default: (
            x, weight, torch.rand(8), None, None, None, None, stride, padding, 0, dilation, groups, None, "float32", 5,
            None, False,
        ),
        ops.bitpack.default: (x, None, None, 2, True),
    }  # fmt: skip
    return {str(op): torch.library.opcheck(op, arguments) for op, arguments in calls.items()}


def counted_flops() -> list[int]:
    """What torch's counter says of a call on Triton, and of the same on plain PyTorch's convolution."""
    x, weight = torch.randn(2, 5, 6, 7), torch.randn(8, 5, 3, 3).sign()
    planes = ternary_op.ternary_planes(weight)
    calls = (
        lambda: ternary_conv2d(x, planes, padding=1, backend="triton"),
        lambda: stacked_binary_conv2d(x, weight, torch.arange(8)[:, None], padding=1, backend="triton"),
        lambda: binary_conv2d(x, weight, padding=1, backend="triton"),
        lambda: torch.nn.functional.conv2d(x, weight, padding=1),
    )
    found = []
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        found.append(counter.get_total_flops())
    return found


def refusal(dtype: torch.dtype) -> str:
    """What an explicit choice says that cannot run."""
    planes = ternary_op.ternary_planes(torch.ones(2, 3, 1, 1))
    try:
        ternary_conv2d(torch.zeros(1, 3, 2, 2, dtype=dtype), planes, backend="triton")
    except BackendUnavailable as error:
        return str(error)
    return ""
