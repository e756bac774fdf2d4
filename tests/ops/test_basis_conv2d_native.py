"""What only the native op has: one kernel an instruction set, and checks of its own for callers that bypass Python."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from basisconv_kernels import basis_conv2d, basis_conv2d_pack, testing
from basisconv_kernels.core import extension, registry
from basisconv_kernels.testing import tolerances

pytestmark = pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")

CPU = extension.facts().get("cpu", {})
OTHER_SETS = [name for name in CPU.get("built", []) if name != CPU["in_use"]]

PROGRAM = """
import functools, sys, torch
from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.core import extension
torch.set_num_threads(1)
kernel = functools.partial(basis_conv2d, backend="cpu")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in testing.CASES:
        testing.check(case.at(dtype=dtype), kernel)
print(extension.facts()["cpu"]["in_use"])
"""


@pytest.mark.parametrize("instruction_set", OTHER_SETS)
def test_every_instruction_set_passes_every_case(instruction_set):
    """The set is chosen once a process, so each has its own."""
    if CPU["built"].index(instruction_set) > CPU["built"].index(CPU["processor"]):
        pytest.skip(f"this processor has {CPU['processor']} at most; tests/packaging emulates wider sets")
    environment = {
        **os.environ,
        "BASISCONV_CPU_ISA": instruction_set,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == [instruction_set]


def raw(**change):
    inputs = testing.make_inputs(testing.case("bias").at(residual=True))
    arguments = {
        **dict(zip(("input", "basis_weight", "coefficients", "bias", "residual"), inputs.tensors, strict=True)),
        "packed": None, "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1],
        "groups": 1, "activation": None, "precise": False,
    }  # fmt: skip
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return torch.ops.basisconv.basis_conv2d.default(*arguments.values())


BAD = {
    "input rank": {"input": lambda t: t[0]},
    "input channels": {"input": lambda t: t[:, 1:]},
    "input dtype": {"input": lambda t: t.double()},
    "basis rank": {"basis_weight": lambda t: t[0]},
    "basis dtype": {"basis_weight": lambda t: t.half()},
    "no basis filter": {"basis_weight": lambda t: t[:0], "coefficients": lambda t: t[:, :0]},
    "coefficients rank": {"coefficients": lambda t: t[0]},
    "coefficients width": {"coefficients": lambda t: t[:, 1:]},
    "no output": {"coefficients": lambda t: t[:0]},
    "bias size": {"bias": lambda t: t[1:]},
    "bias dtype": {"bias": lambda t: t.half()},
    "residual size": {"residual": lambda t: t[:, :, 1:]},
    "residual dtype": {"residual": lambda t: t.half()},
    "stride zero": {"stride": [0, 1]},
    "one stride": {"stride": [1]},
    "dilation zero": {"dilation": [1, 0]},
    "dilation beyond the input": {"dilation": [2**40, 1]},
    "padding negative": {"padding": [1, -1, 1, 1]},
    "two paddings": {"padding": [1, 1]},
    "groups zero": {"groups": 0},
    "groups of another size": {"groups": 2},
    "activation": {"activation": "gelu"},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_the_raw_op_protects_memory(change):
    assert raw().shape == (2, 10, 7, 6)
    with pytest.raises(RuntimeError, match="basis_conv2d"):
        raw(**change)


@pytest.mark.parametrize(("Q", "groups"), [(4, 1), (5, 1), (6, 2)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_filling_up_registers_makes_no_nan_of_an_infinity(Q, groups, channels_last, dtype):
    """Maps that only fill up a register have filters of zeros, and zero times infinity is not zero."""
    x = torch.ones(1, 64 * groups, 5, 6, dtype=dtype)
    x[0, 3, 2, 2] = float("inf")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    basis, coefficients = (torch.ones(shape, dtype=x.dtype) for shape in ((Q, 64, 2, 2), (20, Q)))
    out = basis_conv2d(x, basis, coefficients, padding=1, groups=groups, backend="cpu")
    assert not out.isnan().any()
    assert out.isinf().sum() == 20 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("filters", [64, 72])  # a register holds filters alone, or two channels of half as many
def test_filters_too_large_to_stay_near_give_the_same_bits_alone_and_in_a_batch(filters, stride, groups, dtype):
    """Tiles of few images have their filters transformed from their taps, in one pass to four, those of a batch not."""
    C, Q = 352 * groups, filters * groups
    x = torch.randn(24, C, 9, 10).to(dtype).to(memory_format=torch.channels_last)
    basis, coefficients = torch.randn(Q, C // groups, 3, 3), torch.randn(40, Q)
    arguments = [basis.to(dtype), coefficients.to(dtype)]
    batch = basis_conv2d(x, *arguments, stride=stride, padding=1, groups=groups, backend="cpu")
    packed = basis_conv2d_pack(*arguments, stride=stride, groups=groups)
    for images in (1, 3, 8):
        for given in (None, packed):
            few = [
                basis_conv2d(i, *arguments, stride=stride, padding=1, groups=groups, backend="cpu", packed=given)
                for i in x.split(images)
            ]
            assert torch.equal(torch.cat(few), batch)
    assert torch.equal(
        basis_conv2d(x, *arguments, stride=stride, padding=1, groups=groups, backend="cpu", packed=packed), batch
    )
    expected = basis_conv2d(x, *arguments, stride=stride, padding=1, groups=groups, backend="reference")
    assert (batch - expected).abs().max() <= tolerances.SAME_LAYER[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize(("C", "Q"), [(3, 4), (19, 24), (40, 70)])
def test_weights_in_every_layout_pack_to_the_same_bytes(C, Q, shape, groups, dtype):
    basis, coefficients = torch.randn(groups * Q, C, *shape).to(dtype), torch.randn(20, groups * Q).to(dtype)
    packed = basis_conv2d_pack(basis, coefficients, groups=groups)
    wide = torch.zeros(groups * Q, 2 * C, *shape, dtype=dtype)
    wide[:, ::2] = basis
    for same in (basis.to(memory_format=torch.channels_last), basis.mT.contiguous().mT, wide[:, ::2]):
        assert torch.equal(same, basis)
        assert torch.equal(basis_conv2d_pack(same, coefficients, groups=groups), packed)
    turned = coefficients.t().contiguous().t()
    assert torch.equal(basis_conv2d_pack(basis, turned, groups=groups), packed)
