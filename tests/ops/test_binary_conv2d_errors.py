"""What ``binary_conv2d`` refuses, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from basisconv_kernels import BackendUnavailable, PackedTensor, Threshold, binary_conv2d, bitpack

X = torch.randn(2, 6, 5, 7)
W = torch.randn(4, 6, 3, 3)
PACKED = bitpack(X)
CODES = bitpack(X, bits=2)
T = Threshold(torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool))


def call(input=X, weight=W, *more, **settings):
    return binary_conv2d(input, weight, *more, **settings)


def broken(**change):
    """A packed tensor that changed after its own checks, as a damaged file could make it."""
    made = replace(PACKED)
    for name, value in change.items():
        object.__setattr__(made, name, value)
    return made


REFUSED = {
    "no tensor": (lambda: call([1]), TypeError, r"input must be a Tensor \[N, C, H, W\] or a PackedTensor, got list"),
    "rank": (lambda: call(X[0]), ValueError, r"input must be \[N, C, H, W\], got shape \[6, 5, 7\]"),
    "bare words": (lambda: call(PACKED.words), TypeError, r"input must be .*, got int32; words alone do not say"),
    "integers": (lambda: call(X.long()), TypeError, r"input must be float32, .* got torch.int64"),
    "sparse": (lambda: call(X.to_sparse()), TypeError, r"input must be a dense tensor"),
    "weight rank": (lambda: call(X, W[0]), ValueError, r"weight must be \[K, C/groups, R, S\], got shape"),
    "weight kind": (lambda: call(X, 3), TypeError, r"weight must be a Tensor .* or a PackedTensor, got int"),
    "weight of codes": (lambda: call(X, bitpack(W, bits=2)), ValueError, r"must hold signs, .* encoding 'unsigned'"),
    "empty weight": (lambda: call(X, W[:0]), ValueError, r"with no empty side, got \[0, 6, 3, 3\]"),
    "channels": (lambda: call(X, W[:, 1:]), ValueError, r"with C/groups = 6/1 from input, got \[4, 5, 3, 3\]"),
    "packed channels": (lambda: call(bitpack(X[:, 1:])), ValueError, r"with C/groups = 5/1 from input"),
    "groups": (lambda: call(groups=2), ValueError, r"with C/groups = 6/2 from input"),
    "filters of groups": (lambda: call(X, W[:3, :3], groups=2), ValueError, r"K = weight.shape\[0\] must be divisible"),
    "no groups": (lambda: call(groups=0), ValueError, r"groups must be at least 1, got 0"),
    "half groups": (lambda: call(groups=1.5), TypeError, r"groups must be an int, got 1.5"),
    "stride": (lambda: call(stride=0), ValueError, r"stride must be at least 1, got 0"),
    "dilation": (lambda: call(dilation=(1,)), TypeError, r"dilation must be an int or two ints"),
    "padding": (lambda: call(padding=-1), ValueError, r"padding must not be negative"),
    "padding value": (lambda: call(padding_value=2), ValueError, r"padding_value must be 0, 1 or -1, got 2"),
    "padding kind": (lambda: call(padding_value=0.0), TypeError, r"padding_value must be 0, 1 or -1, got 0.0"),
    "padding of codes": (lambda: call(CODES, padding_value=1), ValueError, r"must be 0 for unsigned codes"),
    "too small": (lambda: call(X[:, :, :2]), ValueError, r"padded input 2×7 is smaller than the dilated kernel 3×3"),
    "output": (lambda: call(output="int8"), ValueError, r"output must be 'float', 'int32' or 'packed', got 'int8'"),
    "activation": (lambda: call(activation="gelu"), ValueError, r"activation must be None, 'relu' or 'relu6'"),
    "scaled bits": (lambda: call(X, W, torch.ones(4), output="packed"), ValueError,
                    r"scale belongs to output='float', got output='packed'; fold it into threshold"),
    "activated sums": (lambda: call(activation="relu", output="int32"), ValueError, r"activation belongs to "),
    "float threshold": (lambda: call(threshold=T), ValueError, r"threshold belongs to output='packed'"),
    "threshold size": (lambda: call(X, W[1:], threshold=T, output="packed"), ValueError, r"must be \[3\]"),
    "threshold type": (lambda: call(threshold=Threshold(torch.zeros(4), T.flip), output="packed"), TypeError,
                       r"threshold.value must be torch.int32 for integers"),
    "scale size": (lambda: call(X, W, torch.ones(2)), ValueError, r"scale must be \[K\] .* = 4, got \[2\]; for fewer"),
    "scale kind": (lambda: call(X, W, torch.ones(4).int()), TypeError, r"scale must be float32, .* got torch.int32"),
    "bias size": (lambda: call(X, W, None, torch.ones(5)), ValueError, r"bias must be \[K\] .* = 4, got \[5\]"),
    "pixel scale": (lambda: call(pixel_scale=torch.ones(2, 1, 5, 7)), ValueError,
                    r"pixel_scale must be \[N, 1, OH, OW\] = \[2, 1, 3, 5\], got \[2, 1, 5, 7\]"),
    "groups of no scale": (lambda: call(scale_group=torch.zeros(4).long()), ValueError, r"so it needs scale, got None"),
    "group type": (lambda: call(X, W, torch.ones(2), scale_group=torch.ones(4)), TypeError, r"must be int64 or int32"),
    "group size": (lambda: call(X, W, torch.ones(2), scale_group=torch.zeros(3).long()), ValueError, r"got \[3\]"),
    "group range": (lambda: call(X, W, torch.ones(2), scale_group=torch.tensor([0, 1, 2, 0])), ValueError,
                    r"scale_group must be 0 to 1, the places in scale, got 0 to 2"),
    "negative group": (lambda: call(X, W, torch.ones(2), scale_group=torch.tensor([0, 1, -1, 0])), ValueError,
                       r"got -1 to 1"),
    "estimator": (lambda: call(estimator="tanh"), ValueError, r"estimator must be 'identity', 'clip'"),
    "mixed devices": (lambda: call(X.to("meta")), ValueError, r"weight must be on the device of input, meta"),
    "mixed packed": (lambda: call(PACKED.to("meta")), ValueError, r"weight must be on the device of input, meta"),
    "device of scale": (lambda: call(X, W, torch.ones(4, device="meta")), ValueError, r"scale must be on the"),
    "backend": (lambda: call(backend="tpu"), BackendUnavailable, r"backend 'tpu' cannot run \[6→4 3×3 signs float32"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(run, error, text):
    with pytest.raises(error, match=rf"(?s)^binary_conv2d: .*{text}"):
        run()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "version must be 1"),
        ({"word_bits": 64}, "word_bits must be 32"),
        ({"bit_order": "highest_first"}, "bit_order must be 'lowest_first'"),
        ({"planes": 2}, "encoding 'sign' has 1 planes, got 2"),
        ({"words": PACKED.words.expand(2, 1, 5, 7, 1)[:, :, ::2]}, "words must be dense"),
    ],
)
def test_a_packed_tensor_is_checked_again_on_use(change, text):
    call(PACKED)
    with pytest.raises(ValueError, match=f"^PackedTensor: {text}"):
        call(broken(**change))


def test_sums_that_do_not_fit_are_refused():
    huge = PackedTensor(torch.zeros(1, 1, 1, 1, 2**26, dtype=torch.int32, device="meta"), 2**31)
    with pytest.raises(ValueError, match=r"^binary_conv2d: sums of up to 2147483648 do not fit into int32"):
        binary_conv2d(huge, PackedTensor(huge.words, 2**31))
