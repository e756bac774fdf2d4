"""Memory formats that all references share, and the convolution of PyTorch behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels.core.layout import conv2d, convolution_backward


def channels_last(*size, dtype):
    """Random numbers whose strides say channels_last for one channel, too."""
    C, H, W = size[1:]
    return torch.empty_strided(size, (C * H * W, 1, C * W, C), dtype=dtype).copy_(torch.randn(size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("taps", [(3, 3), (2, 2), (1, 2)])
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("width", [3, 4, 9])
def test_a_convolution_is_that_of_its_formula(C, width, taps, stride, dtype):
    """One channel, one output a row and a horizontal stride go wrong in PyTorch 2.13 itself (oneDNN on AVX-512)."""
    x, weight = channels_last(3, C, 6, width, dtype=dtype), channels_last(5, C, *taps, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    out = conv2d(x, weight, None, stride, (1, 0), (1, 1), 1)

    plain = [t.detach().double().contiguous().requires_grad_() for t in (x, weight)]
    patches = F.unfold(plain[0], taps, padding=(1, 0), stride=stride)
    expected = (plain[1].flatten(1) @ patches).view_as(out)
    upstream = torch.randn_like(expected)
    got = [out, *torch.autograd.grad(out, [x, weight], upstream.to(dtype))]
    for one, same in zip(got, [expected, *torch.autograd.grad(expected, plain, upstream)], strict=True):
        assert torch.allclose(one.double(), same, rtol=1e-4, atol=1e-4)


def test_a_compiled_convolution_is_that_of_its_formula():
    """The compiler passes a convolution the strides of its input, whatever views stand between."""
    x, weight = channels_last(3, 1, 6, 3, dtype=torch.float32), channels_last(16, 1, 3, 3, dtype=torch.float32)
    compiled = torch.compile(lambda x, weight: conv2d(x, weight, None, (1, 2), (1, 0), (1, 1), 1), fullgraph=True)
    expected = F.conv2d(x.double(), weight.double(), None, (1, 2), (1, 0))
    assert torch.allclose(compiled(x, weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_mapped_convolution_is_that_of_its_formula():
    x, weight = channels_last(8, 1, 6, 4, dtype=torch.float32), torch.randn(5, 1, 3, 3)
    mapped = torch.vmap(lambda x: conv2d(x, weight, None, (1, 2), (1, 0), (1, 1), 1))(x.unflatten(0, (2, 4)))
    expected = F.conv2d(x.double(), weight.double(), None, (1, 2), (1, 0))
    assert torch.allclose(mapped.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stride", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("taps", [(3, 3), (2, 2), (2, 3)])
@pytest.mark.parametrize("C", [1, 20])
@pytest.mark.parametrize("size", [(1, 6), (2, 1), (5, 2), (7, 7)])
def test_gradients_are_those_of_the_formula(C, size, taps, stride, dtype):
    """In PyTorch 2.13 those of the weight go wrong in bfloat16 on AMX where a row has one output and a stride."""
    x, weight = channels_last(3, C, *size, dtype=dtype), channels_last(8, C, *taps, dtype=dtype)
    plain = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.conv2d(*plain, None, stride, (1, 1))
    upstream = torch.randn_like(expected).to(dtype)
    found = convolution_backward(upstream, x, weight, [8], stride, (1, 1), (1, 1), 1, [True, True, True])
    assert all(got.dtype == dtype for got in found)
    wanted = [*torch.autograd.grad(expected, plain, upstream.double()), upstream.double().sum((0, 2, 3))]
    for got, same in zip(found, wanted, strict=True):
        error = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(got.double(), same, rtol=error, atol=error * float(same.abs().max()))
    assert not any(
        t is not None
        for t in convolution_backward(upstream, x, weight, None, stride, (1, 1), (1, 1), 1, [False, False, False])[:2]
    )
