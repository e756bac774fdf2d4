"""The memory format of the result: one rule for the native op, the reference, the fake and compiled graphs.

The rule is PyTorch's own. ``tensor.to(memory_format=...)`` returns the tensor itself exactly where PyTorch takes it to
be in that format already, which is the oracle here.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from basisconv_kernels import BasisConv2d, basis_conv2d
from basisconv_kernels.core import registry
from basisconv_kernels.ops.basis_conv2d import CANDIDATES
from basisconv_kernels.reference.basis_conv2d import laid_out, memory_format

LAST = torch.channels_last
AVAILABLE = [candidate.name for candidate in CANDIDATES if registry.absent(candidate.name) is None]
backends = pytest.mark.parametrize("backend", AVAILABLE)


def last(*shape: int) -> torch.Tensor:
    return torch.empty(shape, memory_format=LAST).copy_(torch.randn(shape))


def nchw(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


# name → (input, whether its strides say channels_last)
INPUTS = {
    "nchw": (nchw(2, 4, 5, 6), False),
    "channels_last": (last(2, 4, 5, 6), True),
    "one channel": (nchw(2, 1, 5, 6), False),
    "one channel, channels_last": (last(2, 1, 5, 6), True),
    "one image of one channel, channels_last": (last(1, 1, 5, 6), True),
    "one row of one channel, channels_last": (last(2, 1, 1, 6), True),
    "one pixel": (nchw(2, 4, 1, 1), False),
    "one pixel, channels_last": (last(2, 4, 1, 1), True),
    "one number an image": (last(2, 1, 1, 1), False),
    "one number": (last(1, 1, 1, 1), False),
    "a channel of several, channels_last": (last(2, 4, 5, 6)[:, :1], True),
    "a channel of several": (nchw(2, 4, 5, 6)[:, :1], False),
    "every second channel, channels_last": (last(2, 4, 5, 6)[:, ::2], True),
    "every second pixel, channels_last": (last(2, 4, 8, 9)[:, :, ::2, ::2], True),
    "rows and columns swapped, channels_last": (last(2, 4, 6, 5).transpose(2, 3), False),
    "one image repeated, channels_last": (last(1, 4, 5, 6).expand(3, 4, 5, 6), False),
    "one channel repeated": (last(2, 1, 5, 6).expand(2, 4, 5, 6), False),
    "no image, channels_last": (last(0, 4, 5, 6), False),
}
layouts = pytest.mark.parametrize(("input", "is_last"), INPUTS.values(), ids=INPUTS)
# K = 1 and K > 1; a map as large as the input, and one of a single pixel.
results = pytest.mark.parametrize("K", [1, 7], ids=lambda K: f"K={K}")


def weights(input: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, input.shape[1], 3, 3, generator=generator), torch.randn(K, 3, generator=generator)


def takes_for_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch takes a tensor to be in channels_last already."""
    return tensor.to(memory_format=LAST) is tensor


@layouts
def test_the_format_of_an_input(input, is_last):
    assert (memory_format(input) == LAST) == is_last
    assert takes_for_channels_last(input) == is_last


@given(
    size=st.tuples(*[st.integers(0, 3)] * 4),
    stride=st.tuples(*[st.sampled_from([0, 1, 2, 3, 4, 6, 9, 12, 18, 27])] * 4),
)
def test_the_format_is_that_of_pytorch_for_any_strides(size, stride):
    tensor = torch.zeros(300).as_strided(size, stride)
    assert (memory_format(tensor) == LAST) == takes_for_channels_last(tensor)


@layouts
def test_laid_out_gives_the_strides_of_a_new_tensor(input, is_last):
    for layout in (LAST, torch.contiguous_format):
        moved = laid_out(input, layout)
        assert torch.equal(moved, input)
        if input.shape[0] > 1:  # of one image, or none, the stride of the batch means nothing
            assert moved.stride() == torch.empty(input.shape, memory_format=layout).stride()
        if memory_format(moved) == layout:  # strides of one number an image state no format
            assert laid_out(moved, layout) is moved


@results
@layouts
@backends
def test_eager_fake_and_meta_agree(backend, input, is_last, K):
    basis, mixing = weights(input, K)
    out = basis_conv2d(input, basis, mixing, padding=1, backend=backend)
    expected = torch.empty(out.shape, memory_format=LAST if is_last else torch.contiguous_format)
    assert out.stride() == expected.stride()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (input, basis, mixing)]
        assert basis_conv2d(*fakes, padding=1, backend=backend).stride() == expected.stride()
    if backend == "reference":
        metas = [tensor.to("meta") for tensor in (basis, mixing)]
        meta = torch.empty_strided(input.shape, input.stride(), device="meta")
        assert basis_conv2d(meta, *metas, padding=1).stride() == expected.stride()


@results
@layouts
@backends
def test_the_maps_kept_for_training_change_nothing(backend, input, is_last, K):
    basis, mixing = weights(input, K)
    kept = basis_conv2d(input, basis, mixing.requires_grad_(), padding=1, backend=backend)
    with torch.no_grad():
        assert kept.stride() == basis_conv2d(input, basis, mixing, padding=1, backend=backend).stride()


# A compiler sees strides through the fake, which agrees above on all layouts; compiling takes seconds: only some here.
COMPILED = ("nchw", "channels_last", "one channel, channels_last", "every second channel, channels_last", "one number")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("input", "is_last"),
    [pytest.param(*INPUTS[name], id=name, marks=[] if name in COMPILED else pytest.mark.full) for name in INPUTS],
)
@backends
def test_compiled_graphs_agree(backend, input, is_last, compiler):
    for K in (1, 7):
        basis, mixing = weights(input, K)

        def call(input, basis=basis, mixing=mixing):
            return basis_conv2d(input, basis, mixing, padding=1, backend=backend)

        compiled = torch.compile(call, backend=compiler, fullgraph=True)
        with torch.no_grad():
            assert compiled(input).stride() == call(input).stride()


@backends
def test_a_first_layer_on_grey_images_keeps_channels_last(backend):
    layers = [BasisConv2d(c, k, 3, q, padding=1, backend=backend) for c, k, q in ((1, 8, 3), (8, 1, 4), (1, 6, 2))]
    network = torch.nn.Sequential(*layers).to(memory_format=LAST)
    grey = last(2, 1, 9, 7)
    for _ in range(2):
        out = grey
        for layer in network:
            out = layer(out)
            assert memory_format(out) == LAST
            assert out.is_contiguous(memory_format=LAST)
        network.eval().requires_grad_(False)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_explicit_padding_keeps_the_format_of_grey_images(mode):
    layer = BasisConv2d(1, 4, 3, 2, padding=1, padding_mode=mode)
    assert memory_format(layer(last(2, 1, 9, 7))) == LAST
    assert memory_format(layer(nchw(2, 1, 9, 7))) == torch.contiguous_format
