"""How a ``BasisConv2d`` comes from ordinary convolutions, absorbs BatchNorms, and becomes ordinary again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.layers import conversion, folding
from basisconv_kernels.layers.calibration import ChannelMoments, calibrated_norm
from basisconv_kernels.layers.decompose import FilterSpectrum, decompose

if TYPE_CHECKING:
    from typing import Self

NAME = "BasisConv2d"


class Convertible(nn.Module):
    """The half of ``BasisConv2d`` that converts; the other half holds the state and runs it."""

    out_channels: int
    basis_channels: int
    stride: Pair
    padding: str | Pair | Quad
    pad_amounts: Quad
    dilation: Pair
    groups: int
    padding_mode: str
    activation: str | None
    basis_weight: Tensor
    coefficients: nn.Parameter
    bias: nn.Parameter | None
    basis_norm: nn.BatchNorm2d | None

    def basis_maps(self, input: Tensor) -> Tensor:
        """Stage 1 alone; see ``BasisConv2d.basis_maps``."""
        raise NotImplementedError

    @property
    def trains_basis(self) -> bool:
        """Whether the basis is a Parameter."""
        return "basis_weight" in self._parameters

    # --- the BatchNorm between the stages -----------------------------------------------------------------------------

    def folded_coefficients(self) -> tuple[Tensor, Tensor | None]:
        """(coefficients, bias) with the BatchNorm between the stages absorbed; the layer's own where there is none.

        ``A·diag(g), bias + A·e`` with ``g = γ/√(var + ε)``, ``e = β − mean·g``; differentiable.
        """
        if self.basis_norm is None:
            return self.coefficients, self.bias
        folded, bias = folding.fold_between(self.coefficients, self.bias, *folding.scale_and_offset(self.basis_norm))
        return folded.to(self.coefficients.dtype), bias.to(self.coefficients.dtype)

    def calibrate_basis_norm(self, batches: Iterable[Tensor]) -> Self:
        """Insert, or replace, the BatchNorm between the stages by one that is the identity in eval mode.

        ``running = (mean(Z), var(Z))``, ``γ = √(var + ε)``, ``β = mean`` over all basis maps Z of the batches.

        Args:
            batches (iterable of Tensor[N, C, H, W]): inputs of this layer.

        Returns:
            the layer itself.
        """
        moments = ChannelMoments(self.basis_channels)
        with torch.no_grad():
            for batch in batches:
                moments.add(self.basis_maps(batch))
        return self.set_basis_norm(moments)

    def set_basis_norm(self, moments: ChannelMoments) -> Self:
        """``calibrate_basis_norm`` from moments of the basis maps taken elsewhere. Returns the layer."""
        self.basis_norm = calibrated_norm(moments, self.coefficients)
        self.basis_norm.train(self.training)
        return self

    @torch.no_grad()
    def fold(self, norm: nn.Module | None = None) -> Self:
        """Absorb the BatchNorm between the stages, and the one behind the layer if given, in place.

        Both with their running statistics, as in eval mode. The basis stays as it is.

        Args:
            norm (BatchNorm2d over K, optional): what follows the layer; drop it from the network afterwards.

        Returns:
            the layer itself.

        Raises:
            ValueError: ``norm`` has no running statistics or not K channels, or an activation stands in between.
        """
        coefficients, bias = self.coefficients.to(folding.wide(self.coefficients.dtype)), self.bias
        outer = None
        if norm is not None:
            if self.activation is not None:
                raise ValueError(
                    f"{NAME}.fold: the layer's {self.activation} stands before norm, so it cannot be folded"
                )
            outer = folding.scale_and_offset(norm)
            if outer[0].shape[0] != self.out_channels:
                raise ValueError(
                    f"{NAME}.fold: norm must have out_channels = {self.out_channels} channels, got {outer[0].shape[0]}"
                )
        wide_bias = None if bias is None else bias.to(coefficients.dtype)
        if self.basis_norm is not None:
            coefficients, wide_bias = folding.fold_between(
                coefficients, wide_bias, *folding.scale_and_offset(self.basis_norm)
            )
        if outer is not None:
            coefficients, wide_bias = folding.fold_after(coefficients, wide_bias, *outer)
        self.basis_norm = None
        self.coefficients.copy_(coefficients)
        if wide_bias is not None and bias is not None:
            bias.copy_(wide_bias)
        elif wide_bias is not None:
            self.bias = nn.Parameter(wide_bias.to(self.coefficients.dtype), self.coefficients.requires_grad)
        return self

    # --- to and from ordinary convolutions ----------------------------------------------------------------------------

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        basis_channels: int | None = None,
        energy: float | None = None,
        input_correlation: Tensor | None = None,
        train_basis: bool = False,
        activation: str | None = None,
        spectrum: FilterSpectrum | None = None,
    ) -> Self:
        """The truncated eigenbasis of a convolution's filters, as a layer; ``conv`` itself is not changed.

        Per group ``H = U·diag(s)·V``, basis = the first rows of V, coefficients = the first columns of U·diag(s).

        Args:
            conv (Conv2d): stride, padding, dilation, groups, padding_mode, bias, dtype, device, training flag and
                whether it asks for gradients are kept; parametrisations are applied; hooks are not taken over.
            basis_channels (int, optional): Q, divisible by groups; above the rank of the filters it is lowered, with a
                warning.
            energy (float, optional): instead of Q: the least Q that keeps this share, 0..1, of the filters' energy.
                Without both, the full rank.
            input_correlation (Tensor[D, D] or [G, D, D], optional): mean of p·pᵀ over input patches p of length
                D = (C/G)·R·S; the truncation then loses the least output energy instead of filter energy.
            train_basis (bool): whether the basis is trained on.
            activation (None, "relu" or "relu6"): what the layer applies last.
            spectrum (FilterSpectrum, optional): ``decompose`` of this convolution where it is at hand.

        Raises:
            TypeError: ``conv`` is not exactly a Conv2d.
            ValueError: NaN or infinite weights, a Q below 1 or not divisible by groups, or both Q and energy.
        """
        op = f"{NAME}.from_conv"
        against = conversion.refusal(conv)
        if against is not None:
            raise TypeError(f"{op}: conv {against}; only torch.nn.Conv2d itself can be converted")
        if basis_channels is not None and energy is not None:
            raise ValueError(f"{op}: give basis_channels or energy, not both")
        if energy is not None and not 0 <= energy <= 1:
            raise ValueError(f"{op}: energy must lie in 0..1, got {energy}")
        weight, bias = conversion.dense_parameters(conv)
        if spectrum is None:
            spectrum = decompose(weight, conv.groups, input_correlation, name=op)
        per_group = spectrum.cap
        if energy is not None:
            per_group = spectrum.channels_for_energy(energy)
        elif basis_channels is not None:
            per_group = _per_group(op, basis_channels, conv.groups, per_group)
        basis, coefficients = spectrum.truncate(per_group)
        layer = cls(
            **conversion.geometry(conv), basis_channels=per_group * conv.groups, bias=bias is not None, basis="learned",
            train_basis=train_basis, activation=activation, device="meta",
        )  # fmt: skip
        return layer._take(basis, coefficients, bias, conv)

    @classmethod
    def from_pair(
        cls,
        basis_conv: nn.Conv2d,
        recombination_conv: nn.Conv2d,
        *,
        basis_norm: nn.BatchNorm2d | None = None,
        activation: str | None = None,
    ) -> Self:
        """The layer of a pair of convolutions, R×S to Q maps and then 1×1 to K, as the authors' code stores it.

        Args:
            basis_conv (Conv2d): its weight becomes the basis, trained if it asks for gradients; a bias is carried
                through the second stage, ``bias' = bias + A·bias_1``, exactly.
            recombination_conv (Conv2d): 1×1, stride 1, no padding; with the groups of ``basis_conv`` the coefficients
                are compact, with 1 group they mix everything.
            basis_norm (BatchNorm2d, optional): the one between the two; a copy of it becomes the layer's.
            activation (None, "relu" or "relu6"): what the layer applies last.

        Raises:
            TypeError: one of the two is not exactly a Conv2d.
            ValueError: they do not fit together.
        """
        op = f"{NAME}.from_pair"
        for name, conv in (("basis_conv", basis_conv), ("recombination_conv", recombination_conv)):
            against = conversion.refusal(conv)
            if against is not None:
                raise TypeError(f"{op}: {name} {against}; only torch.nn.Conv2d itself can be taken over")
        basis, inner_bias = conversion.dense_parameters(basis_conv)
        Q, groups = basis.shape[0], basis_conv.groups
        coefficients = conversion.pair_coefficients(recombination_conv, groups, Q, op)
        bias = conversion.dense_parameters(recombination_conv)[1]
        norm = None if basis_norm is None else conversion.copied_norm(basis_norm, Q, inner_bias, op)
        if norm is None and inner_bias is not None:
            wide = inner_bias.to(folding.wide(inner_bias.dtype))
            bias = folding.fold_between(coefficients, bias, torch.ones_like(wide), wide)[1]
        shape = conversion.geometry(basis_conv) | {"out_channels": recombination_conv.out_channels}
        layer = cls(
            **shape, basis_channels=Q, bias=bias is not None, basis="learned",
            train_basis=conversion.is_trained(basis_conv), compact=groups == 1 or coefficients.shape[1] != Q,
            activation=activation, device="meta",
        )  # fmt: skip
        layer._take(basis, coefficients, bias, recombination_conv)
        layer.basis_norm = norm
        return layer

    def _take(self, basis: Tensor, coefficients: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Self:
        """Put copies of the values in place of the meta tensors, of the dtype, device and flags of ``conv``."""
        weight, old_bias = conversion.dense_parameters(conv)
        if self.trains_basis:
            self.basis_weight = nn.Parameter(basis.to(weight, copy=True))
        else:
            self.basis_weight = basis.to(weight, copy=True)
        trained = conversion.is_trained(conv)
        mixing = coefficients.to(weight, copy=True).contiguous()  # sharded training takes no other layout
        self.coefficients = nn.Parameter(mixing, requires_grad=trained)
        if bias is not None:
            asks = trained if old_bias is None or conv.bias is None else conv.bias.requires_grad
            self.bias = nn.Parameter(bias.to(weight, copy=True), requires_grad=asks)
        return self.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """The one Conv2d that equals this layer, ``weight = A·diag(g)·F``, an eval-mode BatchNorm folded in.

        Coefficients [K, Q] over groups give a convolution with one group.

        Raises:
            ValueError: an activation or asymmetric padding, which no Conv2d holds; ``to_plain(collapse=True)`` does.
        """
        if self.activation is not None:
            raise ValueError(
                f"{NAME}.to_conv: a Conv2d cannot hold activation={self.activation!r}; use to_plain(collapse=True)"
            )
        return conversion.collapse(self, f"{NAME}.to_conv").train(self.training)

    def to_plain(self, *, collapse: bool = False) -> nn.Sequential:
        """Ordinary modules that equal this layer, for other tools and formats.

        Named ``pad`` (asymmetric padding only), ``basis``, ``basis_norm`` (if there is one: call ``fold()`` first to
        be rid of it), ``recombination`` and ``activation`` (if there is one). Weights are copied. A residual has no
        place there.

        Args:
            collapse (bool): one dense convolution ``conv`` instead of the two stages, an eval-mode BatchNorm folded in.
        """
        return conversion.plain(self, collapsed=collapse)


def _per_group(op: str, basis_channels: int, groups: int, cap: int) -> int:
    """Q/G of an explicit Q, checked, and lowered to the cap with a warning."""
    if not isinstance(basis_channels, int) or isinstance(basis_channels, bool):
        raise TypeError(f"{op}: basis_channels must be an int, got {basis_channels!r}")
    if basis_channels < 1 or basis_channels % groups:
        raise ValueError(
            f"{op}: basis_channels must be at least 1 and divisible by groups = {groups}, got {basis_channels}"
        )
    if basis_channels // groups > cap:
        warnings.warn(
            f"{op}: basis_channels = {basis_channels} exceeds the rank of the filters; lowered to {cap * groups}",
            stacklevel=3,
        )
    return min(basis_channels // groups, cap)
