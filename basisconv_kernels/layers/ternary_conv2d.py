"""``TernaryConv2d``: the layer of the op ``ternary_conv2d``, in the place of a ``torch.nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import conv2d, laid_out, memory_format
from basisconv_kernels.layers import conversion, folding
from basisconv_kernels.layers.packing import held
from basisconv_kernels.layers.ternary import SOURCES, TernaryLayer
from basisconv_kernels.ops import ternary_conv2d_planned as planned
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d

NAME = "TernaryConv2d"
# What a call depends on beside its input.
REMEMBERED = (
    "stride", "pad_amounts", "padding_mode", "dilation", "groups", "activation", "backend", "rule", "threshold", "bias",
    *SOURCES,
)  # fmt: skip


class TernaryConv2d(TernaryLayer):
    """Convolution with weights −σ, 0 and +σ, a drop-in for ``torch.nn.Conv2d``.

    ``out = act(conv2d(input, scale·plus − negative_scale·minus) + bias)``

    In training the layer runs as an ordinary convolution with the ternary weight of its float shadow, whose gradient
    passes straight through; without gradients it is one call of ``ternary_conv2d``. ``pack()`` drops the shadow.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in Conv2d;
            padding also (top, bottom, left, right).
        rule ("twn", "ttq" or "layerwise"): how the shadow weight becomes ternary; see ``layers.ternary_weights``.
        scale_per_output (bool): a scale for each output instead of one for the layer; TWN always has one each.
        threshold (float, optional): Δ as a share of the mean |w| of a filter (TWN, default 0.75) or of the largest |w|
            (TTQ, default 0.05).
        activation (None, "relu" or "relu6"): applied last.
        backend: as in ``ternary_conv2d``.
        device, dtype: of the weights.
        generator (torch.Generator, optional): where initial values are drawn from.

    State: see ``TernaryLayer``.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
        >>> layer = TernaryConv2d(16, 32, 3, padding=1, rule="twn").eval()
        >>> image = torch.randn(1, 16, 8, 8)
        >>> with torch.no_grad():
        ...     before = layer(image)
        ...     after = layer.pack()(image)
        >>> torch.equal(before, after), sorted(layer.state_dict())
        (True, ['bias', 'scale', 'weight_code'])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | Quad | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        rule: str = "twn",
        scale_per_output: bool = False,
        threshold: float | None = None,
        activation: str | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{NAME}: {name} must be an int of at least 1, got {value!r}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{NAME}: in_channels and out_channels must be divisible by groups = {groups}, got {in_channels} and "
                f"{out_channels}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = checks.pair(NAME, "kernel_size", kernel_size, at_least=1)
        self.stride = checks.pair(NAME, "stride", stride, at_least=1)
        self.dilation = checks.pair(NAME, "dilation", dilation, at_least=1)
        self.pad_amounts = checks.padding4(NAME, padding, self.kernel_size, self.stride, self.dilation)
        top, bottom, left, right = self.pad_amounts
        symmetric = (top, left) if (top, left) == (bottom, right) else self.pad_amounts
        self.padding: str | Pair | Quad = padding if isinstance(padding, str) else symmetric
        checks.activation(NAME, activation)
        if padding_mode not in conversion.PADDING_MODES:
            modes = ", ".join(conversion.PADDING_MODES)
            raise ValueError(f"{NAME}: padding_mode must be one of {modes}, got {padding_mode!r}")
        self.padding_mode, self.activation = padding_mode, activation
        self._set_up(
            (out_channels, in_channels // groups, *self.kernel_size), rule=rule, scale_per_output=scale_per_output,
            threshold=threshold, bias=bias, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.reset_parameters(generator)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        rule: str = "twn",
        mask: Tensor | None = None,
        scale_per_output: bool = False,
        threshold: float | None = None,
    ) -> TernaryConv2d:
        """A layer whose shadow is the weight of a convolution, with fitted scales.

        Args:
            conv (Conv2d): stays as it is; parametrisations are applied.
            mask (Tensor[K, C/groups, R, S], bool, optional): for ``"layerwise"``: the weights that are not 0 for ever;
                default: those that are not exactly 0 now.

        Raises:
            ValueError: the module is no plain Conv2d, or the mask does not fit.
        """
        against = conversion.refusal(conv)
        if against is not None:
            raise ValueError(f"{NAME}.from_conv: the module {against}")
        weight, bias = conversion.dense_parameters(conv)
        # Built without values: initial ones would draw from the user's random numbers.
        layer = cls(
            **conversion.geometry(conv), bias=bias is not None, rule=rule, scale_per_output=scale_per_output,
            threshold=threshold, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.take(weight, bias, mask, trained=conversion.is_trained(conv))
        return layer.train(conv.training)  # type: ignore[return-value]

    def to_conv(self) -> nn.Conv2d:
        """The Conv2d with the scaled weight; a ValueError where it has no such padding or activation."""
        padding = conversion.conv_padding(self.padding)
        if padding is None or self.activation is not None:
            raise ValueError(f"{NAME}.to_conv: Conv2d has neither asymmetric padding nor an activation; use to_plain()")
        return self._conv(padding=padding, padding_mode=self.padding_mode)

    def to_plain(self, *, collapse: bool = False) -> nn.Module:
        """Ordinary modules that equal the layer: a convolution, with a padding before or an activation behind it."""
        padding: Any = conversion.conv_padding(self.padding)
        stages: list[nn.Module] = []
        mode = self.padding_mode
        if padding is None:
            stages.append(conversion.pad_module(self.pad_amounts, mode))
            padding, mode = 0, "zeros"
        stages.append(self._conv(padding=padding, padding_mode=mode))
        if self.activation is not None:
            stages.append(nn.ReLU() if self.activation == "relu" else nn.ReLU6())
        return (stages[0] if len(stages) == 1 else nn.Sequential(*stages)).train(self.training)

    def _conv(self, **spatial: Any) -> nn.Conv2d:
        with torch.no_grad():
            weight = self.dense_weight()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, stride=self.stride, dilation=self.dilation,
            groups=self.groups, bias=self.bias is not None, device="meta", **spatial,
        )  # fmt: skip
        conv.weight = nn.Parameter(weight.detach().clone())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    @torch.no_grad()
    def fold(self, norm: nn.Module) -> TernaryConv2d:
        """Absorb the BatchNorm behind the layer, in place, with its running statistics; drop it from the network then.

        ``scale' = g·scale, bias' = g·bias + e`` with ``g = γ/√(var + ε), e = β − mean·g``: the weights stay ternary.

        Raises:
            ValueError: the layer is not packed, an activation stands in between, or the BatchNorm does not fit.
        """
        if not self.is_packed or self.activation is not None or self.scale is None:
            raise ValueError(
                f"{NAME}.fold: the layer must be packed and have no activation of its own; call pack() first"
            )
        factor, offset = folding.scale_and_offset(norm)
        if factor.shape[0] != self.out_channels:
            raise ValueError(
                f"{NAME}.fold: norm must have out_channels = {self.out_channels} channels, got {factor.shape[0]}"
            )
        for name in ("scale", "negative_scale"):
            held = getattr(self, name)
            if held is not None:
                folded = (held.to(factor.dtype) * factor).to(held.dtype)
                setattr(self, name, nn.Parameter(folded, requires_grad=held.requires_grad))
        old = torch.zeros_like(offset) if self.bias is None else self.bias.to(offset.dtype)
        trained = self.scale.requires_grad if self.bias is None else self.bias.requires_grad
        self.bias = nn.Parameter((factor * old + offset).to(self.scale.dtype), requires_grad=trained)
        self.scale_per_output = True
        self._prepared.clear()
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer on ``input`` [N, C, H, W] or [C, H, W]."""
        if not is_dynamo_compiling() and (known := self._prepared.repeat(self, input)) is not None:
            return known
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        if isinstance(input, Tensor) and input.dim() == 4 and input.shape[1] != self.in_channels:
            # The op cannot know: planes are words, whose last bits stand for no channel.
            raise ValueError(
                f"{NAME}: input must have in_channels = {self.in_channels} channels, got {list(input.shape)}"
            )
        padding, given = self.pad_amounts, input
        if self.padding_mode != "zeros" and any(padding):
            top, bottom, left, right = padding
            layout = memory_format(input)
            input = laid_out(F.pad(input, (left, right, top, bottom), mode=self.padding_mode), layout)
            padding = (0, 0, 0, 0)
        if self._needs_shadow_gradients():
            return self._dense(input, padding)
        planes, scale, second, packed = self._operands()
        out = ternary_conv2d(
            input,
            planes,
            scale,
            held(self, "bias"),
            negative_scale=second,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            backend=self.backend,
            packed=packed,
        )
        if packed is not None and input is given and not torch.compiler.is_compiling():
            self._remember_call(planes, scale, second, packed)
        return out

    def _remember_call(self, planes: Tensor, scale: Tensor, second: Tensor | None, packed: Tensor) -> None:
        """Let calls like the one just made go the short way, where the op did."""
        geometry = (self.stride, self.pad_amounts, self.dilation, self.groups)
        call = (packed, (*geometry, self.activation, self.backend))
        tensors = (None, planes, scale, second, held(self, "bias"))
        self._prepared.remember(self, planned.plans, call, tensors, holes=(0,), depends_on=REMEMBERED)

    def _dense(self, input: Tensor, padding: Quad) -> Tensor:
        """The layer as a convolution of PyTorch, whose weight gradient reaches the shadow."""
        top, bottom, left, right = padding
        if (top, left) != (bottom, right):
            input = F.pad(input, (left, right, top, bottom))
            top = left = 0
        weight = self.dense_weight()
        out = conv2d(input, weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        if self.activation is None:
            return out
        return F.relu(out) if self.activation == "relu" else F.relu6(out)

    def extra_repr(self) -> str:
        """The constructor's arguments, defaults left out."""
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        shown += [f"padding={self.padding!r}"] if any(self.pad_amounts) else []
        shown += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        shown += [f"groups={self.groups}"] if self.groups > 1 else []
        shown += ["bias=False"] if self.bias is None else []
        shown += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join([*shown, f"rule={self.rule!r}", "packed" if self.is_packed else "trained"])
