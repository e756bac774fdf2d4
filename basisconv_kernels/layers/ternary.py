"""What ``TernaryConv2d`` and ``TernaryLinear`` share: float weights while training, packed ones afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from basisconv_kernels.layers import ternary_code, ternary_weights
from basisconv_kernels.layers.packing import PreparedWeights, held
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.reference.ternary_conv2d import pack_planes, unpack_weight


class Operands(NamedTuple):
    """What the op takes of a layer."""

    planes: Tensor
    scale: Tensor
    negative_scale: Tensor | None
    packed: Tensor | None


SOURCES = ("weight", "mask", "scale", "negative_scale", "planes")  # what the operands of the op are made of


class TernaryLayer(nn.Module):
    """A layer with weights −1, 0, +1 times one or two scales, in one of two forms.

    *Trained*: a float shadow weight, from which every call in training makes the ternary one
    (``layers.ternary_weights``). *Packed*: the shadow is gone; ``weight_code`` holds the ternary weight as a file does,
    a few bits each, and scales and bias alone can still be trained. ``pack()`` goes from the first to the second.

    State (keys of the state_dict):
        trained: ``weight`` [K, …]; ``mask`` (bool) with the rule ``"layerwise"``; ``scale`` [1] or [K] but with
        ``"twn"``, whose scale follows from the weight; ``negative_scale`` with ``"ttq"``; ``bias`` [K].
        packed: ``weight_code`` [bytes] (uint8); ``scale``, ``negative_scale``, ``bias``.
    """

    weight: nn.Parameter | None
    mask: Tensor | None
    scale: nn.Parameter | None
    negative_scale: nn.Parameter | None
    bias: nn.Parameter | None
    weight_code: Tensor | None
    planes: Tensor | None
    groups: int = 1

    def _set_up(
        self,
        shape: tuple[int, ...],
        *,
        rule: str,
        scale_per_output: bool,
        threshold: float | None,
        bias: bool,
        backend: str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """The state of the trained form, without values; ``shape`` is that of the weight."""
        name = type(self).__name__
        if rule not in ternary_weights.RULES:
            raise ValueError(f"{name}: rule must be one of {', '.join(ternary_weights.RULES)}, got {rule!r}")
        self.rule = rule
        self.threshold = ternary_weights.THRESHOLDS[rule] if threshold is None else float(threshold)
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"{name}: threshold must be a number of at least 0, got {threshold!r}")
        self.scale_per_output = scale_per_output or rule == "twn"
        self.backend = backend
        self.weight_shape = shape
        self.encoding: ternary_code.Encoded | None = None
        self._prepared = PreparedWeights()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        count = shape[0] if self.scale_per_output else 1
        self.weight = nn.Parameter(torch.empty(shape, **kind))
        masked = torch.ones(shape, dtype=torch.bool, device=device) if rule == "layerwise" else None
        self.register_buffer("mask", masked)
        self.register_parameter("scale", None if rule == "twn" else nn.Parameter(torch.empty(count, **kind)))
        second = nn.Parameter(torch.empty(count, **kind)) if rule == "ttq" else None
        self.register_parameter("negative_scale", second)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **kind)) if bias else None)
        self.register_buffer("weight_code", None)
        self.register_buffer("planes", None, persistent=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a float weight as PyTorch's own layers do, uniform within 1/√D, and fit the scales; the bias is 0."""
        weight = self._shadow()
        if weight.is_meta:
            return
        limit = weight[0].numel() ** -0.5
        device = "cpu" if generator is None else generator.device
        weight.copy_((torch.rand(weight.shape, generator=generator, device=device) * 2 - 1) * limit)
        if self.mask is not None:
            self.mask.fill_(True)
        if self.bias is not None:
            self.bias.zero_()
        self.fit_scales()

    def take(self, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *, trained: bool) -> None:
        """Become the trained form of a dense layer's values, which are copied; scales are fitted.

        Args:
            weight, bias: of the dense layer, bias only where this layer has one.
            mask (bool, optional): as in ``TernaryConv2d.from_conv``.
            trained (bool): whether weight and scales shall ask for gradients.
        """
        self.weight = nn.Parameter(weight.clone(), requires_grad=trained)
        if self.mask is not None:
            kept = weight != 0 if mask is None else mask
            if kept.shape != weight.shape:
                raise ValueError(
                    f"{type(self).__name__}: mask must be {list(weight.shape)} like the weight, got {list(kept.shape)}"
                )
            self.mask = kept.to(weight.device, torch.bool, copy=True)
        elif mask is not None:
            raise ValueError(f"{type(self).__name__}: mask goes with rule='layerwise', got rule={self.rule!r}")
        for name in ("scale", "negative_scale"):
            held = getattr(self, name)
            if held is not None:
                made = torch.empty_like(held, device=weight.device)
                setattr(self, name, nn.Parameter(made, requires_grad=trained))
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=trained)
        self.fit_scales()

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def is_packed(self) -> bool:
        """Whether the float shadow weight is gone."""
        return self.weight is None

    @torch.no_grad()
    def ternary(self) -> Tensor:
        """The weights −1, 0, +1 (int8), in the shape of the dense layer's weight."""
        if self.weight is not None:
            return ternary_weights.codes(self.weight, self.mask, self.rule, self.threshold).to(torch.int8)
        return unpack_weight(self._planes(), self.weight_shape[1], torch.int8).reshape(self.weight_shape)

    @property
    def density(self) -> float:
        """Share of the weights that are not 0."""
        found = self.ternary()
        return int((found != 0).sum()) / found.numel()

    @torch.no_grad()
    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(σ or α or Wp, Wn or None), each [1] or [K], as they count.

        Trained ones are never 0 or below; those of TWN are 0 for an output without weights. A packed layer may have
        taken in a BatchNorm, whose factor may be negative: its scales count as they are.
        """
        if self.scale is None:
            found = ternary_weights.codes(self._shadow(), self.mask, self.rule, self.threshold)
            return ternary_weights.least_squares_scale(self._shadow(), found, per_output=True), None
        second = self.negative_scale
        if self.weight is None:
            return self.scale.detach(), None if second is None else second.detach()
        return ternary_weights.at_least(self.scale), None if second is None else ternary_weights.at_least(second)

    @torch.no_grad()
    def fit_scales(self) -> TernaryLayer:
        """Set trained scales to the least-squares values of the shadow weight; Wp and Wn each for its sign."""
        if self.scale is not None and self.weight is not None:
            found = ternary_weights.codes(self.weight, self.mask, self.rule, self.threshold)
            halves = [found] if self.negative_scale is None else [found.clamp(min=0), found.clamp(max=0)]
            for scale, half in zip((self.scale, self.negative_scale), halves, strict=False):
                if scale is not None:
                    fitted = ternary_weights.least_squares_scale(self.weight, half, per_output=self.scale_per_output)
                    scale.copy_(ternary_weights.at_least(fitted))
        return self

    def dense_weight(self) -> Tensor:
        """The weight that the layer stands for; differentiable in the trained form, straight through."""
        if self.weight is not None:
            arguments = (self.mask, self.scale, self.negative_scale, self.rule, self.threshold)
            return ternary_weights.TernaryWeight.apply(self.weight, *arguments)[0]
        scale, second = self.scales()
        found = self.ternary().to(scale.dtype)
        plus = found * ternary_weights.spread(scale, found)
        return plus if second is None else torch.where(found < 0, found * ternary_weights.spread(second, found), plus)

    def _shadow(self) -> Tensor:
        if self.weight is None:
            raise ValueError(f"{type(self).__name__}: the layer is packed, its float weight is gone")
        return self.weight

    def _planes(self) -> Tensor:
        if self.planes is None:
            raise ValueError(f"{type(self).__name__}: the layer has no values yet; load its state first")
        return self.planes

    def _needs_shadow_gradients(self) -> bool:
        """Whether this call trains the shadow weight, which the op itself has no gradient for."""
        if not torch.is_grad_enabled() or self.weight is None:
            return False
        return any(t is not None and t.requires_grad for t in (self.weight, self.scale, self.negative_scale))

    def _operands(self) -> Operands:
        """The op's arguments; remembered in eager calls, as in ``BasisConv2d``."""
        if torch.is_grad_enabled() and self.weight is None:
            planes, scale, second = self._planes(), self.scale, self.negative_scale
            if scale is not None and (scale.requires_grad or (second is not None and second.requires_grad)):
                return Operands(planes, scale, second, None)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._prepare()  # in the graph, where freezing folds it
        sources = tuple([t for name in SOURCES if (t := held(self, name)) is not None])
        return self._prepared.get(sources, (self.rule, self.threshold, self.groups), self._prepare)

    def _prepare(self) -> Operands:
        shape = (*self.weight_shape, 1, 1)[:4]
        planes = self._planes() if self.weight is None else pack_planes(self.ternary().reshape(shape), checked=False)
        scale, second = self.scales()
        return Operands(planes, scale, second, ternary_conv2d_pack(planes, shape[1], groups=self.groups))

    # --- the packed form ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pack(self) -> TernaryLayer:
        """Drop the shadow weight, in place; what the layer computes in eval mode stays. Returns the layer."""
        if self.weight is None:
            return self
        found, (scale, second) = self.ternary(), self.scales()
        device, trained = self.weight.device, self.weight.requires_grad
        encoded = ternary_code.encode(found)
        self._set_packed(encoded, device)
        self.planes = pack_planes(found.reshape((*self.weight_shape, 1, 1)[:4]))
        self.scale = nn.Parameter(scale.clone(), requires_grad=trained)
        self.negative_scale = None if second is None else nn.Parameter(second.clone(), requires_grad=trained)
        return self

    def _set_packed(self, encoded: ternary_code.Encoded, device: Any) -> None:
        """Turn into the packed form, without planes."""
        self.weight = None
        self.mask = None
        self.encoding = encoded
        self.weight_code = encoded.data.to(device)
        self._prepared.clear()

    def packed_bits(self) -> int:
        """Bits of weights and scales as they are written to a file in the packed form, biases apart."""
        encoded = self.encoding or ternary_code.encode(self.ternary())
        scale, second = self.scales()
        return encoded.bits + ternary_code.SCALE_BITS * (scale.numel() + (0 if second is None else second.numel()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._prepared.clear()
        if self.weight_code is None or self.encoding is None or self.weight_code.is_meta:
            return
        data = self.weight_code.detach().cpu()
        self.encoding = replace(self.encoding, data=data)
        try:
            found = ternary_code.decode(self.encoding)
        except ValueError as error:
            arguments[-1].append(f"{prefix}weight_code: {error}")
            return
        self.planes = pack_planes(found.reshape((*self.weight_shape, 1, 1)[:4])).to(self.weight_code.device)

    def repack(self) -> TernaryLayer:
        """Forget what was prepared for the kernel; the next call makes it again. Returns the layer."""
        self._prepared.clear()
        return self

    def train(self, mode: bool = True) -> TernaryLayer:
        """As in every module; what was prepared for the kernel is forgotten."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> TernaryLayer:
        self._prepared.clear()
        # ``to(memory_format=channels_last)`` takes tensors of five dimensions for volumes; planes are none.
        shapes = {key: held.shape for key, held in self._buffers.items() if held is not None and held.dim() == 5}
        for key in shapes:
            self._buffers[key] = self._buffers[key].flatten()  # type: ignore[union-attr]
        try:
            return super()._apply(fn, recurse)
        finally:
            for key, shape in shapes.items():
                self._buffers[key] = self._buffers[key].view(shape)  # type: ignore[union-attr]
