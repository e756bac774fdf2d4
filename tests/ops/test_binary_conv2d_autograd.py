"""Gradients of ``binary_conv2d``: straight-through estimators against plain PyTorch's autograd; what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import binary_conv2d, bitpack, filter_scale, magnitude_map
from basisconv_kernels.core import registry
from basisconv_kernels.ops.binary_conv2d import CANDIDATES
from basisconv_kernels.reference.binary_conv2d import ESTIMATORS, slope
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing import tolerances

# The backends that run on CPU tensors here.
AVAILABLE = [name for name, why in registry.reasons(CANDIDATES, BinaryConv2dProblem(C=8, K=8)).items() if not why]
backends = pytest.mark.parametrize("backend", AVAILABLE)
CLOSE = tolerances.FORMULA


class Sign(torch.autograd.Function):
    """Sign with an estimator, as a network in plain PyTorch would write it."""

    @staticmethod
    def forward(ctx, x, estimator):
        ctx.save_for_backward(x)
        ctx.estimator = estimator
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        factor = slope(x, ctx.estimator)
        return gradient if factor is None else gradient * factor, None


GEOMETRIES = {
    "plain": {},
    "stride and padding": {"stride": (2, 1), "padding": (1, 2, 0, 1)},
    "minus one": {"padding": (2, 1, 1, 1), "padding_value": -1},
    "plus one": {"padding": 1, "padding_value": 1, "dilation": (1, 2)},
    "groups": {"groups": 2, "padding": 1},
}


def plain(tensors, activation, estimators, stride=1, padding=0, padding_value=0, dilation=1, groups=1):
    """The op in PyTorch's own functions under its own autograd."""
    x, weight, scale, bias, pixel = tensors
    quad = (padding,) * 4 if isinstance(padding, int) else padding
    signs = F.pad(Sign.apply(x, estimators[0]), (quad[2], quad[3], quad[0], quad[1]), value=padding_value)
    out = F.conv2d(signs, Sign.apply(weight, estimators[1]), None, stride, 0, dilation, groups)
    out = out * scale[:, None, None] * pixel + bias[:, None, None]
    return {"relu": F.relu, "relu6": F.relu6, None: lambda y: y}[activation](out)


def leaves(geometry, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = geometry.get("groups", 1)
    shapes = [(2, 6, 6, 7), (4, 6 // groups, 3, 2)]
    x, weight = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    size = binary_conv2d(x.detach(), weight.detach(), **geometry).shape
    scale, bias = (torch.randn(4, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    pixel = torch.rand(size[0], 1, *size[2:], generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, scale, bias, pixel


@pytest.mark.parametrize("estimators", [*((e, "identity") for e in ESTIMATORS), *(("clip", e) for e in ESTIMATORS)])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_are_those_of_plain_pytorch(geometry, estimators):
    activation = {"identity": None, "clip": "relu"}.get(estimators[0], "relu6")
    ours, theirs = leaves(geometry), leaves(geometry)
    out = binary_conv2d(
        *ours[:4], pixel_scale=ours[4], activation=activation, estimator=estimators, **geometry
    )  # fmt: skip
    expected = plain(theirs, activation, estimators, **geometry)
    torch.testing.assert_close(out, expected, **CLOSE)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    for a, b in zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, theirs, grad), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_their_tensors_and_are_the_same_twice(backend, dtype):
    runs = []
    for _ in range(2):
        tensors = leaves(GEOMETRIES["groups"], dtype)
        out = binary_conv2d(*tensors[:4], pixel_scale=tensors[4], backend=backend, **GEOMETRIES["groups"])
        runs.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
    for tensor, first, second in zip(tensors, *runs, strict=True):
        assert first.dtype == tensor.dtype
        assert torch.equal(first, second)


@backends
def test_frozen_tensors_get_no_gradient_and_change_no_other(backend):
    geometry = GEOMETRIES["stride and padding"]
    everything = leaves(geometry, torch.float32)
    binary_conv2d(*everything[:4], pixel_scale=everything[4], backend=backend, **geometry).sum().backward()
    for frozen in range(5):
        some = leaves(geometry, torch.float32)
        some[frozen].requires_grad_(False)
        binary_conv2d(*some[:4], pixel_scale=some[4], backend=backend, **geometry).sum().backward()
        for place, (with_all, with_some) in enumerate(zip(everything, some, strict=True)):
            assert with_some.grad is None if place == frozen else torch.equal(with_all.grad, with_some.grad)


@backends
@pytest.mark.parametrize("bits", [1, 2])
def test_weights_have_gradients_behind_a_packed_input(backend, bits):
    codes = torch.randint(2**bits, (2, 5, 6, 6)).float()
    values = codes if bits > 1 else 2 * codes - 1
    packed = bitpack(values, bits=bits)
    weight = torch.randn(4, 5, 3, 3, requires_grad=True)
    (found,) = torch.autograd.grad(binary_conv2d(packed, weight, padding=1, backend=backend).sum(), weight)
    signs = Sign.apply(weight, "clip")
    (expected,) = torch.autograd.grad(F.conv2d(values, signs, padding=1).sum(), weight)
    assert torch.equal(found, expected)


def test_scale_of_the_weights_gives_the_gradient_of_a_binary_weight_network():
    """Dw = sign(w)/m·Σ_j g_j·sign(w_j) + α·g·1{|w| ≤ 1}, g the gradient of the binarised filters."""
    x, weight, *_ = leaves({})
    out = binary_conv2d(x, weight, filter_scale(weight))
    grad = torch.randn(out.shape, dtype=out.dtype)
    (found,) = torch.autograd.grad(out, weight, grad)
    w, signs = weight.detach(), torch.where(weight.detach() >= 0, 1.0, -1.0).double()
    binarised = (filter_scale(w)[:, None, None, None] * signs).requires_grad_()
    xb = torch.where(x.detach() >= 0, 1.0, -1.0).double()
    (g,) = torch.autograd.grad(F.conv2d(xb, binarised), binarised, grad)
    m = w[0].numel()
    expected = signs / m * (g * signs).sum((1, 2, 3), keepdim=True)
    expected = expected + filter_scale(w)[:, None, None, None] * g * (w.abs() <= 1)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_gradients_of_shared_scales_and_of_the_magnitude_map():
    x, weight, scale, *_ = leaves({})
    group = torch.tensor([1, 0, 1, 2])
    out = binary_conv2d(x, weight, scale, scale_group=group, pixel_scale=magnitude_map(x, (3, 2)))
    found = torch.autograd.grad(out.sum(), (x, scale))
    y, other = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    box = F.avg_pool2d(y.abs().mean(1, keepdim=True), (3, 2), 1)
    signs = F.conv2d(Sign.apply(y, "clip"), Sign.apply(weight.detach(), "clip"))
    expected = torch.autograd.grad((signs * other[group][:, None, None] * box).sum(), (y, other))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@backends
def test_double_backward_is_refused_by_name(backend):
    x, weight, *_ = leaves({}, torch.float32)
    out = binary_conv2d(x, weight, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^binary_conv2d: double backward is not supported"):
        gradient.sum().backward()


@backends
def test_vmap_is_refused_by_name(backend):
    x, weight, *_ = (t.detach() for t in leaves({}, torch.float32))
    with pytest.raises(NotImplementedError, match=r"^binary_conv2d: torch.vmap is not supported"):
        torch.vmap(lambda one: binary_conv2d(one, weight, backend=backend))(torch.stack([x, x]))


@backends
def test_integers_and_bits_have_no_gradient(backend):
    x, weight, *_ = leaves({}, torch.float32)
    assert not binary_conv2d(x, weight, output="int32", backend=backend).requires_grad
    assert not binary_conv2d(x, weight, output="packed", backend=backend).words.requires_grad
