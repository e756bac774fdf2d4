"""``BinaryConv2d``: the layer of the op ``binary_conv2d``, with real latent weights to train and bits to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.core.packed import PackedTensor, Threshold, words_for
from basisconv_kernels.layers.binary_conv2d_conversion import NAME, THRESHOLDS, Convertible
from basisconv_kernels.layers.packing import Prepared, PreparedWeights, held
from basisconv_kernels.ops.binary_conv2d import binary_conv2d
from basisconv_kernels.ops.binary_conv2d_native import binary_conv2d_pack
from basisconv_kernels.ops.binary_conv2d_scaling import filter_scale, magnitude_map
from basisconv_kernels.ops.bitpack import bitpack
from basisconv_kernels.reference.binary_conv2d import ESTIMATORS

SCALINGS = (None, "mean", "learned")


class BinaryConv2d(Convertible):
    """Convolution of signs with signs, in the place of a ``torch.nn.Conv2d``.

    ``out = act(scale·conv2d(sign(norm(input)), sign(weight))·magnitudes + bias)``, ``norm`` only if ``input_norm``,
    ``magnitudes`` only if ``input_scale``.

    Args:
        in_channels, out_channels, kernel_size: as in Conv2d; C, K and (R, S).
        stride, padding, dilation, groups: as in Conv2d; padding also (top, bottom, left, right).
        bias (bool): a learnable offset [K]; off by default, since a BatchNorm follows as a rule.
        padding_value (0, 1 or -1): what the padding counts as.
        scaling (None, "mean" or "learned"): "mean": α = mean |weight| of each filter, XNOR-Net's; "learned": a
            parameter that starts there; None: none, for a BatchNorm behind the layer absorbs positive scales.
        scale_group (Tensor[K], optional): int64; filters of one number share one scale.
        input_scale (bool): multiply with ``magnitude_map`` of the input, the spatial scales of XNOR-Net's paper; real
            inputs and ``groups=1`` only.
        input_norm (bool): a BatchNorm of the C input channels in front of the sign, as in XNOR-Net's blocks; behind a
            ReLU, without it, all signs would be +1. Real inputs only; ``freeze()`` makes a threshold a channel of it.
        activation (None, "relu" or "relu6"): applied last.
        estimator (str or pair): of the gradients of input and weight, see ``binary_conv2d``.
        backend: as in ``binary_conv2d``.
        device, dtype: of the weights.

    State (keys of the state_dict):
        ``weight`` [K, C/G, R, S]: a Parameter, the real numbers behind the signs; keep them within ±1 with
        ``clip_weights()`` after each step of the optimiser, or their gradient stays zero (with the estimator "clip").
        ``scale`` [K] or [scale groups]: a Parameter, only with ``scaling="learned"``.
        ``bias`` [K]: a Parameter, absent with ``bias=False``.
        ``scale_group`` [K]: a buffer, only where given.
        ``input_norm.*``: of a BatchNorm2d, only with ``input_norm``.
        After ``freeze()`` buffers instead: ``words`` (int32), ``scale``, ``bias``, ``input_threshold_value`` [C]
        (float32) and ``input_threshold_flip`` [C] (bool) in the place of ``input_norm``; only what there is. A layer
        that gives bits has ``threshold_value`` [K] (int32) and ``threshold_flip`` [K] (bool) in the place of ``scale``,
        ``scale_group`` and ``bias``. A state with ``words`` freezes the layer that loads it.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names both sides and the way out.

    Source: Rastegari, Ordonez, Redmon, Farhadi 2016, arXiv 1603.05279.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
        >>> layer = BinaryConv2d(64, 128, 3, padding=1)
        >>> layer(torch.randn(1, 64, 28, 28)).shape
        torch.Size([1, 128, 28, 28])
        >>> layer.freeze().words.shape
        torch.Size([128, 1, 3, 3, 2])
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
        bias: bool = False,
        padding_value: int = 0,
        scaling: str | None = "mean",
        scale_group: Tensor | None = None,
        input_scale: bool = False,
        input_norm: bool = False,
        activation: str | None = None,
        estimator: str | tuple[str, str] = "clip",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{NAME}: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{NAME}: {name} must be at least 1, got {value}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(f"{NAME}: {name} must be divisible by groups = {groups}, got {value}")
        if scaling not in SCALINGS:
            raise ValueError(f"{NAME}: scaling must be None, 'mean' or 'learned', got {scaling!r}")
        if scale_group is not None and scaling is None:
            raise ValueError(f"{NAME}: scale_group needs scaling='mean' or 'learned', got None")
        if scale_group is not None and tuple(scale_group.shape) != (out_channels,):
            raise ValueError(f"{NAME}: scale_group must be [K] = [{out_channels}], got {list(scale_group.shape)}")
        if input_scale and groups > 1:
            raise ValueError(f"{NAME}: input_scale is a mean over all channels and needs groups=1, got {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = checks.pair(NAME, "kernel_size", kernel_size, at_least=1)
        self.stride = checks.pair(NAME, "stride", stride, at_least=1)
        self.dilation = checks.pair(NAME, "dilation", dilation, at_least=1)
        self.padding = checks.padding4(NAME, padding, self.kernel_size, self.stride, self.dilation)
        if padding_value not in (-1, 0, 1):
            raise ValueError(f"{NAME}: padding_value must be 0, 1 or -1, got {padding_value!r}")
        checks.activation(NAME, activation)
        pair = (estimator, estimator) if isinstance(estimator, str) else tuple(estimator)
        if len(pair) != 2 or not set(pair) <= set(ESTIMATORS):
            raise ValueError(f"{NAME}: estimator must be of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
        self.padding_value, self.scaling, self.input_scale = padding_value, scaling, input_scale
        self.activation, self.estimator, self.backend = activation, (pair[0], pair[1]), backend
        self.contiguous = False
        self._prepared = PreparedWeights()

        kind = {"device": device, "dtype": dtype}
        self.weight: nn.Parameter | None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **kind))
        self.bias: Tensor | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **kind)) if bias else None)
        self.scale_group: Tensor | None
        self.register_buffer("scale_group", None if scale_group is None else scale_group.to(device, torch.int64))
        self.scale_groups = None if scale_group is None else int(scale_group.max()) + 1
        scales = self.scale_groups or out_channels
        self.scale: Tensor | None
        self.register_parameter("scale", nn.Parameter(torch.empty(scales, **kind)) if scaling == "learned" else None)
        self.input_norm = nn.BatchNorm2d(in_channels, **kind) if input_norm else None
        for name in ("words", *THRESHOLDS):
            self.register_buffer(name, None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the latent weights as Conv2d does, scales from them, a bias of zero."""
        if self.weight is None or self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.scale is not None:
            self.scale.copy_(filter_scale(self.weight, self.scale_group, len(self.scale)))
        if self.bias is not None:
            self.bias.zero_()

    # --- the call -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor | PackedTensor, output: str | None = None) -> Any:
        """Run the layer.

        Args:
            input (Tensor[N, C, H, W] or PackedTensor): real numbers, whose sign is taken, or packed signs or codes.
            output (str, optional): as in ``binary_conv2d``; None is "float", or "packed" after ``freeze(norm)``.

        Returns:
            Tensor[N, K, OH, OW] or PackedTensor.
        """
        threshold, value = None, held(self, "threshold_value")
        if output is None:
            output = "float" if value is None else "packed"
        if output == "float" and value is not None and self.frozen:
            raise ValueError(
                f"{NAME}: output must be 'packed' or 'int32', for the layer gives bits and keeps no scales, got 'float'"
            )
        if output == "packed" and value is not None and self.threshold_flip is not None:
            threshold = Threshold(value, self.threshold_flip)
        bits_of_input = held(self, "input_threshold_value") is not None
        input = self._normalised(input, bits_of_input)
        weight, scale, packed = self._weights()
        settings: dict[str, Any] = {}
        if output == "float":
            settings = {"scale": scale, "bias": held(self, "bias"), "activation": self.activation}
            settings["scale_group"] = None if scale is None else held(self, "scale_group")
            if self.input_scale:
                settings["pixel_scale"] = self._magnitudes(input)
        result = binary_conv2d(
            self._signs(input) if bits_of_input else input,
            weight,
            stride=self.stride,
            padding=self.padding,
            padding_value=self.padding_value,
            dilation=self.dilation,
            groups=self.groups,
            threshold=threshold,
            output=output,
            estimator=self.estimator,
            backend=self.backend,
            packed=packed,
            **settings,
        )
        if isinstance(result, PackedTensor):
            return result
        if bits_of_input and isinstance(input, Tensor):  # its bits do not tell its layout
            return laid_out(result, memory_format(input))
        return result.contiguous() if self.contiguous and isinstance(input, PackedTensor) else result

    def _normalised(self, input: Any, bits_of_input: bool) -> Any:
        """The input behind ``input_norm``."""
        norm = self._modules.get("input_norm")
        if isinstance(input, PackedTensor) and (norm is not None or bits_of_input):
            raise TypeError(f"{NAME}: input_norm needs a real input, got a PackedTensor; see pack_activations")
        return input if norm is None else norm(input)

    def _signs(self, input: Any) -> Any:
        """Bits, where a threshold stands for ``input_norm``."""
        if self.input_threshold_value is None or self.input_threshold_flip is None:
            return input
        return bitpack(input, threshold=Threshold(self.input_threshold_value, self.input_threshold_flip))

    def _magnitudes(self, input: Tensor | PackedTensor) -> Tensor:
        if isinstance(input, PackedTensor):
            raise TypeError(f"{NAME}: input_scale needs the magnitudes of a real input, got a PackedTensor")
        return magnitude_map(
            input, self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation
        )  # fmt: skip

    def _weights(self) -> tuple[Tensor | PackedTensor, Tensor | None, Tensor | None]:
        """(weight, scale, packed for the kernel); the last two remembered in eager calls that need no gradient."""
        weight: Tensor | PackedTensor
        real = held(self, "weight")
        if real is None:
            weight = PackedTensor(self.words, self.in_channels // self.groups)
            sources: tuple[Tensor, ...] = (self.words,)
        else:
            weight, sources = real, (real,)
        training = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if training:
            return weight, self._scale(), None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # in the graph, where freezing folds it
            return weight, self._scale(), binary_conv2d_pack(weight, groups=self.groups)
        # ``Prepared.coefficients`` is the one place for numbers made of weights: here the scales.
        mean = self.scaling == "mean" and real is not None

        def build() -> Prepared:
            return Prepared(self._scale() if mean else None, None, binary_conv2d_pack(weight, groups=self.groups))

        kept = self._prepared.get(sources, (mean, self.groups), build)
        return weight, kept.coefficients if mean else held(self, "scale"), kept.packed

    def repack(self) -> BinaryConv2d:
        """Forget what was derived from the weights; after edits that PyTorch does not see. Returns the layer."""
        self._prepared.clear()
        return self

    def train(self, mode: bool = True) -> BinaryConv2d:
        """As in every module; remembered packed weights are forgotten."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryConv2d:
        self._prepared.clear()  # or the old copy of the weights would live on beside the converted one
        words = self._buffers.get("words")
        if words is None:
            return super()._apply(fn, recurse)
        # Flat meanwhile: ``to(memory_format=torch.channels_last)`` takes no tensors of five dimensions.
        self._buffers["words"] = words.reshape(-1)
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers["words"] = self.words.view(words.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Accept the state of a frozen layer, after checks of its bits."""
        words = state_dict.get(prefix + "words")
        if words is not None:
            found = PackedTensor(words, self.in_channels // self.groups).check_padding()
            expected = (self.out_channels, 1, *self.kernel_size, words_for(found.channels))
            if tuple(words.shape) != expected:
                raise ValueError(f"{NAME}: words must be {list(expected)}, got {list(words.shape)}")
            self.hold_bits(
                output=f"{prefix}threshold_value" in state_dict, input=f"{prefix}input_threshold_value" in state_dict
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._prepared.clear()

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        shown += [f"stride={self.stride}"] if self.stride != (1, 1) else []
        shown += [f"padding={self.padding}"] if any(self.padding) else []
        shown += [f"padding_value={self.padding_value}"] if self.padding_value else []
        shown += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        shown += [f"groups={self.groups}"] if self.groups != 1 else []
        shown += [f"scaling={self.scaling!r}"] + (["input_scale=True"] if self.input_scale else [])
        shown += ["input_norm=True"] if self.input_norm is not None else []
        shown += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join([*shown, "frozen"] if self.frozen else shown)
