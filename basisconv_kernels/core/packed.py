"""Packed bits: ``PackedTensor``, its format and its checks, and per-channel thresholds; see docs/packed_formats.md.

What every kernel with packed operands shares; it knows no op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

VERSION = 1
WORD_BITS = 32
BIT_ORDER = "lowest_first"
# What the planes of an encoding mean, and how many there may be.
ENCODINGS = {"sign": (1, 1), "unsigned": (1, 4)}

INT32 = torch.iinfo(torch.int32)


def words_for(channels: int) -> int:
    """Words that hold a bit of each channel, ``⌈channels / 32⌉``."""
    return (channels + WORD_BITS - 1) // WORD_BITS


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Maps [N, C, H, W], or filters [K, C, R, S], as bits: bit ``c mod 32`` of word ``c div 32`` is channel c.

    Attributes:
        words (Tensor[N, planes, H, W, ⌈C/32⌉]): int32, dense; the bits behind the last channel are zero.
        channels (int): C, the true number of channels.
        planes (int): bits a value.
        encoding (str): ``"sign"``: one plane, 1 is +1 and 0 is −1; ``"unsigned"``: plane b has the weight 2ᵇ.
        word_bits, bit_order, version: of the format; a value that this package does not read is refused.

    Raises:
        TypeError, ValueError: the parts do not describe one another; the message names both sides.
    """

    words: Tensor
    channels: int
    planes: int = 1
    encoding: str = "sign"
    word_bits: int = WORD_BITS
    bit_order: str = BIT_ORDER
    version: int = VERSION

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of_kernel(cls, words: Tensor, channels: int, planes: int = 1, encoding: str = "sign") -> PackedTensor:
        """What one of our kernels made, without the checks, which take longer than a small kernel."""
        made = object.__new__(cls)
        made.__dict__.update(
            words=words,
            channels=channels,
            planes=planes,
            encoding=encoding,
            word_bits=WORD_BITS,
            bit_order=BIT_ORDER,
            version=VERSION,
        )
        return made

    @property
    def format(self) -> tuple[int, int, str, int, str, int]:
        """Everything but the words."""
        return (self.channels, self.planes, self.encoding, self.word_bits, self.bit_order, self.version)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of what was packed."""
        N, _, H, W, _ = self.words.shape
        return (N, self.channels, H, W)

    @property
    def device(self) -> torch.device:
        """Where the words are."""
        return self.words.device

    def to(self, device: Any) -> PackedTensor:
        """The same bits on another device."""
        return replace(self, words=self.words.to(device))

    def check_padding(self) -> PackedTensor:
        """Refuse words with bits behind the last channel, which kernels would count; for words from elsewhere.

        Raises:
            ValueError: such a bit is set; the message says where.
        """
        used = self.channels % WORD_BITS
        if used and self.words.numel():
            behind = self.words[..., -1] >> used
            # An arithmetic shift repeats the topmost bit, which is a padding bit itself.
            if bool(behind.any()):
                n, plane, y, x = behind.nonzero()[0].tolist()
                raise ValueError(
                    f"PackedTensor: bits behind channel {self.channels - 1} must be zero, but the last word at "
                    f"[n={n}, plane={plane}, y={y}, x={x}] has some; pack again with bitpack"
                )
        return self


def check(packed: PackedTensor) -> None:
    """The checks of ``PackedTensor``: everything but the padding bits, without reading a word."""
    for name, found, known in (
        ("version", packed.version, VERSION),
        ("word_bits", packed.word_bits, WORD_BITS),
        ("bit_order", packed.bit_order, BIT_ORDER),
    ):
        if found != known:
            raise ValueError(
                f"PackedTensor: {name} must be {known!r}, which this version of the package reads, got {found!r}; "
                "pack again with bitpack"
            )
    if packed.encoding not in ENCODINGS:
        raise ValueError(f"PackedTensor: encoding must be {' or '.join(map(repr, ENCODINGS))}, got {packed.encoding!r}")
    least, most = ENCODINGS[packed.encoding]
    if not least <= packed.planes <= most:
        allowed = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"PackedTensor: encoding {packed.encoding!r} has {allowed} planes, got {packed.planes}")
    words = packed.words
    if not isinstance(words, Tensor):
        raise TypeError(f"PackedTensor: words must be a Tensor, got {type(words).__name__}")
    if words.dtype != torch.int32:
        raise TypeError(f"PackedTensor: words must be int32, got {words.dtype}")
    if packed.channels < 1:
        raise ValueError(f"PackedTensor: channels must be at least 1, got {packed.channels}")
    expected = [packed.planes, words_for(packed.channels)]
    if words.dim() != 5 or [words.shape[1], words.shape[4]] != expected:
        raise ValueError(
            f"PackedTensor: words must be [N, {expected[0]}, H, W, {expected[1]}] for {packed.planes} planes of "
            f"{packed.channels} channels, got {list(words.shape)}"
        )
    if not words.is_contiguous():
        raise ValueError("PackedTensor: words must be dense in the order of their dimensions; call .contiguous()")


def pack_planes(bits: Tensor) -> Tensor:
    """Bits [N, planes, C, H, W] (bool) → words [N, planes, H, W, ⌈C/32⌉]."""
    N, planes, C, H, W = bits.shape
    count = words_for(C)
    padded = bits.new_zeros(N, planes, H, W, count * WORD_BITS)
    padded[..., :C] = bits.permute(0, 1, 3, 4, 2)
    weights = torch.ones((), dtype=torch.int64, device=bits.device) << torch.arange(WORD_BITS, device=bits.device)
    sums = (padded.view(N, planes, H, W, count, WORD_BITS) * weights).sum(-1)
    topmost = 1 << (WORD_BITS - 1)
    return ((sums ^ topmost) - topmost).to(torch.int32)  # the same 32 bits, as two's complement


def unpack_planes(words: Tensor, channels: int) -> Tensor:
    """Words [N, planes, H, W, ⌈C/32⌉] → bits 0 and 1 [N, planes, C, H, W] (int32)."""
    places = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    bits = (words[..., None] >> places) & 1
    return bits.flatten(-2)[..., :channels].permute(0, 1, 4, 2, 3)


# --- thresholds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Threshold:
    """Which values of a channel become the bit 1: ``v >= value``, or ``v <= value`` where ``flip``; NaN gives 0.

    Attributes:
        value (Tensor[C]): int32 for integer sums; float32 for real values.
        flip (Tensor[C]): bool.

    Raises:
        TypeError, ValueError: the two do not fit.
    """

    value: Tensor
    flip: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("value", self.value), ("flip", self.flip)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"Threshold: {name} must be a Tensor [C], got {type(tensor).__name__}")
        if self.value.dtype not in (torch.int32, torch.float32):
            raise TypeError(f"Threshold: value must be int32 or float32, got {self.value.dtype}")
        if self.flip.dtype != torch.bool:
            raise TypeError(f"Threshold: flip must be bool, got {self.flip.dtype}")
        if self.value.dim() != 1 or self.value.shape != self.flip.shape:
            raise ValueError(
                f"Threshold: value and flip must both be [C], got {list(self.value.shape)} and {list(self.flip.shape)}"
            )
        if self.value.device != self.flip.device:
            raise ValueError(
                f"Threshold: value and flip must be on one device, got {self.value.device} and {self.flip.device}"
            )

    def to(self, device: Any) -> Threshold:
        """The same thresholds on another device."""
        return Threshold(self.value.to(device), self.flip.to(device))

    def bits(self, values: Tensor) -> Tensor:
        """The bits (bool) of ``values`` [N, C, H, W]."""
        value, flip = self.value[:, None, None], self.flip[:, None, None]
        return torch.where(flip, values <= value, values >= value)

    @staticmethod
    @torch.no_grad()
    def fold(
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        *,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.int32,
    ) -> Threshold:
        """The sign of a BatchNorm in eval mode, as one comparison a channel.

        ``bit = (scale·v + bias − running_mean) / sqrt(running_var + eps)·norm_weight + norm_bias >= 0``

        The formula, in float64 and in this order, never turns back as v grows: every step is monotone, rounding
        included. So the first v with the other bit is found by halving the range of v, and the threshold agrees with
        the formula for every v. No rule for signs is needed: where norm_weight·scale is negative the bit turns from 1
        to 0 and ``flip`` is set; where it is zero the bit is constant.

        Args:
            norm_weight, norm_bias (Tensor[C] or None): γ and β; None is 1 and 0.
            running_mean, running_var (Tensor[C]): of the BatchNorm.
            eps (float): of the BatchNorm.
            scale, bias (Tensor[C], optional): of the layer before; None is 1 and 0.
            dtype: int32 for the integer sums of a binary layer, float32 for real values.
        """
        mean = running_mean.double()

        def wide(value: Tensor | None, default: float) -> Tensor:
            return torch.full_like(mean, default) if value is None else value.double()

        gamma, beta = wide(norm_weight, 1.0), wide(norm_bias, 0.0)
        alpha, shift = wide(scale, 1.0), wide(bias, 0.0)
        deviation = (running_var.double() + eps).sqrt()

        def positive(v: Tensor) -> Tensor:
            return (alpha * v.double() + shift - mean) / deviation * gamma + beta >= 0

        return Threshold.of(positive, mean.shape[0], mean.device, dtype)

    @staticmethod
    def of(
        positive: Callable[[Tensor], Tensor],
        channels: int,
        device: torch.device,
        dtype: torch.dtype = torch.int32,
        *,
        most: int = INT32.max,
    ) -> Threshold:
        """The threshold of any function of a channel's number that changes at most once as the number grows.

        Args:
            positive: numbers [C], one a channel, → the bits (bool [C]); called some forty times.
            channels, device: C, and where.
            dtype: int32 for numbers that are sums, float32 for real ones.
            most (int): largest magnitude of the sums; between −most and most the threshold agrees with ``positive``.
        """
        return _first_change(positive, channels, device, dtype, most)


def check_threshold(op: str, threshold: Any, channels: int, device: torch.device, *, integers: bool) -> None:
    """Refuse what are not thresholds of ``channels`` channels for such values on such a device."""
    if not isinstance(threshold, Threshold):
        raise TypeError(f"{op}: threshold must be a Threshold, got {type(threshold).__name__}; see Threshold.fold")
    expected = torch.int32 if integers else torch.float32
    if threshold.value.dtype != expected:
        kind = "integers" if integers else "real values"
        raise TypeError(
            f"{op}: threshold.value must be {expected} for {kind}, got {threshold.value.dtype}; fold with that dtype"
        )
    if threshold.value.shape[0] != channels:
        raise ValueError(f"{op}: threshold must be [{channels}], one a channel, got {list(threshold.value.shape)}")
    if threshold.value.device != device:
        raise ValueError(f"{op}: threshold must be on the device of input, {device}, got {threshold.value.device}")


def _float_at(place: Tensor) -> Tensor:
    """The float32 numbers in their order: 0 is +0, 1 the smallest above it, −1 the largest below −0."""
    positive = place.clamp(min=0).to(torch.int32).view(torch.float32)
    return torch.where(place >= 0, positive, -((-place).clamp(min=0).to(torch.int32).view(torch.float32)))


def _first_change(
    positive: Callable[[Tensor], Tensor], channels: int, device: torch.device, dtype: torch.dtype, most: int
) -> Threshold:
    """The threshold of a monotone predicate; places are integers themselves, or float32 numbers in their order."""
    if dtype not in (torch.int32, torch.float32):
        raise TypeError(f"Threshold.fold: dtype must be int32 or float32, got {dtype}")
    largest = 0x7F7FFFFF  # the place of the largest finite float32
    most = most if dtype == torch.int32 else largest
    number = (lambda place: place) if dtype == torch.int32 else _float_at
    low = torch.full((channels,), -most, dtype=torch.int64, device=device)
    high = torch.full_like(low, most)
    at_low, at_high = positive(number(low)), positive(number(high))
    same = at_low == at_high
    first, last = low.clone(), high.clone()  # with the bit of the lowest number, and with that of the highest
    for _ in range(34):
        middle = torch.div(first + last, 2, rounding_mode="floor")
        turned = positive(number(middle)) == at_high
        first, last = torch.where(turned, first, middle), torch.where(turned, middle, last)
    flip = at_low & ~at_high
    value = torch.where(flip, first, last)
    # Constant bits: all is at least the lowest number; no sum is at most INT32.min, and nothing is at least NaN.
    flip = torch.where(same, ~at_low if dtype == torch.int32 else torch.zeros_like(flip), flip)
    if dtype == torch.int32:
        value = torch.where(same, torch.full_like(value, INT32.min), value)
        return Threshold(value.to(torch.int32), flip)
    real = number(value)
    constant = torch.where(at_low, -torch.inf, torch.nan).to(real.dtype)
    return Threshold(torch.where(same, constant, real), flip)
