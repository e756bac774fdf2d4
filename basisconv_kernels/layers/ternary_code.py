"""Ternary weights as bytes, for files: gap coding where most weights are 0, a mask and signs elsewhere.

Both take the N weights in row-major order. With density d, the share that is not 0:

``planes``: N mask bits, 1 where the weight is not 0, then a sign bit for each of these, 1 for −1: ``N(1 + d)`` bits.

``gaps``: for each weight that is not 0 the number of zeros since the one before, in 4 bits; 15 is an escape that stands
for 15 zeros and no weight, so a longer gap takes several. Then the sign bits. ``Nd(5 + 4e)`` bits are to be expected,
``e = (1−d)¹⁵ / (1 − (1−d)¹⁵)`` escapes a weight. Zeros behind the last weight are not written.

Each part is filled up to a whole byte, bits with zeros, gaps with one escape, behind which no weight follows. The first
of two 4-bit numbers, and of eight bits, is the lowest. Gaps are the smaller form below a density of about 0.246.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("gaps", "planes")
ESCAPE = 15  # a gap of 15 zeros without a weight behind it
SCALE_BITS = 32  # of one scale


@dataclass(frozen=True)
class Encoded:
    """Ternary weights as bytes.

    Attributes:
        kind: ``"gaps"`` or ``"planes"``.
        weights: N.
        nonzero: how many of them are not 0.
        data (Tensor[bytes], uint8): as the module's docstring tells.
    """

    kind: str
    weights: int
    nonzero: int
    data: Tensor

    @property
    def bits(self) -> int:
        """Of ``data``, the filling included."""
        return 8 * self.data.numel()


def encode(weight: Tensor) -> Encoded:
    """The smaller of the two forms; gaps where both are of one size.

    Args:
        weight (Tensor): −1, 0 and +1 in any shape and dtype.
    """
    return min((encode_as(kind, weight) for kind in KINDS), key=lambda e: e.bits)


def encode_as(kind: str, weight: Tensor) -> Encoded:
    """One of the two forms.

    Raises:
        ValueError: another kind, or a weight that is none of −1, 0, +1.
    """
    if kind not in KINDS:
        raise ValueError(f"encode_as: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    flat = weight.detach().to("cpu").reshape(-1)
    if not bool(((flat == 0) | (flat.abs() == 1)).all()):
        raise ValueError("encode_as: weight must hold -1, 0 and +1 only")
    places = flat.nonzero()[:, 0]
    signs = _bits_to_bytes(flat[places] < 0)
    first = _bits_to_bytes(flat != 0) if kind == "planes" else _numbers_to_bytes(_gaps(places))
    return Encoded(kind, flat.numel(), places.numel(), torch.cat([first, signs]))


def decode(encoded: Encoded) -> Tensor:
    """The weights [N] (int8).

    Raises:
        ValueError: the bytes are not what ``encode_as`` writes for these numbers of weights; says what is wrong.
    """
    kind, weights, nonzero, data = encoded.kind, encoded.weights, encoded.nonzero, encoded.data
    if kind not in KINDS:
        raise ValueError(f"decode: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if data.dtype != torch.uint8 or data.dim() != 1 or not 0 <= nonzero <= weights:
        raise ValueError(
            f"decode: expected uint8 [bytes] with 0..{weights} weights that are not 0, got {data.dtype} "
            f"{list(data.shape)} with {nonzero}"
        )
    data = data.detach().to("cpu")
    sign_bytes = _bytes_for(nonzero)
    if data.numel() < sign_bytes:
        raise ValueError(f"decode: {data.numel()} bytes cannot hold {nonzero} signs")
    first, signs = data[: data.numel() - sign_bytes], data[data.numel() - sign_bytes :]
    places = _places_of_mask(first, weights) if kind == "planes" else _places_of_gaps(first)
    if places.numel() != nonzero:
        raise ValueError(f"decode: {places.numel()} weights that are not 0 where {nonzero} are stated")
    if nonzero and int(places[-1]) >= weights:
        raise ValueError(f"decode: a weight lies at {int(places[-1])}, there are {weights}")
    negative = _bytes_to_bits(signs)
    if bool(negative[nonzero:].any()):
        raise ValueError("decode: the filling behind the signs is not zero")
    out = torch.zeros(weights, dtype=torch.int8)
    out[places] = 1 - 2 * negative[:nonzero].to(torch.int8)
    return out


def expected_bits(kind: str, weights: int, density: float) -> float:
    """Bits to be expected of so many independent weights, without the filling to whole bytes."""
    if kind == "planes":
        return weights * (1 + density)
    if density == 0:
        return 0.0
    none = (1 - density) ** ESCAPE
    return weights * density * (5 + 4 * none / (1 - none))


# --- gaps -------------------------------------------------------------------------------------------------------------


def _gaps(places: Tensor) -> Tensor:
    """The numbers 0..15 for weights at ascending places: each gap as its escapes, then the rest below 15."""
    zeros = places - F.pad(places + 1, (1, -1)) if places.numel() else places
    escapes = zeros // ESCAPE
    ends = (escapes + 1).cumsum(0) - 1  # where the number that closes each gap stands
    numbers = torch.full((int(ends[-1]) + 1 if ends.numel() else 0,), ESCAPE, dtype=torch.uint8)
    numbers[ends] = (zeros % ESCAPE).to(torch.uint8)
    return numbers


def _places_of_gaps(data: Tensor) -> Tensor:
    """Undo ``_gaps``."""
    numbers = torch.stack([data & 15, data >> 4], dim=1).reshape(-1).long()
    closes = numbers != ESCAPE
    if numbers.numel() and not bool(closes[-2:].any()):
        raise ValueError("decode: the gaps end with escapes")
    # A weight takes a place of its own, an escape fifteen.
    return ((numbers + closes).cumsum(0) - 1)[closes]


def _places_of_mask(data: Tensor, weights: int) -> Tensor:
    if data.numel() != _bytes_for(weights):
        raise ValueError(f"decode: a mask of {weights} weights has {_bytes_for(weights)} bytes, got {data.numel()}")
    mask = _bytes_to_bits(data)
    if bool(mask[weights:].any()):
        raise ValueError("decode: the filling behind the mask is not zero")
    return mask.nonzero()[:, 0]


# --- bits and bytes ---------------------------------------------------------------------------------------------------


def _bytes_for(bits: int) -> int:
    return (bits + 7) // 8


def _bits_to_bytes(bits: Tensor) -> Tensor:
    padded = F.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _bytes_to_bits(data: Tensor) -> Tensor:
    return ((data[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)


def _numbers_to_bytes(numbers: Tensor) -> Tensor:
    pairs = F.pad(numbers, (0, -numbers.numel() % 2), value=ESCAPE).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
