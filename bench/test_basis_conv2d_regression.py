"""Our op on the cases of C1 to C3 under pytest-benchmark, to catch a slowdown between two commits of this tree.

Not part of the test run, and no comparison of engines (that is ``python -m bench``: one process an engine, in turn)::

    pytest bench/test_basis_conv2d_regression.py --benchmark-autosave
    pytest bench/test_basis_conv2d_regression.py --benchmark-compare --benchmark-compare-fail=median:10%

Each case passes the correctness gate before it is timed. ``two_step`` is eager PyTorch in the same process: if it moved
as much as ours, the machine did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import basis_conv2d
from bench.harness import answers, gate
from bench.harness.case import Case, Form
from bench.harness.engine_ours import Ours
from bench.harness.payload import SEED, layer_forms

pytest.importorskip("pytest_benchmark")

CASES = [case for suite in (basis_conv2d.C1, basis_conv2d.C2, basis_conv2d.C3) for case in suite.cases]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a benchmark of one call measures least noisily."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _name(case: Case) -> str:
    assert case.problem is not None
    return f"{case.id}_{str(case.problem.dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("form", ["fused", "two_step"])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_forward(case: Case, form: Form, benchmark: Any) -> None:
    """One inference call, host cost included, weights packed before, channels_last."""
    assert case.problem is not None
    x, forms = layer_forms(case.problem, torch.Generator().manual_seed(SEED))
    right = answers.of(forms["two_step"], case.problem, x, None)
    x = x.contiguous(memory_format=torch.channels_last)
    module = forms[form].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        call = Ours().forward(module, training=False)[0] if form == "fused" else module
        gate.check([call(x).float()], right, case.problem.dtype, form == "fused")
        benchmark.group = _name(case)
        benchmark(call, x)
