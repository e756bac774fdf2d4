"""Gradients of ``basis_conv2d``: all five, frozen parts, what is refused, autocast and functional transforms."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from basisconv_kernels import basis_conv2d, testing, tucker_conv2d
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops.basis_conv2d import CANDIDATES
from basisconv_kernels.testing import tolerances

OP = "basis_conv2d"
# The backends that run on CPU tensors here.
AVAILABLE = [name for name, why in registry.reasons(CANDIDATES, Conv2dProblem(C=8, Q=4, K=8)).items() if not why]
NAMES = ("input", "basis_weight", "coefficients", "bias", "residual")

dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", AVAILABLE)


def leaves(case, frozen=()):
    tensors = zip(NAMES, testing.make_inputs(case).tensors, strict=True)
    return [None if t is None else t.detach().requires_grad_(name not in frozen) for name, t in tensors]


def call(case, tensors, **more):
    return basis_conv2d(*tensors[:4], residual=tensors[4], **case.arguments(), **more)


@dtypes
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_gradients(kernel, case, dtype):
    case = kernel.case(case, dtype)
    inputs = testing.make_inputs(case)
    probe = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    out = kernel.run(*probe[:4], residual=probe[4], **case.arguments())
    if not out.requires_grad and not hasattr(kernel.run, "func"):
        pytest.skip(f"{kernel.name} has no gradients")
    testing.check_gradients(case, kernel.run)
    with torch.no_grad():
        assert torch.equal(out, kernel.run(*probe[:4], residual=probe[4], **case.arguments()))


@pytest.mark.parametrize("name", ["whole_epilogue", "channels_last_stride", "groups"])
@backends
def test_gradients_are_the_same_twice(backend, name):
    case = testing.case(name)
    runs = []
    for _ in range(2):
        tensors = leaves(case)
        out = call(case, tensors, backend=backend)
        runs.append(torch.autograd.grad(out, [t for t in tensors if t is not None], torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class WeightGradients(TorchDispatchMode):
    """Shapes of the filters whose gradient some convolution computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.shapes.append(tuple(args[2].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [*[{name} for name in NAMES], set(NAMES) - {"coefficients"}], ids=sorted)
@backends
def test_frozen_tensors_get_no_gradient_and_change_no_other(backend, frozen):
    case = testing.case("whole_epilogue")
    everything, some = leaves(case), leaves(case, frozen)
    call(case, everything, backend=backend).sum().backward()
    with WeightGradients() as computed:
        call(case, some, backend=backend).sum().backward()
    if "basis_weight" in frozen:
        assert tuple(some[1].shape) not in computed.shapes
    for name, with_all, with_some in zip(NAMES, everything, some, strict=True):
        assert with_some.grad is None if name in frozen else torch.equal(with_all.grad, with_some.grad), name


@backends
def test_nothing_is_recorded_when_nothing_needs_a_gradient(backend):
    case = testing.case("bias")
    out = call(case, leaves(case, frozen=NAMES), backend=backend)
    assert out.grad_fn is None
    with torch.no_grad():
        assert not call(case, leaves(case), backend=backend).requires_grad


@pytest.mark.parametrize("name", ["whole_epilogue", "groups_compact", "asymmetric_padding", "sliced"])
def test_gradcheck(name):
    case = testing.case(name).at(dtype=torch.float64, N=1)
    tensors = leaves(case)

    def op(*tensors):
        return call(case, list(tensors))

    assert torch.autograd.gradcheck(op, tensors, fast_mode=True, **tolerances.GRADCHECK)


@backends
def test_double_backward_is_refused_by_name(backend):
    case = testing.case("residual_relu")
    tensors = leaves(case)
    (gradient,) = torch.autograd.grad(call(case, tensors, backend=backend).sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^basis_conv2d: double backward is not supported"):
        gradient.sum().backward()


@backends
def test_vmap_is_refused_by_name(backend):
    inputs = testing.make_inputs(testing.case("odd_sizes"))
    stacked = torch.stack([inputs.input, inputs.input])
    with pytest.raises(NotImplementedError, match=r"^basis_conv2d: torch.vmap is not supported"):
        torch.vmap(lambda input: basis_conv2d(input, inputs.basis_weight, inputs.coefficients, backend=backend))(
            stacked
        )


@backends
def test_functional_gradient(backend):
    case = testing.case("bias")
    tensors = leaves(case)
    call(case, tensors, backend=backend).sum().backward()
    detached = [None if t is None else t.detach() for t in tensors]
    gradient = torch.func.grad(lambda input: call(case, [input, *detached[1:]], backend=backend).sum())(detached[0])
    assert torch.equal(gradient, tensors[0].grad)


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
@backends
def test_autocast_gradients_come_back_in_the_dtype_of_the_parameters(backend, autocast_to):
    case = testing.case("whole_epilogue")
    outside, inside = leaves(case), leaves(case)
    with torch.autocast("cpu", dtype=autocast_to):
        out = call(case, inside, backend=backend)
    grad_output = torch.ones_like(out)
    out.backward(grad_output)
    cast = [t.to(autocast_to) for t in outside]
    call(case, cast, backend=backend).backward(grad_output)
    for name, a, b in zip(NAMES, outside, inside, strict=True):
        assert b.grad.dtype == torch.float32, name
        assert torch.equal(a.grad, b.grad), name


@backends
def test_an_input_that_was_changed_in_place_is_noticed(backend):
    case = testing.case("bias")
    tensors = leaves(case, frozen=("input",))
    out = call(case, tensors, backend=backend)
    tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Asked(TorchDispatchMode):
    """Names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _chain(*arguments, **more):
    return tucker_conv2d(arguments[0], torch.ones(6, 6), *arguments[1:], **more)


@pytest.mark.parametrize("function", [basis_conv2d, _chain], ids=["basis_conv2d", "tucker_conv2d"])
def test_the_backward_fills_no_gradient_of_the_maps_with_zeros(function):
    x, basis, mixing = (torch.ones(shape, requires_grad=True) for shape in ((2, 6, 7, 7), (4, 6, 3, 3), (5, 4)))
    out = function(x, basis, mixing, backend="reference")
    with Asked() as asked:
        torch.autograd.grad(out, (x, basis, mixing), torch.ones_like(out))
    assert "convolution_backward" in asked.names
    assert not {"zeros", "zeros_like", "new_zeros", "zero_"} & set(asked.names)


class NoGradient(torch.autograd.Function):
    """Identity whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("function", [basis_conv2d, _chain], ids=["basis_conv2d", "tucker_conv2d"])
def test_an_undefined_gradient_of_the_result_stays_undefined(function):
    x, basis, mixing = (torch.ones(shape, requires_grad=True) for shape in ((2, 6, 7, 7), (4, 6, 3, 3), (5, 4)))
    lost = NoGradient.apply(function(x, basis, mixing, backend="reference"))
    (lost.sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert basis.grad is None
    assert mixing.grad is None
