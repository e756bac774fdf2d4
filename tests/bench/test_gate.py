"""The correctness gate lets right results through and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness import answers, gate, runner
from bench.harness.gate import WrongResultError
from bench.harness.payload import layer_forms
from bench.harness.rows import Row

PROBLEM = Conv2dProblem(N=2, C=6, H=9, W=7, Q=5, K=11, padding=(1, 1, 1, 1), bias=True)


def prepared(form: str, dtype: torch.dtype = torch.float32) -> tuple[answers.Answers, torch.Tensor]:
    """The answers of a form, and what plain PyTorch computes for it."""
    from dataclasses import replace

    problem = replace(PROBLEM, dtype=dtype)
    x, forms = layer_forms(problem, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return answers.of(forms[form], problem, x, None), forms[form](x).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["two_step", "dense"])
@pytest.mark.parametrize("judged", [False, True])
def test_plain_pytorch_passes(form: str, dtype: torch.dtype, judged: bool) -> None:
    right, result = prepared(form, dtype)
    assert 0 < gate.check([result], right, dtype, judged)["worst"] <= 1


def test_the_three_forms_are_the_same_function() -> None:
    two_step, _ = prepared("two_step")
    dense, _ = prepared("dense")
    torch.testing.assert_close(two_step.exact[0], dense.exact[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("change", ["one element", "nan", "bias", "swapped"])
def test_wrong_results_are_stopped(change: str, judged: bool) -> None:
    right, result = prepared("two_step")
    if change == "one element":
        result[1, 4, 2, 3] += 1e-3
    elif change == "nan":
        result[0, 0, 0, 0] = torch.nan
    elif change == "bias":
        result += 0.01
    else:
        result = result.transpose(0, 1)
    with pytest.raises(WrongResultError):
        gate.check([result], right, torch.float32, judged)


def test_a_rival_without_a_bound_on_every_element_may_sum_in_another_order() -> None:
    """Ten times the error of plain PyTorch: too much for what is judged, nothing wrong in a rival's network."""
    right, result = prepared("dense")
    right.allowed = None
    off = (result.double() + 10 * (result.double() - right.exact[0])).float()
    assert gate.check([off], right, torch.float32, False)["worst"] <= 1
    with pytest.raises(WrongResultError):
        gate.check([off], right, torch.float32, True)
    with pytest.raises(WrongResultError):
        gate.check([result * 1.001], right, torch.float32, False)


def test_missing_results_are_stopped() -> None:
    right, result = prepared("dense")
    with pytest.raises(WrongResultError, match="gave 2 results instead of 1"):
        gate.check([result, result], right, torch.float32, False)
    with pytest.raises(WrongResultError, match="has shape"):
        gate.check([result[:1]], right, torch.float32, False)


def test_linear_layers_have_a_bound() -> None:
    layer, x = torch.nn.Linear(300, 40), torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right, result = answers.of(layer, None, x, None), layer(x)
        assert gate.check([result], right, torch.float32, False)["worst"] <= 1
        with pytest.raises(WrongResultError):
            gate.check([result + 1e-3], right, torch.float32, False)


def test_every_gradient_of_a_training_step_is_checked() -> None:
    x, forms = layer_forms(PROBLEM, torch.Generator().manual_seed(3))
    grad = torch.randn(2, 11, 9, 7, generator=torch.Generator().manual_seed(4))
    right = answers.of(forms["two_step"], PROBLEM, x, grad)
    results = answers.training_step(forms["two_step"], x, grad)
    assert len(results) == 5
    gate.check(results, right, torch.float32, True)
    for number in range(5):
        wrong = [r.clone() for r in results]
        wrong[number].view(-1)[-1] += 0.1
        with pytest.raises(WrongResultError):
            gate.check(wrong, right, torch.float32, True)


@pytest.mark.parametrize(
    ("engine", "kind", "form", "expected"),
    [
        ("ours", "layer", "fused", True), ("ours", "network", "fused", True), ("some:kernel", "layer", "fused", True),
        ("ours_compiled", "network", "fused", False), ("torch_compiled", "network", "dense", False),
        ("openvino", "layer", "two_step", False),
    ],
)  # fmt: skip
def test_all_rules_are_for_our_kernels_and_networks_that_no_compiler_changed(
    make_row: Callable[..., Row], engine: str, kind: str, form: str, expected: bool
) -> None:
    assert runner._judged(make_row(engine=engine, kind=kind, form=form)) is expected
