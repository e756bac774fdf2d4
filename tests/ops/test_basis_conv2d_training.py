"""A training step without a wish that runs as two convolutions: the ops of these, and nothing beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.core import registry
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_training as training

needs_library = pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")


class Asked(TorchDispatchMode):
    """Names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def leaves(dtype=torch.float32, residual=False, last=True, K=12):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 7, 9), (4, 8, 3, 3), (K, 4), (K,), *([(2, K, 7, 9)] if residual else [])]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    layout = torch.channels_last if last else torch.contiguous_format
    made = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in made]
    return [t.requires_grad_() for t in made]


def by_hand(input, basis_weight, coefficients, bias, residual=None, activation="relu"):
    out = F.conv2d(F.conv2d(input, basis_weight, padding=1), coefficients[:, :, None, None], bias)
    out = out if residual is None else out + residual
    return {"relu": F.relu, "relu6": F.relu6, None: lambda maps: maps}[activation](out)


def automatic(*tensors, activation="relu"):
    residual = tensors[4] if len(tensors) > 4 else None
    return basis_conv2d(*tensors[:4], padding=1, activation=activation, residual=residual)


def as_on_a_gpu(*tensors, activation="relu"):
    """What 16-bit tensors on a GPU run as, on the processor's kernels."""
    settings = op.Settings((1, 1), (1, 1, 1, 1), (1, 1), 1, activation, False, "reference")
    input = tensors[0]
    there = SimpleNamespace(shape=input.shape, stride=input.stride, dtype=input.dtype, device=torch.device("cuda"))
    step = training.two_convolutions(settings, there, *tensors[1:3])
    return step(*tensors, *([None] if len(tensors) < 5 else []))


def asked(function, tensors, activation="relu"):
    """The ops of a forward, those of its backward, the result and the gradients."""
    with Asked() as forward:
        out = function(*tensors, activation=activation)
    slope = torch.ones_like(out)
    with Asked() as backward:
        gradients = torch.autograd.grad(out, tensors, slope)
    return forward.names, backward.names, out, gradients


WAYS = [
    pytest.param(automatic, torch.float32, marks=needs_library, id="automatic"),
    pytest.param(as_on_a_gpu, torch.bfloat16, id="as on a GPU"),
]


@pytest.mark.parametrize(("function", "dtype"), WAYS)
def test_these_ops_and_no_others(function, dtype):
    forward, backward, _, _ = asked(function, leaves(dtype))
    assert forward == ["convolution", "view", "convolution", "relu_", "detach"][: len(forward)]
    assert len(forward) >= 4
    assert [name for name in backward if name != "detach"] == [
        "threshold_backward",
        "convolution_backward",
        "view",
        "convolution_backward",
    ]


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("function", "dtype"), WAYS)
def test_no_more_ops_than_by_hand_and_the_same_bits(function, dtype, residual, last, activation):
    tensors = leaves(dtype, residual, last)
    ours = asked(function, tensors, activation)
    hands = asked(by_hand, tensors, activation)
    assert len(ours[0]) <= len(hands[0])
    assert len(ours[1]) <= len(hands[1])
    assert ours[2].stride() == hands[2].stride()
    for found, expected in zip((ours[2], *ours[3]), (hands[2], *hands[3]), strict=True):
        assert torch.equal(found, expected)


@needs_library
def test_the_two_convolutions_have_second_derivatives():
    tensors = leaves()
    seconds = []
    for function in (automatic, by_hand):
        (gradient,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[:1], create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), tensors[:3]))
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_every_geometry(case):
    """The gradients are PyTorch's; padding, groups, strides and the memory format are ours to hand on."""
    inputs = testing.make_inputs(case.at(dtype=torch.float32, activation="relu6"))
    arguments = case.at(activation="relu6").arguments()
    names = ("stride", "padding", "dilation", "groups", "activation", "precise")
    plan = op._plan(inputs.tensors, (*(arguments[name] for name in names), "reference"))
    step = training.two_convolutions(plan.settings, *inputs.tensors[:3])
    found = step(*inputs.tensors)
    expected = basis_conv2d(*inputs.tensors[:4], residual=inputs.tensors[4], backend="reference", **arguments)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


@needs_library
@pytest.mark.parametrize(
    ("size", "filters", "ours"),
    {
        "many pixels": ((1, 64, 32, 32), (16, 64, 3, 3), True),
        "few pixels, much to multiply": ((8, 512, 7, 7), (128, 512, 3, 3), True),
        "few pixels, little to multiply": ((8, 64, 7, 7), (16, 64, 3, 3), False),
        "one image, much to multiply": ((1, 1024, 7, 7), (512, 1024, 3, 3), False),
        "no Winograd arithmetic": ((1, 64, 32, 32), (16, 64, 5, 5), False),
    }.values(),
)
def test_a_step_on_a_processor_runs_on_the_kernel_where_that_pays(size, filters, ours):
    x = torch.randn(size).to(memory_format=torch.channels_last)
    basis, coefficients = torch.randn(filters, requires_grad=True), torch.randn(24, filters[0])
    with Asked() as asked:
        basis_conv2d(x, basis, coefficients, padding=1)
    assert ("basis_conv2d_maps" in asked.names or "basis_conv2d" in asked.names) == ours
    assert ("convolution" in asked.names) != ours
