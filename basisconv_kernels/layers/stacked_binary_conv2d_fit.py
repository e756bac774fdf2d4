"""From dense filters to a shared bank of ±1 filters: the alternating fit, and bits as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from basisconv_kernels.core.estimators import signs


@dataclass(frozen=True, eq=False)
class StackedFit:
    """``W[k] ≈ scale[k] · concat_i bank[index[k, i]]``.

    Attributes:
        bank (Tensor[n, cs, R, S]): ±1.
        index (Tensor[K, splits]): int64.
        scale (Tensor[K]): least squares.
        affinity (Tensor[K, splits, n]): ``sign(scale[k])·<W[k, i], bank[j]>`` as a cosine, −1..1; ``index`` is where it
            is largest.
        direction (Tensor[n, cs, R, S]): what each bank filter is the sign of, largest magnitude 1.
        errors: ``‖W − Ŵ‖²`` after every round; never rises.
    """

    bank: Tensor
    index: Tensor
    scale: Tensor
    affinity: Tensor
    direction: Tensor
    errors: tuple[float, ...]

    def relative_error(self, weight: Tensor) -> float:
        """‖W − Ŵ‖ / ‖W‖, Frobenius; 0 for a layer of zeros."""
        total = weight.double().square().sum().item()
        return (self.errors[-1] / total) ** 0.5 if total > 0 else 0.0


@torch.no_grad()
def fit_stacked(weight: Tensor, bank: int, splits: int, *, rounds: int = 50, seed: int = 0) -> StackedFit:
    """Alternate between the three parts; each step lowers ``‖W − Ŵ‖²`` or leaves it.

    ::

        index[k, i] = argmax_j scale[k]·<W[k, i], B[j]>                     (ties: the lowest)
        B[j] = sign(Σ_{index[k, i] = j} scale[k]·W[k, i])
        scale[k] = <W[k], concat_i B[index[k, i]]> / D                      every ±1 filter has the norm √D

    A filter that nobody selects changes nothing, so it is put where the fit is worst. The bank starts as the signs of
    parts of W drawn at random, without repetition; with as many filters as parts the fit is ``sign(W)`` itself.

    Args:
        weight (Tensor[K, C/G, R, S]): finite.
        bank (int): n.
        splits (int): divides C/G.
        rounds (int): most; it ends when the index stays.
        seed (int): of the start; the same on every device.

    Source: the alternation is derived from least squares; the model, Lan, Lan 2021, arXiv 2010.02778.
    """
    K, channels, R, S = weight.shape
    low = channels // splits
    parts = weight.detach().double().reshape(K, splits, low * R * S)
    flat = parts.reshape(K * splits, -1)
    order = torch.randperm(K * splits, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    if bank >= K * splits:
        order = torch.arange(K * splits, device=weight.device)
    start = flat[order[:bank]]
    extra = flat[order[torch.arange(bank - len(start), device=weight.device) % len(order)]]
    direction = torch.cat([start, extra]) if bank > len(start) else start
    filters = signs(direction).double()
    scale = parts.abs().mean((1, 2))
    index = torch.full((K, splits), -1, dtype=torch.int64, device=weight.device)
    errors: list[float] = []
    for _ in range(max(1, rounds)):
        previous = index
        index, affinity = _select(parts, filters, scale)
        scale = _scales(parts, filters, index)
        errors.append(_error(parts, filters, index, scale))
        if torch.equal(index, previous):
            break
        filters, direction = _vote(parts, filters, direction, index, scale)
    # The bank moved last: a final selection, and the scales that belong to it.
    index, affinity = _select(parts, filters, scale)
    scale = _scales(parts, filters, index)
    errors.append(_error(parts, filters, index, scale))
    size = direction.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    shape = (bank, low, R, S)
    return StackedFit(
        filters.to(weight.dtype).reshape(shape), index, scale.to(weight.dtype), affinity.to(weight.dtype),
        (direction / size).to(weight.dtype).reshape(shape), tuple(errors),
    )  # fmt: skip


def _select(parts: Tensor, filters: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(index, affinity): the filter with the largest ``sign(scale[k])·<W[k, i], B[j]>`` of each part."""
    sign = torch.where(scale >= 0, 1.0, -1.0).to(parts.dtype)
    length = parts.norm(dim=2, keepdim=True) * parts.shape[2] ** 0.5
    affinity = sign[:, None, None] * (parts @ filters.T) / length.clamp(min=torch.finfo(parts.dtype).tiny)
    return affinity.argmax(2), affinity


def _scales(parts: Tensor, filters: Tensor, index: Tensor) -> Tensor:
    return (parts * filters[index]).sum((1, 2)) / (parts.shape[1] * parts.shape[2])


def _error(parts: Tensor, filters: Tensor, index: Tensor, scale: Tensor) -> float:
    return (parts - scale[:, None, None] * filters[index]).square().sum().item()


def _vote(parts: Tensor, filters: Tensor, direction: Tensor, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(filters, direction): every filter the sign of what selects it; idle ones go to the parts that fit worst."""
    one_hot = torch.nn.functional.one_hot(index.reshape(-1), len(filters)).to(parts.dtype)
    weighted = (scale[:, None, None] * parts).reshape(len(one_hot), -1)
    sums = one_hot.T @ weighted
    used = one_hot.sum(0) > 0
    idle = (~used).nonzero()[:, 0]
    misfit = (parts - scale[:, None, None] * filters[index]).square().sum(2).reshape(-1)
    worst = misfit.argsort(descending=True, stable=True)[: len(idle)]
    taken = idle[: len(worst)]
    sums[taken] = weighted[worst]
    # A sum of exactly zero leaves the sign open: the old one stays, so that the error cannot rise.
    kept = torch.where(sums == 0, filters, signs(sums).to(filters.dtype))
    moved = used.clone()
    moved[taken] = True
    kept = torch.where(moved[:, None], kept, filters)
    return kept, torch.where(moved[:, None] & (sums != 0), sums, direction.abs() * kept)


# --- bits as they are stored ------------------------------------------------------------------------------------------


def index_bits(n: int) -> int:
    """Bits of one index: ⌈log2 n⌉, none for a bank of one filter."""
    return (n - 1).bit_length()


def stored_bytes(n: int, low: int, R: int, S: int, K: int, splits: int) -> int:
    """Bytes of bank and index: ``⌈n·cs·R·S / 8⌉ + ⌈K·splits·⌈log2 n⌉ / 8⌉``."""
    return -(-n * low * R * S // 8) + -(-K * splits * index_bits(n) // 8)


def to_bytes(bits: Tensor) -> Tensor:
    """Bits (bool, any shape) in their order → bytes (uint8), the first bit lowest; the last byte is filled with 0."""
    flat = bits.reshape(-1)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[: flat.numel()] = flat.to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.int32).to(torch.uint8)


def from_bytes(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits (bool) of bytes.

    No tensor is made of nothing here, as ``arange`` makes one: Inductor, freezing weights, folds what follows from them
    alone, and would decode in every call.
    """
    return torch.stack([packed >> place & 1 for place in range(8)], 1).reshape(-1)[:count].bool()


def pack_bank(bank: Tensor) -> Tensor:
    """±1 values [n, cs, R, S] → bytes, a 1 for +1."""
    return to_bytes(bank > 0)


def unpack_bank(packed: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Bytes → ±1 values of a shape."""
    count = shape[0] * shape[1] * shape[2] * shape[3]
    return (from_bytes(packed, count).to(dtype) * 2 - 1).reshape(shape)


def pack_index(index: Tensor, n: int) -> Tensor:
    """Numbers [K, splits] below n → bytes, ⌈log2 n⌉ bits each, the lowest first."""
    places = torch.arange(index_bits(n), device=index.device)
    return to_bytes((index[..., None] >> places) & 1 == 1)


def unpack_index(packed: Tensor, shape: tuple[int, int], n: int) -> Tensor:
    """Bytes → numbers [K, splits] (int64)."""
    width = index_bits(n)
    bits = from_bytes(packed, shape[0] * shape[1] * width).view(*shape, width).to(torch.int64)
    if width == 0:  # of a bank of one filter
        return packed.new_zeros(shape, dtype=torch.int64)
    return torch.stack([bits[..., place] << place for place in range(width)]).sum(0)
