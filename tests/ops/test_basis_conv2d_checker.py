"""The checker itself: it catches wrong gradients, lets Winograd pass where the contract does, and loads by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.testing import Mismatch, inputs, tolerances


def right(input, basis_weight, coefficients, bias=None, **settings):
    return basis_conv2d(input, basis_weight, coefficients, bias, **settings, backend="reference")


def gradient_fault(which, change):
    """The op with one gradient changed."""

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            return tuple(t.view_as(t) if t is not None else None for t in tensors)

        @staticmethod
        def backward(ctx, *gradients):
            return tuple(change(g) if i == which else g for i, g in enumerate(gradients))

    def kernel(*tensors, residual, **settings):
        *rest, residual = Faulty.apply(*tensors, residual)
        return right(*rest, residual=residual, **settings)

    return kernel


GRADIENTS = ("input", "basis_weight", "coefficients", "bias", "residual")
CHANGES = {
    "missing": lambda g: None,
    "a thousandth too large": lambda g: g * 1.001,
    "one element": lambda g: torch.cat([g.flatten()[:-1], 1 - g.flatten()[-1:]]).view_as(g),
    "turned": lambda g: g.flip(-1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", range(5), ids=GRADIENTS)
def test_gradient_fault_is_caught(which, change):
    case = testing.case("whole_epilogue")
    testing.check_gradients(case, gradient_fault(which, lambda g: g))
    with pytest.raises(Mismatch, match=f"gradient of {GRADIENTS[which]}"):
        testing.check_gradients(case, gradient_fault(which, CHANGES[change]))


def test_a_kernel_without_gradients_is_named():
    with pytest.raises(Mismatch, match="has no gradient"):
        testing.check_gradients(testing.case("bias"), lambda *a, **k: right(*a, **k).detach())


def winograd(input, basis_weight, coefficients, bias=None, **settings):
    """F(2×2, 3×3) in float32, the form that the contract allows."""
    top, bottom, left, right_ = settings["padding"]
    oh, ow = (n + p - 2 for n, p in zip(input.shape[2:], (top + bottom, left + right_), strict=True))
    padded = F.pad(input, (left, right_ + ow % 2, top, bottom + oh % 2))
    before = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    filters = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    after = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
    tiles = before @ padded.unfold(2, 4, 2).unfold(3, 4, 2) @ before.T  # [N, C, tiles, tiles, 4, 4]
    products = torch.einsum("nctuij,qcij->nqtuij", tiles, filters @ basis_weight @ filters.T)
    n, q, t, u = products.shape[:4]
    maps = (after @ products @ after.T).permute(0, 1, 2, 4, 3, 5).reshape(n, q, 2 * t, 2 * u)[:, :, :oh, :ow]
    rest = {**settings, "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    one = torch.eye(q)[:, :, None, None]
    return reference.laid_out(right(maps, one, coefficients, bias, **rest), reference.memory_format(input))


ALLOWED = [c for c in testing.CASES if tolerances.winograd_allowed(c.problem) and c.problem.groups == 1]


@pytest.mark.parametrize("case", ALLOWED, ids=lambda case: case.name)
def test_winograd_arithmetic_passes_where_it_is_allowed(case):
    if case.problem.N == 0:
        pytest.skip("nothing to transform")
    testing.check(case, winograd)


def test_candidates_are_loaded_by_name_with_named_errors():
    assert testing.load("basisconv_kernels:basis_conv2d") is basis_conv2d
    for name, error, text in (
        ("basisconv_kernels", ValueError, "candidate: must be 'package.module:function', got 'basisconv_kernels'"),
        ("no_such_package:f", ImportError, "candidate: 'no_such_package' cannot be imported"),
        ("basisconv_kernels:f", ImportError, "candidate: module 'basisconv_kernels' has no 'f'"),
        ("basisconv_kernels:__version__", TypeError, "must be a function, got str"),
        ("math:sqrt", TypeError, "must take (input, basis_weight, coefficients, bias"),
    ):
        with pytest.raises(error) as raised:
            testing.load(name)
        assert text in str(raised.value)


def test_an_unknown_case_lists_the_names():
    with pytest.raises(ValueError, match="no case has the name 'nothing'; there are odd_sizes, "):
        testing.case("nothing")


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_sizes_of_a_case_differ(case):
    """The sizes that a kernel could mix up: channels, filters, outputs; rows and columns of input and output."""
    p = case.problem
    assert len({p.C, p.Q, p.K}) == 3 or p.C == 1
    assert p.H != p.W
    assert p.output_size[0] != p.output_size[1] or p.output_size == (1, 1)
    assert case.reason


def test_names_of_cases_are_unique():
    names = [case.name for case in (*testing.CASES, *testing.PERFORMANCE_CASES)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("values", ["random", "grid"])
def test_inputs_lie_as_asked_among_sentinels(case, values):
    made = testing.make_inputs(case, values=values)
    again = testing.make_inputs(case, values=values)
    p = case.problem
    assert made.changed() == []
    for one, other in zip(made.tensors, again.tensors, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())
    assert (made.bias is not None, made.residual is not None) == (p.bias, p.residual)
    assert made.input.shape == (p.N, p.C, p.H, p.W)
    if case.view == "expanded":
        assert made.input.stride(0) == 0
    if case.view in ("sliced", "transposed"):
        assert not made.input.is_contiguous()
        assert not made.input.is_contiguous(memory_format=torch.channels_last)
    if case.view == "offset":
        assert made.input.data_ptr() % (2 * made.input.element_size())
    start, end = made.input.storage_offset(), len(made.input.untyped_storage()) // made.input.element_size()
    storage = made.input.as_strided((end,), (1,), 0)
    assert storage[:start].isnan().all()
    assert storage[-inputs.GUARD :].isnan().all()


def test_poisoned_allocations_are_nan_and_the_mode_is_undone():
    with testing.poisoned_allocations():
        assert torch.empty(5).isnan().all()
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
