"""Named convolution problems, each with the reason why it is there.

All sizes of a case differ, so that a kernel that swaps two axes cannot pass; no size is larger than its reason needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from basisconv_kernels.core.problem import Conv2dProblem

if TYPE_CHECKING:
    from typing import Self

VIEWS = ("dense", "offset", "sliced", "expanded", "transposed", "mixed")


@dataclass(frozen=True)
class Case:
    """One problem and the way in which its tensors lie in memory.

    Attributes:
        name: readable id, unique in its list.
        reason: what breaks if this case is left out.
        problem: shapes and flags.
        view: ``dense``; ``offset``: starts one element off the alignment; ``sliced``: gaps between rows, columns and
            channels, all five tensors; ``expanded``: one image with batch stride 0; ``transposed``: rows are the
            fastest dimension of the maps, coefficients lie by columns; ``mixed``: the residual has the other memory
            format.
    """

    name: str
    reason: str
    problem: Conv2dProblem
    view: str = "dense"

    def at(self, **changes: Any) -> Self:
        """The same case with some fields of its problem changed, e.g. ``at(dtype=torch.bfloat16, device="cuda")``."""
        return replace(self, problem=replace(self.problem, **changes))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the op that are no tensors."""
        p = self.problem
        return {
            "stride": p.stride,
            "padding": p.padding,
            "dilation": p.dilation,
            "groups": p.groups,
            "activation": p.activation,
            "precise": p.precise,
        }

    def __str__(self) -> str:
        return f"{self.name} [{self.problem}]" + ("" if self.view == "dense" else f" {self.view}")


def _case(name: str, reason: str, sizes: str, *, view: str = "dense", **flags: Any) -> Case:
    """``sizes`` reads ``N C H W Q K R S``."""
    n, c, h, w, q, k, r, s = map(int, sizes.split())
    return Case(name, reason, Conv2dProblem(N=n, C=c, H=h, W=w, Q=q, K=k, R=r, S=s, **flags), view)


_ONE = (1, 1, 1, 1)
_EPILOGUE: dict[str, Any] = {"bias": True, "residual": True}

CASES: tuple[Case, ...] = (
    #                                                                             N  C  H  W  Q  K  R S
    _case("odd_sizes", "no size is a multiple of a vector", "2 5 9 11 7 13 3 3", padding=_ONE),
    _case("full_vectors", "all sizes multiples of a vector: no tail code runs", "2 16 12 24 32 48 3 3", padding=_ONE),
    _case("past_a_block", "more channels, basis filters and outputs than one register block", "1 37 6 10 43 71 3 3"),
    _case("odd_map", "a border tile that is cut in both directions", "2 18 7 13 11 21 3 3", padding=_ONE),
    _case("one_basis_filter", "Q = 1", "2 6 8 7 1 9 3 3", padding=_ONE),
    _case("one_channel", "C = 1: dense in both memory formats, the strides say NCHW", "2 1 8 9 3 5 3 3", padding=_ONE),
    _case("one_channel_channels_last", "the same, the strides say channels_last: a first layer on grey images",
          "2 1 8 9 3 5 3 3", channels_last=True, padding=_ONE),
    _case("one_output", "K = 1", "3 4 6 8 5 1 3 3", padding=_ONE),
    _case("one_output_channels_last", "K = 1: the strides of the result must still say channels_last",
          "3 4 6 8 5 1 3 3", channels_last=True, padding=_ONE),
    _case("empty_batch", "N = 0: nothing may be launched, the shape must be right", "0 4 7 9 3 5 3 3", bias=True),
    _case("pointwise", "1×1: plain low rank, no halo", "2 10 5 8 6 14 1 1"),
    _case("even_kernel", "an even kernel has no middle", "2 3 9 8 5 6 2 4", padding=(1, 0, 1, 2)),
    _case("flat_kernel", "R and S far apart", "2 4 6 13 5 9 1 7", padding=(0, 0, 3, 3)),
    _case("large_kernel", "5×5: no special 3×3 path", "1 6 12 11 9 10 5 5", padding=(2, 2, 2, 2)),
    _case("stride", "different strides in the two directions, an input row left over", "2 6 11 14 5 8 3 3",
          stride=(2, 3), padding=_ONE),
    _case("stride_past_kernel", "pixels that no tap reads", "2 3 13 21 4 7 2 3", stride=(4, 5)),
    _case("dilation", "taps apart, differently in the two directions", "2 4 12 15 6 7 3 3",
          dilation=(2, 3), padding=(2, 2, 3, 3)),
    _case("stride_and_dilation", "both at once", "1 5 13 17 6 8 3 2", stride=(2, 2), dilation=(3, 2), padding=_ONE),
    _case("asymmetric_padding", "four different paddings", "2 4 8 10 6 9 3 3", padding=(0, 3, 2, 1)),
    _case("padding_past_kernel", "output pixels that see no input at all", "2 3 5 4 6 7 3 2",
          padding=(4, 3, 2, 6), bias=True),
    _case("map_below_kernel", "a map smaller than the kernel", "3 4 2 3 6 7 5 5", padding=(2, 2, 2, 3)),
    _case("one_pixel", "a 1×1 output", "2 6 3 5 4 9 3 5"),
    _case("one_pixel_channels_last", "a 1×1 output that must still say channels_last", "2 6 3 5 4 9 3 5",
          channels_last=True),
    _case("groups", "grouped basis, coefficients [K, Q] mix all groups", "2 6 8 9 9 10 3 3", groups=3, padding=_ONE),
    _case("groups_compact", "coefficients [K, Q/groups] mix their own group only", "2 6 8 9 9 12 3 3",
          groups=3, compact=True, padding=_ONE, bias=True),
    _case("depthwise", "one channel a group, two atoms each", "2 5 7 9 10 6 3 3", groups=5, padding=_ONE),
    _case("channels_last", "the fast layout, with tails", "2 13 9 10 7 19 3 3", channels_last=True, padding=_ONE),
    _case("channels_last_stride", "the fast layout, strided, wide enough for blocks", "2 32 10 13 20 36 3 3",
          channels_last=True, stride=(2, 2), padding=_ONE, bias=True),
    _case("offset", "data off the alignment", "2 8 7 11 5 16 3 3", padding=_ONE, view="offset", **_EPILOGUE),
    _case("sliced", "gaps in all five tensors", "2 5 8 9 6 11 3 3", padding=_ONE, view="sliced", **_EPILOGUE),
    _case("sliced_channels_last", "gaps between pixels and rows", "2 7 8 9 6 12 3 3",
          channels_last=True, padding=_ONE, view="sliced", **_EPILOGUE),
    _case("expanded", "batch stride 0", "3 4 6 9 5 8 3 3", padding=_ONE, view="expanded"),
    _case("transposed", "a layout that is neither of the two", "2 4 6 9 5 8 3 2", view="transposed", **_EPILOGUE),
    _case("mixed_formats", "residual and input of different memory formats", "2 6 7 8 5 9 3 3",
          channels_last=True, padding=_ONE, view="mixed", **_EPILOGUE),
    _case("bias", "the smallest epilogue", "2 3 7 6 4 10 3 3", padding=_ONE, bias=True),
    _case("residual_relu", "the end of a residual block, no bias", "2 6 8 7 5 12 3 3",
          padding=_ONE, residual=True, activation="relu"),
    _case("whole_epilogue", "bias, residual and a clip on both sides", "2 9 6 8 7 17 3 3",
          padding=_ONE, activation="relu6", **_EPILOGUE),
    _case("precise", "no Winograd, basis maps kept in float32", "2 12 8 10 9 14 3 3",
          padding=_ONE, precise=True, bias=True),
)  # fmt: skip


def _performance(n: int, c: int, k: int, size: int, q: int, *, kernel: int = 3, stride: int = 1) -> Case:
    name = f"n{n}_{c}to{k}_at{size}_q{q}"
    name += (f"_{kernel}x{kernel}" if kernel != 3 else "") + (f"_stride{stride}" if stride != 1 else "")
    problem = Conv2dProblem(
        N=n, C=c, H=size, W=size, Q=q, K=k, R=kernel, S=kernel,
        stride=(stride, stride), padding=(kernel // 2,) * 4, channels_last=True,
    )  # fmt: skip
    return Case(name, "a shape of the performance goals", problem)


PERFORMANCE_CASES: tuple[Case, ...] = (
    _performance(1, 64, 64, 56, 16),
    _performance(1, 128, 128, 28, 32),
    _performance(1, 256, 256, 14, 64),
    _performance(1, 512, 512, 7, 128),
    _performance(1, 128, 128, 56, 16),
    _performance(8, 64, 64, 56, 16),
    _performance(8, 128, 128, 28, 16),
    _performance(8, 256, 256, 14, 32),
    _performance(8, 512, 512, 7, 64),
    _performance(1, 128, 256, 28, 64, stride=2),
    _performance(1, 32, 96, 28, 24, kernel=5),
    _performance(1, 64, 64, 112, 8),
    _performance(1, 64, 64, 56, 12),
    _performance(8, 64, 64, 56, 8),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def case(name: str) -> Case:
    """The case of this name; a ValueError that lists the names where there is none."""
    for found in (*CASES, *PERFORMANCE_CASES):
        if found.name == name:
            return found
    raise ValueError(f"testing: no case has the name {name!r}; there are {', '.join(c.name for c in CASES)}")
