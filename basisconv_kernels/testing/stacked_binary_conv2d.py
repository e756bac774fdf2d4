"""Cases and checks of ``stacked_binary_conv2d``: real activations within tolerance, integers bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor, pack_planes
from basisconv_kernels.reference import stacked_binary_conv2d as reference
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.compare import Mismatch, full_float32
from basisconv_kernels.testing.inputs import GUARD, _place, _strides, bits, poisoned_allocations


@dataclass(frozen=True)
class StackedCase:
    """One problem, the way in which its input lies in memory (as for ``Case``), and why it is there."""

    name: str
    reason: str
    problem: StackedBinaryConv2dProblem
    view: str = "dense"

    def at(self, **changes: Any) -> StackedCase:
        """The same case with some fields of its problem changed."""
        return replace(self, problem=replace(self.problem, **changes))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the op that are no tensors."""
        p = self.problem
        return {
            "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups,
            "binarize_input": p.mode == "signs", "activation": p.activation,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name} [{self.problem}]" + ("" if self.view == "dense" else f" {self.view}")


def _case(name: str, reason: str, sizes: str, *, view: str = "dense", **flags: Any) -> StackedCase:
    """``sizes`` reads ``N C H W n splits K R S``."""
    N, c, h, w, n, splits, k, r, s = map(int, sizes.split())
    problem = StackedBinaryConv2dProblem(N=N, C=c, H=h, W=w, n=n, splits=splits, K=k, R=r, S=s, **flags)
    return StackedCase(name, reason, problem, view)


_ONE = (1, 1, 1, 1)
_BOTH: dict[str, Any] = {"scale": True, "bias": True}

STACKED_CASES: tuple[StackedCase, ...] = (
    #                                                                          N  C  H  W  n s  K R S
    _case("odd_sizes", "no size is a multiple of a vector or a table", "2 14 9 11 5 2 13 3 3", padding=_ONE, **_BOTH),
    _case("full_vectors", "whole registers, words and tables", "1 64 6 24 16 2 48 3 3", padding=_ONE, **_BOTH),
    _case("past_a_block", "more bank filters than a register block, several words", "1 74 5 9 37 2 83 3 3",
          padding=_ONE, **_BOTH),
    _case("four_splits", "four maps an output", "2 36 6 7 9 4 26 3 3", padding=_ONE),
    _case("one_channel_a_split", "the lowest dimension of all: 3×3 atoms", "1 10 6 8 7 10 12 3 3", padding=_ONE),
    _case("one_filter", "n = 1: nothing to choose", "2 12 6 7 1 3 9 3 3", padding=_ONE, scale=True),
    _case("one_output", "K = 1", "2 12 7 6 4 2 1 3 3", padding=_ONE),
    _case("more_than_outputs", "n > K: the stacked filters are fewer than the bank", "2 12 6 7 40 2 11 3 3",
          padding=_ONE, **_BOTH),
    _case("one_split", "one split, shuffled index, outputs that repeat", "1 11 7 9 6 1 17 3 3", padding=_ONE),
    _case("empty_batch", "N = 0: nothing may be launched, the shape must be right", "0 8 7 9 3 2 5 3 3", **_BOTH),
    _case("pointwise", "1×1: no halo", "2 20 5 8 6 2 14 1 1"),
    _case("even_kernel", "an even kernel has no middle", "2 6 9 8 5 2 7 2 4", padding=(1, 0, 1, 2)),
    _case("flat_kernel", "R and S far apart", "2 8 6 13 5 2 9 1 7", padding=(0, 0, 3, 3)),
    _case("stride", "different strides, an input row left over", "2 12 11 14 5 2 8 3 3", stride=(2, 3), padding=_ONE),
    _case("stride_past_kernel", "pixels that no tap reads", "2 6 13 21 4 2 7 2 3", stride=(4, 5)),
    _case("dilation", "different dilations", "2 8 12 15 6 2 7 3 3", dilation=(2, 3), padding=(2, 2, 3, 3)),
    _case("stride_and_dilation", "both at once", "1 10 13 17 6 2 8 3 2", stride=(2, 2), dilation=(3, 2), padding=_ONE),
    _case("asymmetric_padding", "four different paddings", "2 8 8 10 6 2 9 3 3", padding=(0, 3, 2, 1)),
    _case("padding_past_kernel", "output pixels that see no input at all", "2 6 5 4 6 2 7 3 2", padding=(4, 3, 2, 6),
          bias=True),
    _case("map_below_kernel", "a map smaller than the kernel", "3 8 2 3 6 2 7 5 5", padding=(2, 2, 2, 3)),
    _case("one_pixel", "a 1×1 output", "2 12 3 5 4 2 9 3 5"),
    _case("groups", "splits inside the groups, one bank", "2 24 8 9 7 2 15 3 3", groups=3, padding=_ONE, **_BOTH),
    _case("groups_expanded", "groups whose stacked filters are fewer than the bank", "2 24 8 9 9 2 8 3 3", groups=2,
          padding=_ONE, **_BOTH),
    _case("channels_last", "the fast layout, with tails", "2 26 9 10 11 2 19 3 3", channels_last=True, padding=_ONE,
          **_BOTH),
    _case("channels_last_words", "the fast layout, whole words", "1 128 5 15 24 2 40 3 3", channels_last=True,
          padding=_ONE),
    _case("offset", "data off the alignment", "2 16 7 11 5 2 16 3 3", padding=_ONE, view="offset"),
    _case("sliced", "gaps in the input", "2 10 8 9 6 2 11 3 3", padding=_ONE, view="sliced"),
    _case("sliced_channels_last", "gaps between pixels and rows", "2 14 8 9 6 2 12 3 3", channels_last=True,
          padding=_ONE, view="sliced"),
    _case("expanded", "batch stride 0", "3 8 6 9 5 2 8 3 3", padding=_ONE, view="expanded"),
    _case("transposed", "a layout that is neither of the two", "2 8 6 9 5 2 8 3 2", view="transposed"),
    _case("relu", "an activation, scales of both signs", "2 12 6 8 5 3 17 3 3", padding=_ONE, activation="relu",
          **_BOTH),
    _case("relu6", "a clip on both sides", "2 12 6 8 5 3 17 3 3", padding=_ONE, activation="relu6", **_BOTH),
    _case("binary_weights", "splits 1 and all filters: BWN", "1 37 7 9 29 1 29 3 3", padding=_ONE, scale=True),
    _case("binary_weights_channels_last", "the same where it is fast", "2 32 6 9 24 1 24 3 3", padding=_ONE, scale=True,
          channels_last=True),
    _case("signs", "XNOR mode: zeros pad", "2 26 7 9 9 2 19 3 3", padding=(1, 2, 2, 1), mode="signs", **_BOTH),
    _case("signs_channels_last", "the same in the fast layout", "2 64 6 9 12 2 24 3 3", padding=_ONE, mode="signs",
          channels_last=True),
    _case("signs_small_bank", "XNOR mode where stacking saves most", "1 24 6 9 3 2 40 3 3", padding=_ONE, mode="signs",
          **_BOTH),
    _case("packed_signs", "packed once, read by splits that end inside a word", "2 42 6 7 9 3 20 3 3", mode="signs",
          planes=1, padding=_ONE, **_BOTH),
    _case("codes", "few-bit activations", "2 38 6 7 9 2 20 3 3", mode="codes", planes=3, padding=_ONE, **_BOTH),
)  # fmt: skip


def _performance(N: int, channels: int, size: int, n: int, splits: int) -> StackedCase:
    problem = StackedBinaryConv2dProblem(
        N=N, C=channels, H=size, W=size, n=n, splits=splits, K=channels, padding=_ONE, channels_last=True
    )
    return StackedCase(f"n{N}_{channels}_at{size}_bank{n}_splits{splits}", "a shape of the performance goals", problem)


STACKED_PERFORMANCE_CASES = tuple(
    _performance(N, channels, size, n, splits)
    for N, channels, size in ((1, 64, 56), (1, 128, 28), (1, 256, 14), (1, 512, 7), (8, 128, 28), (8, 64, 56))
    for n, splits in ((channels // 4, 2), (channels, 1))
)


def stacked_case(name: str) -> StackedCase:
    """The case of this name; a ValueError that lists the names where there is none."""
    for found in (*STACKED_CASES, *STACKED_PERFORMANCE_CASES):
        if found.name == name:
            return found
    raise ValueError(f"testing: no case has the name {name!r}; there are {', '.join(c.name for c in STACKED_CASES)}")


@dataclass(frozen=True)
class StackedInputs:
    """The operands of one call; ``values`` are what enters the sums, in float64."""

    case: StackedCase
    input: Tensor | PackedTensor
    values: Tensor
    bank: Tensor
    index: Tensor
    scale: Tensor | None
    bias: Tensor | None
    _storage: tuple[Tensor, Tensor] | None = field(repr=False, default=None)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """``(input, bank, index, scale, bias)``."""
        return self.input, self.bank, self.index, self.scale, self.bias

    def changed(self) -> bool:
        """Whether a kernel wrote to the input or beside it."""
        return self._storage is not None and not torch.equal(*map(bits, self._storage))


def settings_of(case: StackedCase) -> reference.Settings:
    """The settings of a case in normal form, for the reference."""
    p = case.problem
    encoding = None if not p.planes else "unsigned" if p.mode == "codes" else "sign"
    return reference.Settings(
        p.stride, p.padding, p.dilation, p.groups, p.mode == "signs" and not p.planes, p.activation, p.dtype, p.C,
        encoding, False, "clip", "reference",
    )  # fmt: skip


def make_stacked_inputs(case: StackedCase, seed: int = 0, *, values: str = "random") -> StackedInputs:
    """The operands of a case, the same for the same seed; whole numbers with ``values="grid"``.

    Around and between the elements of a real input lies NaN, which a kernel that reads there shows.
    """
    p = case.problem
    generator = torch.Generator().manual_seed(seed)

    def whole(shape: tuple[int, ...], most: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).double()

    grid = values == "grid"
    shape = (p.N, p.C, p.H, p.W)
    storage = None
    input: Tensor | PackedTensor
    if p.planes:
        codes = torch.randint(2**p.planes, shape, generator=generator)
        planes = torch.stack([(codes >> plane) & 1 for plane in range(p.planes)], 1).bool()
        encoding = "unsigned" if p.mode == "codes" else "sign"
        input = PackedTensor(pack_planes(planes), p.C, p.planes, encoding).to(p.device)
        operand = input.words
    else:
        exact = whole(shape, 100) if grid else torch.randn(shape, generator=generator, dtype=torch.float64)
        strides = _strides(case, shape, p.channels_last)  # type: ignore[arg-type]
        strides = (0, *strides[1:]) if case.view == "expanded" else strides
        start = GUARD + (1 if case.view == "offset" else 0)
        input, held = _place(exact.to(p.dtype).to(p.device), strides, start)
        operand, storage = input, (held, held.clone())
    size = 1.0 if grid or p.mode != "real" else p.taps**-0.5
    bank = whole((p.n, p.low, p.R, p.S), 1).sign().add(0.5).sign().to(p.dtype).to(p.device)
    index = torch.randint(p.n, (p.K, p.splits), generator=generator).to(p.device)
    if p.splits == 1 and p.n == p.K:
        index = torch.arange(p.K, device=p.device)[:, None]
    scale = whole((p.K,), 2) if grid else torch.randn(p.K, generator=generator, dtype=torch.float64) * size * 3
    bias = whole((p.K,), 50) if grid else torch.randn(p.K, generator=generator, dtype=torch.float64)
    entering = reference.input_values(operand, settings_of(case)).double()
    return StackedInputs(
        case, input, entering, bank, index, scale.to(p.dtype).to(p.device) if p.scale else None,
        bias.to(p.dtype).to(p.device) if p.bias else None, storage,
    )  # fmt: skip


def plain_stacked(inputs: StackedInputs) -> Tensor:
    """The op as one convolution of PyTorch with the expanded filters, a factor, an offset and an activation."""
    p = inputs.case.problem
    top, bottom, left, right = p.padding
    padded = F.pad(inputs.values.to(p.dtype), (left, right, top, bottom))
    filters = reference.stacked_filters(inputs.bank, inputs.index)
    out = F.conv2d(padded, filters, None, p.stride, 0, p.dilation, p.groups)
    out = out if inputs.scale is None else out * inputs.scale[:, None, None]
    out = out if inputs.bias is None else out + inputs.bias[:, None, None]
    if p.activation is not None:
        out = F.relu(out) if p.activation == "relu" else F.relu6(out)
    return out


def check_stacked(case: StackedCase, kernel: Callable[..., Tensor], *, seed: int = 0, tf32: bool = False) -> None:
    """Run a function with the signature of ``stacked_binary_conv2d`` on a case and compare all of its contract.

    Every element against a float64 oracle and beside plain PyTorch, whole numbers bit for bit, shape, dtype and memory
    format, untouched inputs, and the same bits in two runs. ``tf32`` lets float32 products use TF32, and allows its
    errors; whole numbers and plain PyTorch are left out then.

    Raises:
        Mismatch: an AssertionError that names the first thing that is wrong.
    """
    p = case.problem
    for values in ("random",) if tf32 else ("random", "grid"):
        inputs = make_stacked_inputs(case, seed, values=values)
        with torch.no_grad(), full_float32(tf32), poisoned_allocations():
            got = kernel(*inputs.tensors, **case.arguments())
            first = got.clone()
            again = kernel(*inputs.tensors, **case.arguments())
        _form(case, inputs, got)
        if inputs.changed():
            raise Mismatch(f"{case}: the kernel wrote to the input or beside it")
        if not torch.equal(bits(first), bits(again)):
            raise Mismatch(f"{case}: two runs give different bits")
        bound = tolerances.stacked_bound(
            case.problem, inputs.values, inputs.bank, inputs.index, inputs.scale, inputs.bias, tf32
        )
        exact = values == "grid" or (p.mode != "real" and not p.scale and not p.bias)
        expected = bound.expected.to(p.dtype).double() if exact else bound.expected
        error = (first.double() - expected).abs()
        wrong = ~(error <= (torch.zeros_like(error) if exact else bound.allowed))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise Mismatch(
                f"{case}{' on whole numbers' if exact else ''}: first mismatch at [n, k, y, x] = {list(at)}: got "
                f"{first[at].item():.9g}, expected {expected[at].item():.9g} ± "
                f"{0.0 if exact else bound.allowed[at].item():.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
            )
        if error.numel() and not exact and not tf32:
            with full_float32():
                plain_error = (plain_stacked(inputs).double() - bound.expected).abs()
            worst, mean = tolerances.allowed_beside_plain(plain_error, bound, p.dtype)
            if error.max().item() > worst or tolerances.mean_square(error) > mean:
                raise Mismatch(
                    f"{case}: largest error {error.max().item():.3g} (allowed {worst:.3g}), root mean square "
                    f"{tolerances.mean_square(error):.3g} (allowed {mean:.3g}), beside plain PyTorch"
                )


def _form(case: StackedCase, inputs: StackedInputs, got: Tensor) -> None:
    p = case.problem
    shape = (p.N, p.K, *p.output_size)
    if tuple(got.shape) != shape or got.dtype != p.dtype:
        raise Mismatch(f"{case}: the result must be {p.dtype} {list(shape)}, got {got.dtype} {list(got.shape)}")
    real = inputs.input if isinstance(inputs.input, Tensor) else None
    layout = torch.channels_last if real is None else memory_format(real)
    ideal = torch.empty(shape, memory_format=layout)
    if memory_format(got) != memory_format(ideal) or not got.is_contiguous(memory_format=layout):
        raise Mismatch(f"{case}: the result must be dense in {layout}, got strides {got.stride()} of {shape}")
