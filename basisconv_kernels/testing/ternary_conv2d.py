"""``ternary_conv2d``: its cases, tensors and comparison with the oracle, for its backends and for kernels of your own.

A kernel is a function with the signature of the op, arguments in normal form::

    kernel(input, planes, scale, bias, *, negative_scale, stride, padding, dilation, groups, activation)

``check`` compares every element with a float64 oracle, whole numbers bit for bit, the form of the result, that no
memory beside the tensors was written, and the bits of two runs, as ``testing.check`` does for ``basis_conv2d``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels.reference import ternary_conv2d as reference
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import compare, tolerances
from basisconv_kernels.testing.compare import Mismatch
from basisconv_kernels.testing.inputs import GUARD, _place, _strides, bits, poisoned_allocations

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class TernaryCase:
    """One problem, the reason why it is there, and how its input lies in memory (as ``testing.Case.view``).

    ``density`` is the share of weights that are not 0.
    """

    name: str
    reason: str
    problem: TernaryConv2dProblem
    view: str = "dense"
    density: float = 0.5

    def at(self, **changes: Any) -> TernaryCase:
        """The same case with some fields of its problem changed."""
        return replace(self, problem=replace(self.problem, **changes))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the op that are no tensors."""
        p = self.problem
        names = ("stride", "padding", "dilation", "groups", "activation")
        return {name: getattr(p, name) for name in names}

    def __str__(self) -> str:
        return f"{self.name} [{self.problem}] density {self.density}" + (
            "" if self.view == "dense" else f" {self.view}"
        )


def _case(
    name: str, reason: str, sizes: str, *, view: str = "dense", density: float = 0.5, **flags: Any
) -> TernaryCase:
    n, c, h, w, k, r, s = map(int, sizes.split())
    return TernaryCase(name, reason, TernaryConv2dProblem(N=n, C=c, H=h, W=w, K=k, R=r, S=s, **flags), view, density)


_ONE = (1, 1, 1, 1)

# sizes: N C H W K R S, all different where the reason allows it.
TERNARY_CASES: tuple[TernaryCase, ...] = (
    _case("odd_sizes", "nothing divides by a vector", "2 7 9 11 13 3 3", padding=_ONE, bias=True),
    _case("past_a_word", "channels over the end of a 32-bit word", "1 37 8 9 10 3 3", padding=_ONE),
    _case("whole_word", "bit 31 is a channel", "1 32 6 7 5 3 3", padding=_ONE, bias=True),
    _case("channels_last", "the other layout, with tails", "2 13 9 10 19 3 3", channels_last=True, padding=_ONE),
    _case("two_scales", "TTQ: an accumulator for each sign", "2 9 8 7 11 3 3", scales="two", padding=_ONE, bias=True),
    _case("no_scale", "sums alone", "1 6 7 5 9 3 3", scales="none"),
    _case("sparse", "most weights are 0, some filters have none", "1 20 9 8 30 3 3",
          density=0.02, bias=True, padding=_ONE),
    _case("full", "no weight is 0: a binary filter", "1 10 9 7 12 3 3", density=1.0, padding=_ONE),
    _case("empty", "every weight is 0: the bias alone", "1 4 5 6 7 3 3", density=0.0, bias=True, scales="two"),
    _case("empty_batch", "N = 0", "0 4 7 9 5 3 3", bias=True),
    _case("pointwise", "1×1, no halo", "2 10 5 9 14 1 1", bias=True),
    _case("linear", "one pixel: a Linear layer", "5 70 1 1 23 1 1", bias=True),
    _case("even_kernel", "no middle tap", "2 3 9 8 6 2 4", padding=(1, 0, 1, 2)),
    _case("large_kernel", "5×5", "1 6 12 11 10 5 5", padding=(2, 2, 2, 2), channels_last=True),
    _case("stride", "different strides", "2 6 11 14 8 3 3", stride=(2, 3), padding=_ONE),
    _case("stride_past_kernel", "pixels that no tap reads", "2 3 13 21 7 2 3", stride=(4, 5)),
    _case("stride_and_dilation", "both, in both directions", "1 5 13 17 8 3 2",
          stride=(2, 2), dilation=(3, 2), padding=_ONE),
    _case("asymmetric_padding", "four paddings", "2 4 8 10 9 3 3", padding=(0, 3, 2, 1)),
    _case("padding_past_kernel", "outputs that see no input", "2 3 5 4 7 3 2", padding=(4, 3, 2, 6), bias=True),
    _case("map_below_kernel", "a map smaller than the kernel", "3 4 2 3 7 5 5", padding=(2, 2, 2, 3)),
    _case("groups", "channel groups", "2 6 8 9 12 3 3", groups=3, padding=_ONE, bias=True, scales="two"),
    _case("depthwise", "one channel a group", "2 5 7 9 10 3 3", groups=5, padding=_ONE),
    _case("wide_map", "more pixels in a row than a block", "1 3 4 150 5 3 3", padding=_ONE, activation="relu"),
    _case("many_channels", "more channels than a block", "1 150 6 5 9 3 3", padding=_ONE, scales="two"),
    _case("offset", "data off the alignment", "2 8 7 11 16 3 3", padding=_ONE, view="offset", bias=True),
    _case("sliced", "gaps between rows, columns, channels", "2 5 8 9 11 3 3",
          padding=_ONE, view="sliced", activation="relu"),
    _case("expanded", "batch stride 0", "3 4 6 9 8 3 3", padding=_ONE, view="expanded"),
    _case("transposed", "neither of the two layouts", "2 4 6 9 8 3 2",
          view="transposed", activation="relu6", bias=True),
)  # fmt: skip


@dataclass(frozen=True)
class TernaryInputs:
    """The tensors of one call; NaN lies around and between the elements of ``input``."""

    case: TernaryCase
    input: Tensor
    planes: Tensor
    scale: Tensor | None
    negative_scale: Tensor | None
    bias: Tensor | None
    _before: list[tuple[Tensor, Tensor]] = field(repr=False, default_factory=list)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``(input, planes, scale, negative_scale, bias)``."""
        return self.input, self.planes, self.scale, self.negative_scale, self.bias

    def changed(self) -> list[str]:
        """What a kernel wrote to."""
        same = [torch.equal(now if now.dtype == torch.int32 else bits(now), was) for now, was in self._before]
        return [name for name, equal in zip(("input or beside it", "planes"), same, strict=True) if not equal]


def random_weight(case: TernaryCase, generator: torch.Generator) -> Tensor:
    """Weights −1, 0, +1 [K, C/G, R, S] of the case's density."""
    p = case.problem
    shape = (p.K, p.C // p.groups, p.R, p.S)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * (torch.rand(shape, generator=generator) < case.density)


def make_inputs(case: TernaryCase, seed: int = 0, *, values: str = "random") -> TernaryInputs:
    """The tensors of a case: random, or (``"grid"``) whole numbers whose sums are exact in float32."""
    p = case.problem
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(case, generator)
    grid = values == "grid"

    def drawn(*shape: int, most: int) -> Tensor:
        if grid:
            return torch.randint(-most, most + 1, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = drawn(p.N, p.C, p.H, p.W, most=64) * (1.0 if grid else 2.0)
    size = 1.0 if grid else max(1.0, p.taps * case.density) ** -0.5

    def factor() -> Tensor:
        return (drawn(p.K, most=4) * size).to(p.dtype).to(p.device)

    strides = _strides(case, exact.shape, p.channels_last)  # type: ignore[arg-type]  # it reads the view alone
    if case.view == "expanded":
        strides = (0, *strides[1:])
    start = GUARD + (1 if case.view == "offset" else 0)
    input, storage = _place(exact.to(p.dtype).to(p.device), strides, start)
    planes = reference.pack_planes(weight).to(p.device)
    scale = None if p.scales == "none" else factor()
    negative = factor() if p.scales == "two" else None
    bias = drawn(p.K, most=100).to(p.dtype).to(p.device) if p.bias else None
    before = [(storage, bits(storage).clone()), (planes, planes.clone())]
    return TernaryInputs(case, input, planes, scale, negative, bias, before)


def call(kernel: Kernel, inputs: TernaryInputs) -> Tensor:
    arguments = {"negative_scale": inputs.negative_scale, **inputs.case.arguments()}
    return kernel(inputs.input, inputs.planes, inputs.scale, inputs.bias, **arguments)


def plain(inputs: TernaryInputs, dtype: torch.dtype | None = None) -> Tensor:
    """One dense convolution of PyTorch with the scaled weights, at the dtype of the tensors or another."""
    p = inputs.case.problem
    x, planes, scale, negative, bias = inputs.tensors
    if dtype is not None:
        x = x.to(dtype)
        scale, negative, bias = (None if t is None else t.to(dtype) for t in (scale, negative, bias))
    top, bottom, left, right = p.padding
    weight = reference.scaled_weight(planes, scale, negative, p.C // p.groups, x.dtype)
    out = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, p.stride, 0, p.dilation, p.groups)
    return out.clamp(min=0.0, max=6.0 if p.activation == "relu6" else None) if p.activation else out


def check(case: TernaryCase, kernel: Kernel, *, seed: int = 0, tf32: bool = False) -> float:
    """Run a kernel on a case and compare all of its contract; the largest error as a share of what is allowed.

    ``tf32`` lets float32 products use TF32, and allows its errors; rule 2 and whole numbers are left out then.

    Raises:
        Mismatch: an AssertionError that names the first thing that is wrong.
    """
    inputs, any_inputs = make_inputs(case, seed), make_inputs(case, seed, values="grid")
    with torch.no_grad(), compare.full_float32(tf32):
        with poisoned_allocations():
            got = call(kernel, inputs)
            compare._form(case, inputs, got)  # type: ignore[arg-type]
            first = got.clone()
            again = call(kernel, inputs)
        if inputs.changed():
            raise Mismatch(f"{case}: the kernel wrote to {', '.join(inputs.changed())}")
        compare._same_bits(case, "the results of two runs", first, again)  # type: ignore[arg-type]
        bound = tolerances.ternary_forward_bound(case.problem, *inputs.tensors, tf32=tf32)
        error = compare._elements(str(case), first, bound.expected, bound.allowed)
        if tf32:
            return (error / bound.allowed).max().item() if error.numel() else 0.0
        plain_error = (plain(inputs).double() - bound.expected).abs()
        compare._beside_plain(str(case), case.problem.dtype, error, plain_error, bound)
        exact = plain(any_inputs, torch.float64).to(case.problem.dtype)
        with poisoned_allocations():
            whole = call(kernel, any_inputs)
        compare._elements(f"{case} on whole numbers", whole, exact.double(), torch.zeros_like(exact).double())
    return (error / bound.allowed).max().item() if error.numel() else 0.0


def check_gradients(case: TernaryCase, kernel: Kernel, *, seed: int = 0) -> None:
    """Compare the gradients of input, scales and bias with the explicit formulas in float64."""
    inputs = make_inputs(case, seed)
    names = ("input", "planes", "scale", "negative_scale", "bias")
    leaves = {
        name: t.detach().requires_grad_(name != "planes")
        for name, t in zip(names, inputs.tensors, strict=True)
        if t is not None
    }
    x, planes, scale, negative, bias = (leaves.get(name) for name in names)
    with compare.full_float32():
        out = kernel(x, planes, scale, bias, negative_scale=negative, **case.arguments())
        generator = torch.Generator().manual_seed(seed + 1)
        grad_output = torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device)
        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        got = torch.autograd.grad(out, list(trained.values()), grad_output)
        bounds = tolerances.ternary_backward_bound(case.problem, grad_output, out.detach(), *inputs.tensors[:4])
    for (name, leaf), gradient in zip(trained.items(), got, strict=True):
        head = f"{case}: gradient of {name}"
        if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
            raise Mismatch(f"{head} must be {leaf.dtype} {list(leaf.shape)}, got {gradient.dtype} {gradient.shape}")
        letters = "nchw" if gradient.dim() == 4 else "k"
        compare._elements(head, gradient, bounds[name].expected, bounds[name].allowed, letters)


def naive(inputs: TernaryInputs) -> Tensor:
    """The op as loops over single numbers, in float64, free of every convolution of PyTorch."""
    p = inputs.case.problem
    image = inputs.input.tolist()
    words = inputs.planes.tolist()
    scale = [1.0] * p.K if inputs.scale is None else inputs.scale.tolist()
    negative = scale if inputs.negative_scale is None else inputs.negative_scale.tolist()
    per_group, outputs = p.C // p.groups, p.K // p.groups
    oh, ow = p.output_size
    out = torch.empty(p.N, p.K, oh, ow, dtype=torch.float64)

    def value(n: int, k: int, y: int, x: int) -> float:
        sums = [0.0, 0.0]
        for c in range(per_group):
            for r in range(p.R):
                for s in range(p.S):
                    row = y * p.stride[0] + r * p.dilation[0] - p.padding[0]
                    column = x * p.stride[1] + s * p.dilation[1] - p.padding[2]
                    if 0 <= row < p.H and 0 <= column < p.W:
                        for plane in (0, 1):
                            bit = words[k][plane][r][s][c // 32] >> (c % 32) & 1
                            sums[plane] += bit * image[n][k // outputs * per_group + c][row][column]
        total = scale[k] * sums[0] - negative[k] * sums[1]
        total += 0.0 if inputs.bias is None else float(inputs.bias[k])
        total = max(total, 0.0) if p.activation else total
        return min(total, 6.0) if p.activation == "relu6" else total

    for n in range(p.N):
        for k in range(p.K):
            for y in range(oh):
                for x in range(ow):
                    out[n, k, y, x] = value(n, k, y, x)
    return out
