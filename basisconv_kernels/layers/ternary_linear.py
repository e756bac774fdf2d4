"""``TernaryLinear``: a linear layer with ternary weights, run as the op ``ternary_conv2d`` on a map of one column."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels.layers.conversion import foreign_hooks
from basisconv_kernels.layers.ternary import TernaryLayer
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d

NAME = "TernaryLinear"


class TernaryLinear(TernaryLayer):
    """A drop-in for ``torch.nn.Linear`` with weights −σ, 0 and +σ.

    ``out = input · (scale·plus − negative_scale·minus)ᵀ + bias``

    Args:
        in_features, out_features, bias: as in Linear.
        rule, scale_per_output, threshold, backend, device, dtype, generator: as in ``TernaryConv2d``.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.ternary_linear import TernaryLinear
        >>> layer = TernaryLinear(64, 10).eval()
        >>> layer(torch.randn(5, 7, 64)).shape
        torch.Size([5, 7, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rule: str = "twn",
        scale_per_output: bool = False,
        threshold: float | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{NAME}: {name} must be an int of at least 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self._set_up(
            (out_features, in_features), rule=rule, scale_per_output=scale_per_output, threshold=threshold, bias=bias,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rule: str = "twn",
        mask: Tensor | None = None,
        scale_per_output: bool = False,
        threshold: float | None = None,
    ) -> TernaryLinear:
        """A layer whose shadow is the weight of a Linear; arguments as for ``TernaryConv2d.from_conv``."""
        against = linear_refusal(linear)
        if against is not None:
            raise ValueError(f"{NAME}.from_linear: the module {against}")
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        layer = cls(
            linear.in_features, linear.out_features, bias=bias is not None, rule=rule,
            scale_per_output=scale_per_output, threshold=threshold, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.take(weight, bias, mask, trained=linear.weight.requires_grad)
        return layer.train(linear.training)  # type: ignore[return-value]

    def to_linear(self) -> nn.Linear:
        """The Linear with the scaled weight."""
        with torch.no_grad():
            weight = self.dense_weight()
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def to_plain(self, *, collapse: bool = False) -> nn.Module:
        """``to_linear``, under the name that all layers have."""
        return self.to_linear()

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer on ``input`` [..., in_features]."""
        if isinstance(input, Tensor) and input.shape[-1:] != (self.in_features,):
            raise ValueError(f"{NAME}: input must be [..., in_features = {self.in_features}], got {list(input.shape)}")
        if self._needs_shadow_gradients():
            return F.linear(input, self.dense_weight(), self.bias)
        planes, scale, second, packed = self._operands()
        rows = input.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return rows.new_empty(*input.shape[:-1], self.out_features)
        # [M, C] read as [1, C, M, 1]: the same memory, channels_last.
        maps = rows[None, :, None].permute(0, 3, 1, 2)
        out = ternary_conv2d(
            maps, planes, scale, self.bias, negative_scale=second, backend=self.backend, packed=packed
        )  # fmt: skip
        return out[0, :, :, 0].mT.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        form = "packed" if self.is_packed else "trained"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rule={self.rule!r}, {form}"


def linear_refusal(module: nn.Module) -> str | None:
    """Why a module cannot become a ternary linear layer, in words; None when it can."""
    if not isinstance(module, nn.Linear):
        return f"is a {type(module).__name__}, not a Linear"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, a subclass of Linear whose forward may differ"
    if foreign_hooks(module) or module._forward_pre_hooks:
        return "carries hooks, which a conversion would lose"
    return None
