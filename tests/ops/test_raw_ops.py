"""Native torch ops called as themselves: no gradient is lost in silence, and no Python of ours stands in their path."""

import sys

import pytest
import torch

import basisconv_kernels as bk
from basisconv_kernels.core import extension
from basisconv_kernels.ops import stacked_binary_conv2d_native as stacked

pytestmark = pytest.mark.skipif(extension.load() is not None, reason="the native library is not built")
GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1])  # stride, padding, dilation
SIGNS = torch.randn(4, 16, 3, 3, generator=torch.Generator().manual_seed(1)).sign()
INDEX = torch.randint(4, (8, 2), generator=torch.Generator().manual_seed(2))
PACKED = stacked.stacked_binary_conv2d_pack(SIGNS, INDEX)
FORMATS = extension.facts()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def basis_conv2d(x, weight, coefficients, bias, residual):
    return torch.ops.basisconv.basis_conv2d(x, weight, coefficients, bias, residual, None, *GEOMETRY, 1, "relu", False)


def basis_conv2d_maps(x, weight, coefficients):
    return torch.ops.basisconv.basis_conv2d_maps(x, weight, coefficients, None, None, None, *GEOMETRY, 1, None, True)


def basis_conv2d_pack(weight, coefficients):
    return torch.ops.basisconv.basis_conv2d_pack(weight, coefficients, [1, 1], [1, 1], 1, False, FORMATS["pack_format"])


def binary_conv2d(x, weight, scale):
    return torch.ops.basisconv.binary_conv2d(
        x, weight, scale, None, None, None, None, None, *GEOMETRY[:2], 0, [1, 1], 1, None, "float32", 32, None, False
    )


def binary_conv2d_pack(weight):
    return torch.ops.basisconv.binary_conv2d_pack(weight, False, 32, 1, FORMATS["binary_pack_format"])


def bitpack(x):
    return torch.ops.basisconv.bitpack(x, None, None, 1, False)


def stacked_binary_conv2d(x, scale):
    shapes = (list(SIGNS.shape), list(INDEX.shape))
    return torch.ops.basisconv.stacked_binary_conv2d(x, PACKED, scale, None, *shapes, *GEOMETRY, 1, "real", None)


def stacked_binary_conv2d_pack(bank):
    return torch.ops.basisconv.stacked_binary_conv2d_pack(bank, INDEX, 1, stacked.FORMAT)


def ternary_conv2d(x, scale):
    planes = torch.zeros(8, 2, 3, 3, 1, dtype=torch.int32)
    return torch.ops.basisconv.ternary_conv2d(x, planes, scale, None, None, None, *GEOMETRY, 1, None)


IMAGE = (1, 32, 6, 6)
CALLS = {
    basis_conv2d: (IMAGE, (4, 32, 3, 3), (8, 4), (8,), (1, 8, 6, 6)),
    basis_conv2d_maps: (IMAGE, (4, 32, 3, 3), (8, 4)),
    basis_conv2d_pack: ((4, 32, 3, 3), (8, 4)),
    binary_conv2d: (IMAGE, (8, 32, 3, 3), (8,)),
    binary_conv2d_pack: ((8, 32, 3, 3),),
    bitpack: (IMAGE,),
    stacked_binary_conv2d: (IMAGE, (8,)),
    stacked_binary_conv2d_pack: ((4, 16, 3, 3),),
    ternary_conv2d: (IMAGE, (8,)),
}
each_op = pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)


def tensors_for(op):
    made = [random(*shape) for shape in CALLS[op]]
    return [t.sign() for t in made] if op is stacked_binary_conv2d_pack else made


@each_op
def test_a_gradient_is_refused_of_every_tensor_and_in_gradient_mode_alone(op):
    tensors = tensors_for(op)
    plain = op(*tensors)
    for i, tensor in enumerate(tensors):
        leaf = tensor.clone().requires_grad_()
        for wanting in (leaf, leaf * 1):
            changed = [*tensors[:i], wanting, *tensors[i + 1 :]]
            with pytest.raises(RuntimeError, match=rf"torch.ops.basisconv.{op.__name__} has no gradient of its own"):
                op(*changed)
            with torch.no_grad():
                torch.testing.assert_close(op(*changed), plain)
    with torch.inference_mode():
        made_here = tensors_for(op)
    torch.testing.assert_close(op(*made_here), plain)


@each_op
def test_transforms_are_refused(op):
    tensors = tensors_for(op)

    def loss(*tensors):
        out = op(*tensors)
        return (out if isinstance(out, torch.Tensor) else out[0]).float().sum()

    with pytest.raises(RuntimeError, match=rf"torch.ops.basisconv.{op.__name__} knows no transforms"):
        torch.func.grad(loss)(*tensors)
    with pytest.raises(RuntimeError, match=rf"torch.ops.basisconv.{op.__name__} knows no transforms"):
        torch.vmap(loss)(*(t[None] for t in tensors))


@each_op
def test_tracing_refuses_gradients_too(op):
    tensors = [t.to("meta").requires_grad_() for t in tensors_for(op)]
    with pytest.raises((RuntimeError, ValueError), match=r"has no gradient of its own"):
        op(*tensors)


@each_op
def test_no_python_of_ours_runs_below_the_dispatcher(op):
    tensors = [t.requires_grad_() for t in tensors_for(op)]
    seen = []
    with torch.no_grad():
        op(*tensors)
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_filename) if event == "call" else None)
        try:
            op(*tensors)
        finally:
            sys.setprofile(None)
    assert seen, "nothing was traced"
    assert not [name for name in seen if "basisconv_kernels" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [lambda numbers: numbers[::2], lambda numbers: numbers[:1].expand(8)])
@pytest.mark.parametrize("op", ["basis", "binary", "stacked", "ternary"])
def test_numbers_of_outputs_may_be_a_view(op, view, dtype):
    numbers = view(random(16).to(dtype))
    x = random(2, 16, 6, 7).to(dtype)

    def call(scale, bias):
        if op == "basis":
            weight, coefficients = random(4, 16, 3, 3).to(dtype), random(8, 4).to(dtype)
            return bk.basis_conv2d(x, weight, coefficients, bias, padding=1, backend="cpu")
        if op == "binary":
            return bk.binary_conv2d(x, random(8, 16, 3, 3), scale, bias, padding=1, backend="cpu")
        if op == "stacked":
            return bk.stacked_binary_conv2d(x, SIGNS[:, :8], INDEX, scale, bias, padding=1, backend="cpu")
        planes = bk.ternary_planes(random(8, 16, 3, 3).sign())
        return bk.ternary_conv2d(x, planes, scale, bias, padding=1, backend="cpu")

    dense = numbers.contiguous()
    assert numbers.stride() != dense.stride()
    assert torch.equal(call(numbers, numbers), call(dense, dense))
