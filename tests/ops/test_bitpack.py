"""Every backend of ``bitpack`` on every case: bits, thresholds, codes; and what is refused."""

from __future__ import annotations

import doctest
import functools
import importlib

import pytest
import torch

from basisconv_kernels import BackendUnavailable, PackedTensor, Threshold, bitpack, testing, unpack, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.ops.bitpack import CANDIDATES

DEVICE = {"cuda": "cuda"}  # of the tensors; the CPU for all others
# A GPU's backends are listed anywhere and run where there is a device; Triton's run in tests/triton and tests/gpu.
AVAILABLE = [c.name for c in CANDIDATES if c.name in DEVICE or (c.name != "triton" and not registry.absent(c.name))]
NATIVE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"cpu": NATIVE, "cuda": NATIVE, "reference": (torch.float32, torch.float64)}


def listed(names):
    return [pytest.param(name, marks=[pytest.mark.gpu] if name in DEVICE else []) for name in names]


backends = pytest.mark.parametrize("backend", listed(AVAILABLE))
backends_and_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            backend,
            dtype,
            id=f"{backend}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.gpu] if backend in DEVICE else [],
        )
        for backend in AVAILABLE
        for dtype in DTYPES.get(backend, (torch.float32,))
    ],
)
REAL = [case for case in testing.BINARY_CASES if not case.problem.planes]


@backends_and_dtypes
@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_words(backend, dtype, case):
    case = case.at(dtype=dtype, device=DEVICE.get(backend, "cpu"))
    testing.check_pack(case, functools.partial(bitpack, backend=backend))


@pytest.mark.parametrize("backend", listed(name for name in AVAILABLE if name != "reference"))
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_every_number_of_channels(backend, channels_last):
    for channels in range(1, 131):
        case = testing.binary_case("odd_sizes").at(C=channels, H=3, W=19, N=1, channels_last=channels_last)
        case = case.at(device=DEVICE.get(backend, "cpu"))
        testing.check_pack(case, functools.partial(bitpack, backend=backend), seed=channels)


@backends_and_dtypes
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_come_back(backend, dtype, bits):
    codes = torch.randint(2**bits, (2, 70, 5, 6), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(DEVICE.get(backend, "cpu"))
    for kind in (dtype, torch.int32, torch.uint8):
        if kind is torch.uint8 and backend != "reference":
            continue
        packed = bitpack(codes.to(kind), bits=bits, unsigned=True, backend=backend)
        assert (packed.planes, packed.encoding) == (bits, "unsigned")
        assert torch.equal(unpack(packed, torch.int64), codes)


@backends
def test_sums_are_packed_by_integer_thresholds(backend):
    generator = torch.Generator().manual_seed(5)
    sums = torch.randint(-9, 10, (2, 77, 4, 5), generator=generator, dtype=torch.int32)
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    value = torch.randint(-9, 10, (77,), generator=generator, dtype=torch.int32)
    value[:4] = torch.tensor([least, most, least, most])
    flip = torch.randint(2, (77,), generator=generator).bool()
    flip[:4] = torch.tensor([False, False, True, True])
    device = DEVICE.get(backend, "cpu")
    sums, threshold = sums.to(device), Threshold(value.to(device), flip.to(device))
    for layout in (torch.contiguous_format, torch.channels_last):
        packed = bitpack(sums.contiguous(memory_format=layout), threshold=threshold, backend=backend)
        assert torch.equal(unpack(packed) > 0, threshold.bits(sums))
        assert torch.equal(unpack(bitpack(sums, backend=backend)) > 0, sums >= 0)


def test_unpack_has_the_dtype_and_the_layout_asked_for():
    packed = bitpack(torch.randn(2, 40, 3, 5))
    values = unpack(packed, torch.float16, torch.channels_last)
    assert values.dtype == torch.float16
    assert values.is_contiguous(memory_format=torch.channels_last)


@backends
def test_no_pixels(backend):
    for shape in ((0, 5, 3, 4), (2, 5, 0, 4)):
        assert bitpack(torch.zeros(shape, device=DEVICE.get(backend, "cpu")), backend=backend).shape == shape


def test_there_is_no_gradient():
    assert not bitpack(torch.randn(1, 3, 2, 2, requires_grad=True)).words.requires_grad


X = torch.zeros(2, 5, 3, 4)
T = Threshold(torch.zeros(5), torch.zeros(5, dtype=torch.bool))
REFUSED = {
    "no tensor": (lambda: bitpack([1]), TypeError, r"input must be a Tensor \[N, C, H, W\], got list"),
    "rank": (lambda: bitpack(X[0]), ValueError, r"input must be \[N, C, H, W\], got shape \[5, 3, 4\]"),
    "dtype": (lambda: bitpack(X.long()), TypeError, r"input must be float32, .* got torch.int64"),
    "no channel": (lambda: bitpack(X[:, :0]), ValueError, r"with at least one channel, got \[2, 0, 3, 4\]"),
    "bits": (lambda: bitpack(X, bits=5), ValueError, r"bits must be 1 to 4, got 5"),
    "no int": (lambda: bitpack(X, bits=2.0), TypeError, r"bits must be an int, got 2.0"),
    "signed codes": (lambda: bitpack(X, bits=2, unsigned=False), ValueError, r"signs take bits=1, got 2; use unsigned"),
    "threshold of codes": (lambda: bitpack(X, bits=2, threshold=T), ValueError, r"threshold makes signs"),
    "threshold kind": (lambda: bitpack(X, threshold=X), TypeError, r"threshold must be a Threshold, got Tensor"),
    "threshold type": (lambda: bitpack(X.int(), threshold=T), TypeError, r"must be torch.int32 for integers, got"),
    "threshold size": (lambda: bitpack(X[:, :4], threshold=T), ValueError, r"threshold must be \[4\], .* got \[5\]"),
    "device": (lambda: bitpack(X.to("meta"), threshold=T), ValueError, r"on the device of input, meta, got cpu"),
    "backend": (lambda: bitpack(X, backend="tpu"), BackendUnavailable, r"backend 'tpu' cannot run"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=rf"(?s)^bitpack: .*{text}"):
        call()


def test_unpack_refuses_what_is_not_packed():
    with pytest.raises(TypeError, match=r"^unpack: packed must be a PackedTensor, got Tensor"):
        unpack(X)


def test_a_wish_counts():
    with use_backend("reference"):
        assert isinstance(bitpack(X), PackedTensor)


def test_the_examples_of_the_documentation_run():
    assert doctest.testmod(importlib.import_module("basisconv_kernels.ops.bitpack")).failed == 0
