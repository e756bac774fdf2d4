"""Plain PyTorch by a GPU library's kernels for 16 bits, on the processor's kernels for them."""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import basis_conv2d, testing, tucker_conv2d
from basisconv_kernels.ops import basis_conv2d_unfused, tucker_conv2d_unfused

HALF = (torch.bfloat16, torch.float16)


def on_a_processor(rule):
    """The rule as if the tensors were on a GPU."""

    def has_it(input, *others):
        class There:
            device, dtype, shape, stride = torch.device("cuda"), input.dtype, input.shape, input.stride
            is_contiguous, dim = input.is_contiguous, input.dim

        return rule(There, *others)

    return has_it


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Calls take the path for GPUs; a list that counts them."""
    taken = []
    for module in (basis_conv2d_unfused, tucker_conv2d_unfused):
        monkeypatch.setattr(module, "library_has_it", on_a_processor(module.library_has_it))
    run = basis_conv2d_unfused.by_the_library

    def noting(*arguments):
        taken.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(basis_conv2d_unfused, "by_the_library", noting)
    return taken


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_the_result_is_rounded_as_the_contract_says(case, last, dtype, library):
    case = case.at(dtype=dtype, channels_last=last)
    testing.check(case, functools.partial(basis_conv2d, backend="reference"))
    p = case.problem
    if last and case.view == "dense":
        assert bool(library) == (not p.precise and not p.compact and not p.residual and p.N > 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", testing.TUCKER_CASES, ids=lambda case: case.name)
def test_the_chain_too(case, dtype):
    testing.check_tucker(
        case.at(dtype=dtype, channels_last=True), functools.partial(tucker_conv2d, backend="reference")
    )


@pytest.mark.parametrize(
    "changed", [{"precise": True}, {"groups": 2, "compact": True}, {"residual": True}, {"channels_last": False}, {}]
)
def test_what_the_library_is_not_asked_for(changed, library):
    case = testing.case("whole_epilogue").at(
        dtype=torch.bfloat16, C=8, Q=4, K=6, **{"residual": False, "channels_last": True, **changed}
    )
    testing.check(case, functools.partial(basis_conv2d, backend="reference"))
    assert bool(library) == (not changed)


def test_the_backward_gets_the_maps_in_the_dtype_of_the_input():
    case = testing.case("whole_epilogue").at(dtype=torch.bfloat16, channels_last=True)
    testing.check_gradients(case, functools.partial(basis_conv2d, backend="reference"))
