"""Cases and checks of ``binary_conv2d``: whole numbers bit for bit, floats within the tolerance contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import INT32, PackedTensor, Threshold, pack_planes
from basisconv_kernels.reference import binary_conv2d as reference
from basisconv_kernels.reference import bitpack as packing
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.compare import Mismatch
from basisconv_kernels.testing.inputs import poisoned_allocations

VIEWS = ("dense", "offset", "sliced", "expanded", "transposed")


@dataclass(frozen=True)
class BinaryCase:
    """One problem, the way in which a real input lies in memory, and why it is there."""

    name: str
    reason: str
    problem: BinaryConv2dProblem
    view: str = "dense"

    def at(self, **changes: Any) -> BinaryCase:
        """The same case with some fields of its problem changed."""
        return replace(self, problem=replace(self.problem, **changes))

    def __str__(self) -> str:
        return f"{self.name} [{self.problem}]" + ("" if self.view == "dense" else f" {self.view}")


def _case(name: str, reason: str, sizes: str, *, view: str = "dense", **flags: Any) -> BinaryCase:
    """``sizes`` reads ``N C H W K R S``."""
    n, c, h, w, k, r, s = map(int, sizes.split())
    return BinaryCase(name, reason, BinaryConv2dProblem(N=n, C=c, H=h, W=w, K=k, R=r, S=s, **flags), view)


_ONE = (1, 1, 1, 1)

BINARY_CASES: tuple[BinaryCase, ...] = (
    #                                                                          N   C  H  W   K R S
    _case("odd_sizes", "no size is a multiple of a word or a register", "2 37 9 11 29 3 3", padding=_ONE),
    _case("full_words", "whole words and registers: no tail code runs", "1 64 8 12 64 3 3", padding=_ONE),
    _case("past_a_block", "more filters than one register block, several words", "1 130 5 7 133 3 3", padding=_ONE),
    _case("one_channel", "C = 1: 31 padding bits a word", "2 1 8 9 5 3 3", padding=_ONE),
    _case("one_output", "K = 1", "2 33 6 8 1 3 3", padding=_ONE),
    _case("empty_batch", "N = 0: nothing may be launched, the shape must be right", "0 40 7 9 3 3 3"),
    _case("pointwise", "1×1: no halo", "2 70 5 8 34 1 1"),
    _case("even_kernel", "an even kernel has no middle", "2 35 9 8 6 2 4", padding=(1, 0, 1, 2)),
    _case("large_kernel", "7×7 with stride, few channels: a first layer", "1 3 20 17 20 7 7", stride=(2, 2),
          padding=(3, 3, 3, 3)),
    _case("stride", "different strides, an input row left over", "2 48 11 14 18 3 3", stride=(2, 3), padding=_ONE),
    _case("dilation", "different dilations", "1 65 13 12 33 3 3", dilation=(2, 3), padding=(2, 2, 3, 3)),
    _case("asymmetric_padding", "four different paddings", "2 34 8 10 19 3 3", padding=(0, 3, 2, 1)),
    _case("padding_past_kernel", "output pixels that see no input at all", "2 33 5 4 7 3 2", padding=(4, 3, 2, 6)),
    _case("map_below_kernel", "a map smaller than the kernel: every class of border", "3 40 2 3 16 5 5",
          padding=(4, 4, 4, 4)),
    _case("padding_minus_one", "the padding counts as −1", "2 37 6 7 21 3 3", padding=(1, 2, 2, 1), padding_value=-1),
    _case("padding_plus_one", "the padding counts as +1", "2 37 6 7 21 3 3", padding=(3, 1, 2, 4), padding_value=1),
    _case("one_pixel", "a 1×1 output", "2 66 3 5 9 3 5"),
    _case("groups", "groups that end inside a word", "2 60 8 9 18 3 3", groups=3, padding=_ONE),
    _case("depthwise", "one channel a group, two filters each", "2 35 7 9 70 3 3", groups=35, padding=_ONE),
    _case("channels_last", "the fast layout, with tails", "2 45 9 10 36 3 3", channels_last=True, padding=_ONE),
    _case("offset", "data off the alignment", "2 40 7 11 16 3 3", padding=_ONE, view="offset"),
    _case("sliced", "gaps between rows, columns and channels", "2 33 8 9 11 3 3", padding=_ONE, view="sliced"),
    _case("sliced_channels_last", "gaps between pixels and rows", "2 39 8 9 12 3 3", channels_last=True,
          padding=_ONE, view="sliced"),
    _case("expanded", "batch stride 0", "3 34 6 9 8 3 3", padding=_ONE, view="expanded"),
    _case("transposed", "a layout that is neither of the two", "2 36 6 9 8 3 2", view="transposed"),
    _case("packed", "packed signs", "2 45 9 10 36 3 3", planes=1, padding=_ONE),
    _case("packed_groups", "packed once, read by groups that end inside a word", "2 66 7 8 9 3 3", planes=1,
          groups=3, padding=_ONE, stride=(1, 2)),
    _case("packed_plus_one", "packed signs, the padding counts as +1", "1 70 6 9 40 3 3", planes=1,
          padding=(2, 1, 1, 2), padding_value=1, dilation=(2, 1)),
    *(_case(f"codes_{bits}", f"unsigned codes of {bits} bits", f"2 {30 + 5 * bits} 7 9 19 3 3", planes=bits,
            unsigned=True, padding=(1, 2, 3, 1)) for bits in (1, 2, 3, 4)),
    _case("codes_groups", "unsigned codes, groups, stride, skipped rows", "2 42 6 7 10 3 3", planes=2,
          unsigned=True, groups=2, stride=(2, 1), padding=(4, 3, 1, 1)),
)  # fmt: skip


def binary_case(name: str) -> BinaryCase:
    """The case of this name."""
    return next(case for case in BINARY_CASES if case.name == name)


def _placed(values: Tensor, view: str, channels_last: bool) -> Tensor:
    """Copy values [N, C, H, W] into memory as the view says."""
    if view == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    if view == "offset":
        flat = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        out = flat[1:].as_strided(values.shape, values.stride(), 1)
        return out.copy_(values)
    if view == "sliced":
        N, C, H, W = values.shape
        room = values.new_full((N, C + 3, H + 2, 2 * W), torch.nan)
        if channels_last:
            room = room.contiguous(memory_format=torch.channels_last)
        return room[:, 1 : C + 1, 1 : H + 1, ::2].copy_(values)
    if view == "expanded":
        return values[:1].expand_as(values)
    return values


@dataclass(frozen=True)
class BinaryInputs:
    """The operands of one call, and the whole numbers that they stand for."""

    input: Tensor | PackedTensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    pixel_scale: Tensor
    threshold: Threshold
    sums: Tensor


def arguments(case: BinaryCase) -> dict[str, Any]:
    """The keyword arguments of the op that give the geometry."""
    p = case.problem
    return {
        "stride": p.stride, "padding": p.padding, "padding_value": p.padding_value, "dilation": p.dilation,
        "groups": p.groups,
    }  # fmt: skip


def settings_of(case: BinaryCase, output: str = "int32") -> reference.Settings:
    """The settings of a case in normal form, for the reference."""
    p = case.problem
    encoding = None if not p.planes else "unsigned" if p.unsigned else "sign"
    return reference.Settings(
        **arguments(case), activation=p.activation, output=output, dtype=p.dtype, channels=p.C, encoding=encoding,
        packed_weight=False, estimators=("clip", "clip"), backend="reference",
    )  # fmt: skip


def make_binary_inputs(case: BinaryCase, seed: int = 0) -> BinaryInputs:
    """The operands of a case, the same for the same seed; among real values are both zeros, NaN and infinities.

    All is made and computed on the CPU, then put on the device of the problem.
    """
    p = case.problem
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(p.dtype)
        special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf], dtype=p.dtype)
        place = torch.randint(40, shape, generator=generator)
        return torch.where(place < 5, special[place.clamp(max=4)], values)

    weight = normal(p.K, p.C // p.groups, p.R, p.S)
    input: Tensor | PackedTensor
    if p.planes:
        codes = torch.randint(2**p.planes, (p.N, p.C, p.H, p.W), generator=generator)
        bits = torch.stack([(codes >> plane) & 1 for plane in range(p.planes)], 1).bool()
        words = PackedTensor(pack_planes(bits), p.C, p.planes, "unsigned" if p.unsigned else "sign")
        operand, input = words.words, words.to(p.device)
    else:
        made = normal(p.N, p.C, p.H, p.W)
        operand, input = (_placed(made.to(device), case.view, p.channels_last) for device in ("cpu", p.device))
    settings = settings_of(case)
    values, signs = reference.input_values(operand, settings), reference.weight_signs(weight, settings)
    sums = reference.integer_sums(values, signs, settings)
    oh, ow = p.output_size
    # Thresholds that sums meet exactly, that all pass and that none passes, in both directions.
    near = torch.randint(-4, 5, (p.K,), generator=generator, dtype=torch.int32) + int(sums.float().mean().nan_to_num())
    extreme = torch.randint(8, (p.K,), generator=generator)
    near = torch.where(extreme == 0, INT32.min, torch.where(extreme == 1, INT32.max, near)).to(torch.int32)
    return BinaryInputs(
        input,
        weight.to(p.device),
        torch.randn(p.K, generator=generator, dtype=torch.float64).to(p.device, p.dtype),
        torch.randn(p.K, generator=generator, dtype=torch.float64).to(p.device, p.dtype) * 3,
        torch.rand(p.N, 1, oh, ow, generator=generator, dtype=torch.float64).to(p.device, p.dtype),
        Threshold(near.to(p.device), torch.randint(2, (p.K,), generator=generator).bool().to(p.device)),
        sums.to(p.device),
    )


def _equal(case: BinaryCase, what: str, got: Tensor, expected: Tensor, letters: str) -> None:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Mismatch(
            f"{case}: {what} must be {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"
        )
    wrong = got != expected
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        where = ", ".join(f"{letter}={place}" for letter, place in zip(letters, at, strict=True))
        raise Mismatch(
            f"{case}: {what}: first mismatch at [{where}]: got {got[at].item()}, expected {expected[at].item()}; "
            f"{int(wrong.sum())} of {wrong.numel()} are wrong"
        )


def _layout(case: BinaryCase, inputs: BinaryInputs, got: Tensor) -> None:
    real = inputs.input if isinstance(inputs.input, Tensor) else None
    layout = torch.channels_last if real is None else memory_format(real)
    ideal = torch.empty(got.shape, memory_format=layout)
    if memory_format(got) != memory_format(ideal) or not got.is_contiguous(memory_format=layout):
        raise Mismatch(f"{case}: the result must be dense in {layout}, got strides {got.stride()} of {list(got.shape)}")


def check_binary(case: BinaryCase, kernel: Callable[..., Any], *, seed: int = 0) -> None:
    """Run a function with the signature of ``binary_conv2d`` in every output mode and compare with the reference.

    Raises:
        Mismatch: an AssertionError that names the first thing that is wrong.
    """
    inputs = make_binary_inputs(case, seed)
    operand = inputs.input.words if isinstance(inputs.input, PackedTensor) else inputs.input
    before = operand.clone(), inputs.weight.clone()
    geometry = arguments(case)
    with torch.no_grad(), poisoned_allocations():
        sums = kernel(inputs.input, inputs.weight, output="int32", **geometry)
        _equal(case, "v", sums, inputs.sums, "nkyx")
        _layout(case, inputs, sums)
        for threshold in (None, inputs.threshold):
            bits = kernel(inputs.input, inputs.weight, output="packed", threshold=threshold, **geometry)
            expected = inputs.sums >= 0 if threshold is None else threshold.bits(inputs.sums)
            what = "bits" if threshold is None else "bits by threshold"
            if (bits.channels, bits.encoding) != (case.problem.K, "sign"):
                raise Mismatch(f"{case}: {what} must be signs of {case.problem.K} channels, got {bits}")
            _equal(case, what, bits.words, pack_planes(expected[:, None]), "npyxw")
        _check_floats(case, kernel, inputs, geometry)
    for name, now, then in (("input", operand, before[0]), ("weight", inputs.weight, before[1])):
        if not torch.equal(now.nan_to_num(7.0) if now.is_floating_point() else now,
                           then.nan_to_num(7.0) if then.is_floating_point() else then):  # fmt: skip
            raise Mismatch(f"{case}: the kernel wrote to {name}")


def _check_floats(case: BinaryCase, kernel: Callable[..., Any], inputs: BinaryInputs, geometry: dict[str, Any]) -> None:
    dtype = case.problem.dtype
    for factors, activation in (((), None), (("scale",), "relu"), (("scale", "bias", "pixel_scale"), "relu6")):
        given = {name: getattr(inputs, name) for name in factors}
        got = kernel(inputs.input, inputs.weight, **given, activation=activation, **geometry)
        wanted = dtype if given or not isinstance(inputs.input, PackedTensor) else torch.float32
        if got.dtype != wanted or got.shape != inputs.sums.shape:
            raise Mismatch(f"{case}: the float result must be {wanted} {list(inputs.sums.shape)}, got {got.dtype}")
        _layout(case, inputs, got)
        bound = tolerances.binary_bound(inputs.sums, wanted, activation=activation, **given)
        wrong = ~((got.double() - bound.expected).abs() <= bound.allowed)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise Mismatch(
                f"{case}: float result with {', '.join(factors) or 'nothing'}: first mismatch at {list(at)}: got "
                f"{got[at].item():.9g}, expected {bound.expected[at].item():.9g} ± {bound.allowed[at].item():.3g}"
            )


def check_pack(case: BinaryCase, kernel: Callable[..., PackedTensor], *, seed: int = 0) -> None:
    """Run a function with the signature of ``bitpack`` on the real input of a case, as signs, thresholds and codes."""
    p = case.problem
    inputs = make_binary_inputs(case, seed)
    if not isinstance(inputs.input, Tensor):
        return
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(p.C, generator=generator)
    real[real > 1.5], real[real < -1.5] = torch.nan, -torch.inf
    flip = torch.randint(2, (p.C,), generator=generator).bool()
    thresholds = Threshold(real.to(p.device), flip.to(p.device))
    with poisoned_allocations():
        for threshold, bits, unsigned in ((None, 1, None), (thresholds, 1, None), (None, 1, True), (None, 3, None)):
            got = kernel(inputs.input, threshold=threshold, bits=bits, unsigned=unsigned)
            encoding = "unsigned" if unsigned or bits > 1 else "sign"
            _equal(case, f"words of {encoding}", got.words,
                   packing.forward(inputs.input, threshold, bits, encoding), "npyxw")  # fmt: skip
            got.check_padding()
