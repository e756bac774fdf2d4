"""How a ``TuckerConv2d`` comes from ordinary convolutions, absorbs a BatchNorm, and becomes ordinary again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core.checks import Pair, Quad, padding4
from basisconv_kernels.layers import conversion, folding
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.tucker_decompose import TuckerSpectrum, rebuild, tucker_spectrum

if TYPE_CHECKING:
    from typing import Self

NAME = "TuckerConv2d"


class TuckerConvertible(nn.Module):
    """The half of ``TuckerConv2d`` that converts; the other half holds the state and runs it."""

    in_channels: int
    out_channels: int
    rank_in: int
    rank_out: int
    kernel_size: Pair
    stride: Pair
    padding: str | Pair | Quad
    pad_amounts: Quad
    dilation: Pair
    groups = 1  # the only number
    padding_mode: str
    activation: str | None
    precise: bool
    backend: str | None
    u_in: nn.Parameter
    core: nn.Parameter
    u_out: nn.Parameter
    bias: nn.Parameter | None

    @torch.no_grad()
    def fold(self, norm: nn.Module) -> Self:
        """Absorb the BatchNorm behind the layer, with its running statistics, in place: rows of u_out, and the bias.

        Args:
            norm (BatchNorm2d over K): what follows the layer; drop it from the network afterwards.

        Returns:
            the layer itself.

        Raises:
            ValueError: ``norm`` has no running statistics or not K channels, or an activation stands in between.
        """
        if self.activation is not None:
            raise ValueError(f"{NAME}.fold: the layer's {self.activation} stands before norm, so it cannot be folded")
        scale, offset = folding.scale_and_offset(norm)
        if scale.shape[0] != self.out_channels:
            raise ValueError(
                f"{NAME}.fold: norm must have out_channels = {self.out_channels} channels, got {scale.shape[0]}"
            )
        u_out, bias = folding.fold_after(self.u_out, self.bias, scale, offset)
        self.u_out.copy_(u_out)
        if self.bias is not None:
            self.bias.copy_(bias)
        else:
            self.bias = nn.Parameter(bias.to(self.u_out.dtype), self.u_out.requires_grad)
        return self

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        ranks: tuple[int, int] | None = None,
        energy: float | None = None,
        evbmf: float | None = None,
        rounds: int = 10,
        activation: str | None = None,
        spectrum: TuckerSpectrum | None = None,
    ) -> Self:
        """The truncated Tucker-2 decomposition of a convolution's filters, as a layer; ``conv`` itself is not changed.

        Args:
            conv (Conv2d): with one group; stride, padding, dilation, padding_mode, bias, dtype, device, training flag
                and whether it asks for gradients are kept; parametrisations are applied; hooks are not taken over.
            ranks ((rank_in, rank_out), optional): lowered to what the filters can use.
            energy (float, optional): instead: the ranks of least weights that keep this share, 0..1, of the energy.
            evbmf (float, optional): instead: EVBMF on both unfoldings, weakened by this share, 0..1, of the way up to
                the full rank. Without any of the three, the full ranks.
            rounds (int): most rounds of HOOI after the HOSVD; 0 for the HOSVD alone.
            activation (None, "relu" or "relu6"): what the layer applies last.
            spectrum (TuckerSpectrum, optional): ``tucker_spectrum`` of this convolution where it is at hand.

        Raises:
            TypeError: ``conv`` is not exactly a Conv2d.
            ValueError: groups, NaN or infinite weights, ranks below 1, or more than one rule.
        """
        op = f"{NAME}.from_conv"
        against = conversion.refusal(conv)
        if against is not None:
            raise TypeError(f"{op}: conv {against}; only torch.nn.Conv2d itself can be converted")
        if conv.groups != 1:
            raise ValueError(
                f"{op}: conv has groups = {conv.groups}, which mix no channels of others; use BasisConv2d.from_conv"
            )
        if sum(rule is not None for rule in (ranks, energy, evbmf)) > 1:
            raise ValueError(f"{op}: give one of ranks, energy and evbmf")
        weight, bias = conversion.dense_parameters(conv)
        spectrum = tucker_spectrum(weight, name=op) if spectrum is None else spectrum
        if ranks is not None:
            if min(ranks) < 1:
                raise ValueError(f"{op}: ranks must be at least 1, got {ranks}")
            rank_in, rank_out = spectrum.within_caps(*ranks)
        elif energy is not None:
            rank_in, rank_out = spectrum.ranks_for_energy(energy)
        else:
            rank_in, rank_out = spectrum.within_caps(*spectrum.caps) if evbmf is None else spectrum.evbmf_ranks(evbmf)
        factors = spectrum.truncate(rank_in, rank_out, rounds=rounds)
        geometry = {name: value for name, value in conversion.geometry(conv).items() if name != "groups"}
        layer = cls(
            **geometry, rank_in=rank_in, rank_out=rank_out, bias=bias is not None, activation=activation, device="meta"
        )
        return layer._take(*factors, bias, conv)

    @classmethod
    def from_chain(cls, first: nn.Conv2d, core: nn.Conv2d, last: nn.Conv2d, *, activation: str | None = None) -> Self:
        """The layer of three convolutions, 1×1, R×S and 1×1, as other libraries store a Tucker-2 decomposition.

        Args:
            first (Conv2d): 1×1, stride 1, no padding, no bias (zero padding of the core must stay zero).
            core (Conv2d): one group; a bias is carried through the last stage, exactly.
            last (Conv2d): 1×1, stride 1, no padding.
            activation (None, "relu" or "relu6"): what the layer applies last.

        Raises:
            TypeError: one of the three is not exactly a Conv2d.
            ValueError: they do not fit together.
        """
        op = f"{NAME}.from_chain"
        for name, conv in (("first", first), ("core", core), ("last", last)):
            against = conversion.refusal(conv)
            if against is not None:
                raise TypeError(f"{op}: {name} {against}; only torch.nn.Conv2d itself can be taken over")
            if conv.groups != 1:
                raise ValueError(f"{op}: {name} must have one group, got {conv.groups}")
        for name, conv, channels in (("first", first, first.in_channels), ("last", last, core.out_channels)):
            padded = any(padding4(op, conv.padding, (1, 1), (1, 1), (1, 1)))
            if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or padded or conv.in_channels != channels:
                raise ValueError(
                    f"{op}: {name} must be 1×1 of {channels} channels, stride 1 and no padding, got {conv}"
                )
        if core.in_channels != first.out_channels:
            raise ValueError(
                f"{op}: core must take the {first.out_channels} channels that first gives, it takes {core.in_channels}"
            )
        if first.bias is not None:
            raise ValueError(f"{op}: first has a bias, which the core would meet at the borders; fold it yourself")
        u_in = conversion.dense_parameters(first)[0][:, :, 0, 0].mT
        filters, inner = conversion.dense_parameters(core)
        expand, bias = conversion.dense_parameters(last)
        u_out = expand[:, :, 0, 0]
        if inner is not None:
            carried = (u_out.to(folding.wide(u_out.dtype)) * inner.to(folding.wide(u_out.dtype))).sum(1)
            bias = carried if bias is None else carried + bias
        geometry = {name: value for name, value in conversion.geometry(core).items() if name != "groups"}
        geometry |= {"in_channels": first.in_channels, "out_channels": last.out_channels}
        layer = cls(
            **geometry, rank_in=filters.shape[1], rank_out=filters.shape[0], bias=bias is not None,
            activation=activation, device="meta",
        )  # fmt: skip
        return layer._take(u_in, filters, u_out, bias, last)

    def _take(self, u_in: Tensor, core: Tensor, u_out: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Self:
        """Put copies of the values in place of the meta tensors, of the dtype, device and flags of ``conv``."""
        weight, old_bias = conversion.dense_parameters(conv)
        trained = conversion.is_trained(conv)
        for name, value in (("u_in", u_in), ("core", core), ("u_out", u_out)):
            copied = value.to(weight, copy=True).contiguous()
            setattr(self, name, nn.Parameter(copied, requires_grad=trained))
        if bias is not None:
            asks = trained if old_bias is None or conv.bias is None else conv.bias.requires_grad
            self.bias = nn.Parameter(bias.to(weight, copy=True), requires_grad=asks)
        return self.train(conv.training)

    # --- to ordinary convolutions and to basis form -------------------------------------------------------------------

    def to_conv(self) -> nn.Conv2d:
        """The one Conv2d that equals this layer.

        Raises:
            ValueError: an activation or asymmetric padding, which no Conv2d holds; ``to_plain(collapse=True)`` does.
        """
        if self.activation is not None:
            raise ValueError(
                f"{NAME}.to_conv: a Conv2d cannot hold activation={self.activation!r}; use to_plain(collapse=True)"
            )
        padding = conversion.conv_padding(self.padding)
        if padding is None:
            raise ValueError(
                f"{NAME}.to_conv: Conv2d has no asymmetric padding {self.padding}; use to_plain(collapse=True), which "
                "pads first"
            )
        return self._conv(self._dense_weight(), self.bias, padding=padding, padding_mode=self.padding_mode)

    def to_basis(self) -> BasisConv2d:
        """The first two stages as one: a ``BasisConv2d`` with the basis ``core ×₁ u_in`` and the coefficients u_out.

        It is no dearer where ``rank_in·(C·ρ + rank_out·R·S) ≥ rank_out·C·R·S``, ρ = H·W/(OH·OW). The basis is trained
        if u_in or core were.
        """
        basis = torch.einsum("oirs,ci->ocrs", *(t.detach().to("cpu", torch.float64) for t in (self.core, self.u_in)))
        layer = BasisConv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.rank_out, stride=self.stride,
            padding=self.padding, dilation=self.dilation, bias=self.bias is not None, padding_mode=self.padding_mode,
            basis="learned", train_basis=self.core.requires_grad or self.u_in.requires_grad,
            activation=self.activation, precise=self.precise, device="meta",
        )  # fmt: skip
        made = basis.to(self.core, copy=True)
        layer.basis_weight = nn.Parameter(made) if layer.trains_basis else made
        layer.coefficients = nn.Parameter(self.u_out.detach().clone(), requires_grad=self.u_out.requires_grad)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return layer.train(self.training)

    def to_plain(self, *, collapse: bool = False) -> nn.Sequential:
        """Ordinary modules that equal this layer, for other tools and formats.

        Named ``pad`` (padding that is asymmetric or not of zeros), ``reduce``, ``core``, ``expand`` and ``activation``
        (if there is one). Weights are copied. A residual has no place there.

        Args:
            collapse (bool): one dense convolution ``conv`` instead of the three stages.
        """
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        padding: Any = conversion.conv_padding(self.padding)
        mode = self.padding_mode
        # Padding comes before the first 1×1 or behind it alike, but one stage alone knows how to pad.
        if padding is None:
            stages["pad"] = conversion.pad_module(self.pad_amounts, mode)
            padding, mode = 0, "zeros"
        spatial = {"padding": padding, "padding_mode": mode}
        if collapse:
            stages["conv"] = self._conv(self._dense_weight(), self.bias, **spatial)
        else:
            flat: dict[str, Any] = {"stride": 1, "dilation": 1}
            stages["reduce"] = self._conv(self.u_in.mT[:, :, None, None], None, like=self.u_in, **flat)
            stages["core"] = self._conv(self.core, None, like=self.core, **spatial)
            stages["expand"] = self._conv(self.u_out[:, :, None, None], self.bias, **flat)
        if self.activation is not None:
            stages["activation"] = nn.ReLU() if self.activation == "relu" else nn.ReLU6()
        return nn.Sequential(stages).train(self.training)

    def _dense_weight(self) -> Tensor:
        return rebuild(*(t.detach().to("cpu", torch.float64) for t in (self.u_in, self.core, self.u_out)))

    def _conv(
        self, weight: Tensor, bias: Tensor | None, *, like: nn.Parameter | None = None, **spatial: Any
    ) -> nn.Conv2d:
        """A Conv2d of the layer's dtype and device that holds copies of weight and bias."""
        like = self.u_out if like is None else like
        K, C, R, S = weight.shape
        settings = {"stride": self.stride, "dilation": self.dilation, **spatial}
        # Built without values: initial ones would cost time and draw from the user's random numbers.
        conv = nn.Conv2d(C, K, (R, S), bias=bias is not None, device="meta", **settings)
        copied = weight.detach().to(like, copy=True).contiguous()
        conv.weight = nn.Parameter(copied, requires_grad=like.requires_grad)
        if bias is not None and self.bias is not None:
            conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)
