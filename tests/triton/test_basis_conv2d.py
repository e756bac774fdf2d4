"""The Triton kernels of ``basis_conv2d`` under Triton's interpreter: values, gradients, NaN, geometries."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import testing
from tests.triton import interpreted

pytestmark = pytest.mark.xdist_group("triton_interpreter")  # one interpreting process, not one a worker

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@dtypes
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_result(interpreter, case, dtype):
    interpreter(interpreted.check, case.at(dtype=dtype))


@dtypes
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_gradients(interpreter, case, dtype):
    interpreter(interpreted.check_gradients, case.at(dtype=dtype))
