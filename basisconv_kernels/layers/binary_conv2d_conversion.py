"""How a ``BinaryConv2d`` comes from a dense convolution, and how it turns into bits: weights, and both its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.packed import Threshold, words_for
from basisconv_kernels.layers import conversion
from basisconv_kernels.layers.packing import PreparedWeights
from basisconv_kernels.ops.binary_conv2d_scaling import filter_scale
from basisconv_kernels.ops.bitpack import bitpack

if TYPE_CHECKING:
    from typing import Self

NAME = "BinaryConv2d"
LARGEST_CODE = 15  # of packed input with four planes
THRESHOLDS = ("threshold_value", "threshold_flip", "input_threshold_value", "input_threshold_flip")
# A function of single channels that rises everywhere or falls everywhere: [N, C, H, W] → [N, C, H, W].
Monotone = Callable[[Tensor], Tensor]


class Convertible(nn.Module):
    """The half of ``BinaryConv2d`` that converts; the other half holds the state and runs it."""

    padding_mode = "zeros"  # the only one

    in_channels: int
    out_channels: int
    kernel_size: Pair
    padding: Quad
    groups: int
    scaling: str | None
    input_scale: bool
    activation: str | None
    weight: nn.Parameter | None
    scale: Tensor | None
    bias: Tensor | None
    scale_group: Tensor | None
    input_norm: nn.BatchNorm2d | None
    words: Tensor
    threshold_value: Tensor | None
    threshold_flip: Tensor | None
    input_threshold_value: Tensor | None
    input_threshold_flip: Tensor | None
    contiguous: bool
    _prepared: PreparedWeights

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **settings: Any) -> Self:
        """A layer with the weights and the geometry of a convolution; ``settings`` as in the constructor.

        Args:
            conv (Conv2d): not changed; parametrisations are applied.

        Raises:
            ValueError: what is no plain Conv2d, or a padding mode other than zeros.
        """
        against = conversion.refusal(conv)
        if against is not None:
            raise ValueError(f"{NAME}.from_conv: conv {against}")
        geometry = conversion.geometry(conv)
        if geometry.pop("padding_mode") != "zeros":
            raise ValueError(f"{NAME}: padding_mode must be 'zeros', got {conv.padding_mode!r}; pad before the layer")
        weight, bias = conversion.dense_parameters(conv)
        trained = conversion.is_trained(conv)
        layer = cls(**geometry, bias=bias is not None, device="meta", dtype=weight.dtype, **settings)
        layer.weight = _parameter(weight, trained)
        if layer.scale_group is not None:
            layer.scale_group = settings["scale_group"].to(weight.device, torch.int64)
        if layer.scale is not None:
            layer.scale = _parameter(filter_scale(weight, layer.scale_group, len(layer.scale)), trained)
        if bias is not None:
            layer.bias = _parameter(bias, conv.bias.requires_grad if isinstance(conv.bias, Tensor) else trained)
        if layer.input_norm is not None:
            layer.input_norm.to_empty(device=weight.device)
            layer.input_norm.reset_parameters()
            layer.input_norm.requires_grad_(trained)
        return layer.train(conv.training)

    def to_plain(self, *, collapse: bool = False) -> nn.Module:
        """Always refused: PyTorch has no module that takes signs.

        Raises:
            ValueError: says so.
        """
        raise ValueError(f"{NAME}.to_plain: the layer takes the signs of its input, for which PyTorch has no module")

    # --- into bits ----------------------------------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether the layer holds bits instead of latent weights."""
        return self.words is not None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the weights in the frozen form and in a file; scales, bias and thresholds come on top."""
        R, S = self.kernel_size
        return 4 * self.out_channels * R * S * words_for(self.in_channels // self.groups)

    @torch.no_grad()
    def clip_weights(self) -> Self:
        """Clip the latent weights to [−1, 1]; after each step of the optimiser. Returns the layer."""
        if self.weight is not None:
            self.weight.clamp_(-1, 1)
        return self

    @torch.no_grad()
    def freeze(self, norm: nn.BatchNorm2d | None = None) -> Self:
        """Keep the signs of the weights as bits, 32 times smaller than float32, and forget the latent weights.

        A BatchNorm in front of the layer (``input_norm``) becomes a threshold a channel, unless ``input_scale`` needs
        its numbers. The results of eval mode stay the same bit by bit; those of float64 input up to the resolution of
        the float32 thresholds.

        Args:
            norm (BatchNorm2d, optional): the normalisation behind the layer where a sign follows it: both are folded
                into one threshold a channel and the layer gives a ``PackedTensor`` from then on. Drop both from the
                network. Not with ``input_scale``. ``pack_output`` folds more than that, ``pack_activations`` does it
                for whole networks.

        Returns:
            BinaryConv2d: this layer. Calling it again folds a ``norm`` if there is none yet.

        Raises:
            ValueError: ``norm`` cannot be folded.
        """
        if norm is not None:
            if self.activation is not None:
                raise ValueError(f"{NAME}: freeze(norm) folds a sign, which an activation in between forbids")
            if norm.num_features != self.out_channels:
                raise ValueError(f"{NAME}: norm must have {self.out_channels} channels, got {norm.num_features}")
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError(f"{NAME}: norm must have running statistics, got track_running_stats=False")
            self.pack_output(evaluated(norm))
        if self.weight is None:
            return self
        if self.input_norm is not None and not self.input_scale:
            found = self._input_threshold(self.input_norm, self.weight)
            self.input_norm = None
            self.input_threshold_value, self.input_threshold_flip = found.value, found.flip
        scale, bias, packed = self._scale(), self.bias, bitpack(self.weight)
        self._hold(packed.words, scale, bias)
        return self

    def _input_threshold(self, norm: nn.BatchNorm2d, like: Tensor) -> Threshold:
        run, largest = evaluated(norm), torch.finfo(like.dtype).max

        def positive(numbers: Tensor) -> Tensor:
            # Numbers that the dtype does not hold never come; as infinities they would turn into NaN.
            finite = numbers.clamp(-largest, largest)
            return run(finite.to(like.dtype)[None, :, None, None])[0, :, 0, 0] >= 0

        return Threshold.of(positive, self.in_channels, like.device, torch.float32)

    def pack_output(self, *then: Monotone) -> Self:
        """Give the signs of what follows as a ``PackedTensor`` from now on, by one comparison a channel.

        Args:
            then: what follows the layer, in order, for instance its BatchNorm and ReLU in eval mode; run on every
                channel's whole numbers to find where the sign turns, so that the bits are those of these modules
                themselves, rounding included.

        Returns:
            BinaryConv2d: this layer. Scales, bias and activation are part of the comparison and forgotten, once the
            layer is frozen.

        Raises:
            ValueError: ``input_scale`` changes the sums from pixel to pixel, and its signs stay as they are: no bias.
        """
        if self.input_scale:
            raise ValueError(f"{NAME}: freeze(norm) folds a sign, which input_scale in between forbids")
        if self.threshold_value is not None:
            raise ValueError(f"{NAME}: the layer gives bits already; what follows cannot be folded again")
        R, S = self.kernel_size
        most = min(LARGEST_CODE * self.in_channels // self.groups * R * S, 2**31 - 1)
        like = next((t for t in (self.weight, self.scale, self.bias) if t is not None), self.words)
        with torch.no_grad():
            scale = self._scale()
            if scale is not None and self.scale_group is not None:
                scale = scale[self.scale_group]

            def positive(sums: Tensor) -> Tensor:
                values = self._epilogue(sums, scale, like.dtype if like.is_floating_point() else torch.float32)
                for step in then:
                    values = step(values)
                return values[0, :, 0, 0] >= 0

            found = Threshold.of(positive, self.out_channels, like.device, torch.int32, most=most)
        self.threshold_value, self.threshold_flip = found.value, found.flip
        if self.frozen:
            self._hold(self.words, None, None)
        return self

    def _epilogue(self, sums: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The float result [1, K, 1, 1] of sums [K], with the roundings of ``binary_conv2d``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = sums.to(wide)
        if scale is not None:
            values = values * scale.to(wide)
        if self.bias is not None:
            values = values + self.bias.to(wide)
        if self.activation is not None:
            values = values.clamp(min=0, max=6 if self.activation == "relu6" else None)
        return values.to(dtype)[None, :, None, None]

    def take_bits(self, *, contiguous: bool = False) -> Self:
        """Forget the BatchNorm in front, which the layer before has folded into its own bits. Returns the layer.

        Args:
            contiguous (bool): lay float results out as NCHW, as they were behind real maps of that layout, so that
                sums over them are added up in the same order; packed words alone would give channels_last.
        """
        self.input_norm = None
        self.input_threshold_value = self.input_threshold_flip = None
        self.contiguous = contiguous
        return self

    def _scale(self) -> Tensor | None:
        """α, one a filter or a group of filters; None without scaling."""
        if self.scaling == "mean" and self.weight is not None:
            return filter_scale(self.weight, self.scale_group)
        return self.scale

    def _hold(self, words: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """The frozen form; what a comparison holds already is left out."""
        if self.threshold_value is not None:
            scale = bias = self.scale_group = None
        for name in ("weight", "scale", "bias"):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        self.weight = None
        self.register_buffer("scale", None if scale is None else scale.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.words = words
        self._prepared.clear()

    def hold_bits(self, *, output: bool, input: bool) -> Self:
        """Take the frozen form without values of its own, for a loader that brings them. Returns the layer.

        Args:
            output, input: whether there are thresholds behind and in front of the layer.
        """
        like = self.weight if self.weight is not None else self.words
        at = like.device
        for names, channels, kind, wanted in (
            (THRESHOLDS[:2], self.out_channels, torch.int32, output),
            (THRESHOLDS[2:], self.in_channels, torch.float32, input),
        ):
            value, flip = (torch.zeros(channels, dtype=dtype, device=at) for dtype in (kind, torch.bool))
            setattr(self, names[0], value if wanted else None)
            setattr(self, names[1], flip if wanted else None)
        if not self.input_scale:
            self.input_norm = None
        words = (self.out_channels, 1, *self.kernel_size, words_for(self.in_channels // self.groups))
        with torch.no_grad():
            scale = self._scale()
        self._hold(torch.zeros(words, dtype=torch.int32, device=at), scale, self.bias)
        return self


def evaluated(module: nn.Module) -> nn.Module:
    """A copy in eval mode, to be run without touching statistics."""
    return copy.deepcopy(module).eval()


def _parameter(value: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=trained)
