"""``bitpack`` and ``unpack`` of the reference against the text of the format, number by number."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels.reference import bitpack as reference
from basisconv_kernels.testing import naive_binary_conv2d as naive

SPECIAL = [0.0, -0.0, 1e-30, -1e-30, torch.inf, -torch.inf, torch.nan, -torch.nan, 3.0, -3.0]
ARE_PLUS = [True, True, True, False, True, False, False, False, True, False]


def test_special_numbers():
    x = torch.tensor(SPECIAL).reshape(1, -1, 1, 1)
    (word,) = reference.forward(x, None, 1, "sign").flatten().tolist()
    assert [bool(word >> c & 1) for c in range(len(SPECIAL))] == ARE_PLUS


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_codes_are_rounded_and_clipped(planes):
    most = 2**planes - 1
    x = [-1.0, -0.4, 0.5, 0.51, 1.5, 2.5, most - 0.5, most + 0.4, 1e30, torch.inf, -torch.inf, torch.nan]
    expected = [0 if v != v else min(max(round(min(max(v, -9), 99)), 0), most) for v in x]
    words = reference.forward(torch.tensor(x).reshape(1, -1, 1, 1), None, planes, "unsigned")
    assert reference.unpack(words, len(x), "unsigned").flatten().tolist() == expected


@pytest.mark.parametrize("channels", [*range(1, 131, 9), 32, 64, 96, 128, 130])
def test_packing_follows_the_text_and_unpacking_undoes_it(channels):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 3, 2, generator=generator)
    words = reference.forward(x, None, 1, "sign")
    assert (words.long() & 0xFFFFFFFF).tolist() == naive.words((x >= 0)[:, None])
    assert torch.equal(reference.unpack(words, channels, "sign"), torch.where(x >= 0, 1, -1).int())
    codes = torch.randint(8, x.shape, generator=generator, dtype=torch.int32)
    words = reference.forward(codes, None, 3, "unsigned")
    bits = torch.stack([codes >> plane & 1 for plane in range(3)], 1)
    assert (words.long() & 0xFFFFFFFF).tolist() == naive.words(bits)
    assert torch.equal(reference.unpack(words, channels, "unsigned"), codes)
