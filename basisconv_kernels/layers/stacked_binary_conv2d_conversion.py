"""How a ``StackedBinaryConv2d`` comes from a dense convolution and becomes one again; which bank filters it uses."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.layers import conversion
from basisconv_kernels.layers import stacked_binary_conv2d_fit as fit
from basisconv_kernels.reference.stacked_binary_conv2d import stacked_filters

if TYPE_CHECKING:
    from typing import Self

NAME = "StackedBinaryConv2d"


@dataclass(frozen=True)
class BankUsage:
    """How often each filter of a bank is selected, over all outputs and splits.

    A filter that nobody selects has no gradient of its own: only the gradient of the selections can bring it back.
    """

    counts: tuple[int, ...]

    @property
    def unused(self) -> tuple[int, ...]:
        """Filters that nobody selects."""
        return tuple(j for j, count in enumerate(self.counts) if count == 0)

    def __str__(self) -> str:
        used = len(self.counts) - len(self.unused)
        most = max(self.counts)
        return f"{used} of {len(self.counts)} bank filters used, the most common {most} times of {sum(self.counts)}"


class Convertible(nn.Module):
    """The half of ``StackedBinaryConv2d`` that converts; the other half holds the state and runs it."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    bank: int
    splits: int
    stride: Pair
    padding: str | Pair | Quad
    pad_amounts: Quad
    dilation: Pair
    groups: int
    padding_mode: str
    binarize_input: bool
    activation: str | None
    bank_latent: nn.Parameter
    select_latent: nn.Parameter
    bank_bits: Tensor
    index_bits: Tensor
    scale: nn.Parameter | None
    bias: nn.Parameter | None

    def filters(self) -> tuple[Tensor, Tensor]:
        """See ``StackedBinaryConv2d.filters``."""
        raise NotImplementedError

    @property
    def bank_shape(self) -> tuple[int, int, int, int]:
        """(n, cs, R, S) with cs = C/(G·splits)."""
        return (self.bank, self.in_channels // (self.groups * self.splits), *self.kernel_size)

    @property
    def payload_bytes(self) -> int:
        """Bytes of bank and index in the frozen form and in a file; scale and bias come on top."""
        return fit.stored_bytes(*self.bank_shape, self.out_channels, self.splits)

    def usage(self) -> BankUsage:
        """How often each bank filter is selected."""
        _, index = self.filters()
        return BankUsage(tuple(torch.bincount(index.reshape(-1), minlength=self.bank).tolist()))

    def dense_weight(self) -> Tensor:
        """The filters that the layer stands for, ``scale·Ŵ`` [K, C/G, R, S], without gradients."""
        bank, index = self.filters()
        weight = stacked_filters(bank, index)
        if self.scale is None:
            return weight
        return weight.to(self.scale.dtype) * self.scale.detach()[:, None, None, None]

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        bank: int,
        splits: int,
        scale: bool = True,
        binarize_input: bool = False,
        activation: str | None = None,
        estimator: str = "clip",
        rounds: int = 50,
        seed: int = 0,
        fitted: fit.StackedFit | None = None,
    ) -> Self:
        """A layer that approximates a convolution, by the alternating fit of ``fit_stacked``.

        The latents start with the signs and the choices of the fit, their sizes with how clear these were, so that
        fine-tuning can turn doubtful ones first.

        Args:
            conv (Conv2d): not changed; parametrisations are applied.
            bank, splits: n and the number of splits.
            scale (bool): with False the factors of the fit are dropped, for a BatchNorm that is trained to supply them.
            binarize_input, activation, estimator: as in the constructor.
            rounds, seed: as in ``fit_stacked``.
            fitted: its result for this convolution, if it was computed already.

        Raises:
            ValueError: what is no plain Conv2d, or has NaN or infinite weights; channels that do not divide.
        """
        against = conversion.refusal(conv)
        if against is not None:
            raise ValueError(f"{NAME}.from_conv: conv {against}")
        weight, bias = conversion.dense_parameters(conv)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{NAME}.from_conv: conv has NaN or infinite weights")
        trained = conversion.is_trained(conv)
        layer = cls(
            **conversion.geometry(conv), bank=bank, splits=splits, bias=bias is not None, scale=scale,
            binarize_input=binarize_input, activation=activation, estimator=estimator, device="meta",
            dtype=weight.dtype,
        )  # fmt: skip
        found = fitted or fit.fit_stacked(weight, bank, splits, rounds=rounds, seed=seed)
        # Half of a unit at most: inside the clipped estimator's range, with room to move both ways.
        layer.bank_latent = _parameter(_signed(found.bank, found.direction), trained)
        layer.select_latent = _parameter(_leading(found), trained)
        if scale:
            layer.scale = _parameter(found.scale, trained)
        if bias is not None:
            asks = conv.bias.requires_grad if isinstance(conv.bias, Tensor) else trained
            layer.bias = _parameter(bias, asks)
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """The dense Conv2d of the same results.

        Raises:
            ValueError: Conv2d has no asymmetric padding, no activation, and does not take signs of its input.
        """
        if self.binarize_input:
            raise ValueError(f"{NAME}.to_conv: a Conv2d does not take the signs of its input, this layer does")
        if self.activation is not None:
            raise ValueError(f"{NAME}.to_conv: a Conv2d has no activation {self.activation!r}; use to_plain")
        padding = conversion.conv_padding(self.padding)
        if padding is None:
            raise ValueError(f"{NAME}.to_conv: Conv2d has no asymmetric padding {self.padding}; use to_plain")
        return self._conv(padding, self.padding_mode)

    def to_plain(self, *, collapse: bool = False) -> nn.Sequential:
        """Ordinary modules of the same results: padding where Conv2d has none such, the dense convolution, activation.

        Args:
            collapse (bool): there is one form only; accepted for all layers of the package alike.

        Raises:
            ValueError: the layer takes the signs of its input, for which PyTorch has no module.
        """
        if self.binarize_input:
            raise ValueError(
                f"{NAME}.to_plain: the layer takes the signs of its input, for which PyTorch has no module; set "
                "binarize_input=False to convert its filters alone"
            )
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        padding: Any = conversion.conv_padding(self.padding)
        mode = self.padding_mode
        if padding is None:
            stages["pad"] = conversion.pad_module(self.pad_amounts, mode)
            padding, mode = 0, "zeros"
        stages["conv"] = self._conv(padding, mode)
        if self.activation is not None:
            stages["activation"] = nn.ReLU() if self.activation == "relu" else nn.ReLU6()
        return nn.Sequential(stages).train(self.training)

    def _conv(self, padding: Any, padding_mode: Any) -> nn.Conv2d:
        weight = self.dense_weight()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, padding, self.dilation, self.groups,
            self.bias is not None, padding_mode, device="meta",
        )  # fmt: skip
        trained = any(p.requires_grad for p in self.parameters())
        like = next((p for p in self.parameters() if p is not None), weight)
        conv.weight = _parameter(weight.to(like), trained)
        if self.bias is not None:
            conv.bias = _parameter(self.bias.detach(), self.bias.requires_grad)
        return conv.train(self.training)


def _parameter(value: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=trained)


def _signed(bank: Tensor, direction: Tensor) -> Tensor:
    """Latents whose signs are the bank: half the direction where it agrees, a little on the right side elsewhere."""
    agrees = torch.where(direction >= 0, 1.0, -1.0).to(bank.dtype) == bank
    return torch.where(agrees & (direction != 0), direction / 2, bank * 1e-3)


def _leading(found: fit.StackedFit) -> Tensor:
    """Latents whose largest is the fitted choice, even where two filters fit equally or rounding made them equal."""
    latent = found.affinity.clone()
    best = latent.amax(2, keepdim=True)
    chosen = torch.nn.functional.one_hot(found.index, latent.shape[2]).bool()
    return torch.where(chosen, best + (best.abs() * 0.01 + 1e-3), latent)
