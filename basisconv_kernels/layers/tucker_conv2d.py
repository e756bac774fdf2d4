"""``TuckerConv2d``: the layer of the op ``tucker_conv2d``, in the place of a ``torch.nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.layers import bases, folding
from basisconv_kernels.layers.packing import Prepared, PreparedWeights, held
from basisconv_kernels.layers.tucker_conv2d_conversion import NAME, TuckerConvertible
from basisconv_kernels.ops.tucker_conv2d import tucker_conv2d
from basisconv_kernels.ops.tucker_conv2d_native import tucker_conv2d_pack

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class TuckerConv2d(TuckerConvertible):
    """Tucker-2 decomposed convolution, a drop-in for a ``torch.nn.Conv2d`` with one group.

    ``out = act(u_out · conv2d(u_inᵀ · input, core) + bias + residual)``

    Args:
        in_channels, out_channels, kernel_size: as in Conv2d; C, K and (R, S).
        rank_in, rank_out (int): channels before and behind the core.
        stride, padding, dilation: as in Conv2d, of the core; padding also (top, bottom, left, right).
        bias (bool): a learnable offset [K], added once at the end; it starts at 0.
        padding_mode ("zeros", "reflect", "replicate" or "circular"): what the padding is filled with.
        activation (None, "relu" or "relu6"): applied last, after the residual.
        precise, backend: as in ``tucker_conv2d``.
        device, dtype: of the weights.
        generator (torch.Generator, optional): where initial values are drawn from.

    State (keys of the state_dict, all Parameters):
        ``u_in`` [C, rank_in] and ``u_out`` [K, rank_out]: factors of the input and the output channels; they start with
        orthonormal columns where there are not more of them than rows.
        ``core`` [rank_out, rank_in, R, S]: starts normal, so that the layer keeps the variance of its input under ReLU.
        ``bias`` [K]: absent with ``bias=False``.

    Packed weights are remembered between calls that need no gradient of the weights, and renewed when a weight was
    replaced, moved, converted, loaded or edited in place. After an edit that PyTorch does not see (through ``.data`` or
    a NumPy view) call ``repack()``, or ``train()`` or ``eval()``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names both sides and the way out.

    Source: Kim et al. 2016, arXiv 1511.06530.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
        >>> layer = TuckerConv2d(64, 128, 3, rank_in=16, rank_out=24, padding=1, activation="relu")
        >>> layer(torch.randn(1, 64, 56, 56)).shape
        torch.Size([1, 128, 56, 56])
        >>> sum(p.numel() for p in layer.parameters())
        7680
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        rank_in: int,
        rank_out: int,
        stride: int | Pair = 1,
        padding: int | Pair | Quad | str = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        precise: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "rank_in": rank_in, "rank_out": rank_out}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{NAME}: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{NAME}: {name} must be at least 1, got {value}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.rank_in = rank_in
        self.rank_out = rank_out
        self.kernel_size = checks.pair(NAME, "kernel_size", kernel_size, at_least=1)
        self.stride = checks.pair(NAME, "stride", stride, at_least=1)
        self.dilation = checks.pair(NAME, "dilation", dilation, at_least=1)
        self.pad_amounts = checks.padding4(NAME, padding, self.kernel_size, self.stride, self.dilation)
        top, bottom, left, right = self.pad_amounts
        symmetric = (top, left) if (top, left) == (bottom, right) else self.pad_amounts
        self.padding: str | Pair | Quad = padding if isinstance(padding, str) else symmetric
        checks.activation(NAME, activation)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"{NAME}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        self.activation = activation
        self.precise = precise
        self.backend = backend
        self._prepared = PreparedWeights()

        kind = {"device": device, "dtype": dtype}
        self.u_in = nn.Parameter(torch.empty(in_channels, rank_in, **kind))
        self.core = nn.Parameter(torch.empty(rank_out, rank_in, *self.kernel_size, **kind))
        self.u_out = nn.Parameter(torch.empty(out_channels, rank_out, **kind))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **kind)) if bias else None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values again, as the constructor does."""
        if self.core.is_meta:
            return
        dtype = folding.wide(self.core.dtype)
        for factor in (self.u_in, self.u_out):
            rows, columns = factor.shape
            draw = bases.random_orthogonal if columns <= rows else bases.random_unit
            factor.copy_(draw(columns, rows, dtype, generator).mT)
        rank_out, rank_in, R, S = self.core.shape
        # The columns of u_in have length 1, so the first map keeps the variance of the input; a row of u_out has the
        # square length rank_out/K on average. This core doubles the variance of the input, as Kaiming's rule does.
        spread = (2 * self.out_channels / (rank_out * rank_in * R * S)) ** 0.5
        self.core.copy_(bases.normal((rank_out, rank_in * R * S), dtype, generator).reshape(self.core.shape) * spread)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            input (Tensor[N, C, H, W] or [C, H, W]): as for Conv2d.
            residual (Tensor[N, K, OH, OW], optional): added before the activation.

        Returns:
            Tensor[N, K, OH, OW] (or [K, OH, OW]).
        """
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None], None if residual is None else residual[None])[0]
        padded, padding = self._pad(input)
        core, u_out = held(self, "core"), held(self, "u_out")
        return tucker_conv2d(
            padded,
            held(self, "u_in"),
            core,
            u_out,
            held(self, "bias"),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            activation=self.activation,
            residual=residual,
            precise=self.precise,
            backend=self.backend,
            packed=self._packed(core, u_out),
        )

    def _pad(self, input: Tensor) -> tuple[Tensor, Quad]:
        """Explicit padding where the op has none: reflect, replicate, circular. Exact, since it comes first."""
        if self.padding_mode == "zeros" or not any(self.pad_amounts):
            return input, self.pad_amounts
        top, bottom, left, right = self.pad_amounts
        padded = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        # Circular padding forgets the memory format, which the result takes from its input.
        return laid_out(padded, memory_format(input)), (0, 0, 0, 0)

    # --- packed weights -----------------------------------------------------------------------------------------------

    def _packed(self, core: Tensor, u_out: Tensor) -> Tensor | None:
        """Packed weights for the op, remembered in eager calls that need no gradient of them."""
        if torch.is_grad_enabled() and (core.requires_grad or u_out.requires_grad):
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # In the graph, where freezing folds it: a remembered tensor would become a constant of that moment.
            return self._pack()
        settings = (self.stride, self.dilation, self.precise)
        return self._prepared.get((core, u_out), settings, lambda: Prepared(None, None, self._pack())).packed

    def _pack(self) -> Tensor | None:
        return tucker_conv2d_pack(
            self.core, self.u_out, stride=self.stride, dilation=self.dilation, precise=self.precise
        )

    def repack(self) -> TuckerConv2d:
        """Forget remembered packed weights; the next call makes them again. Returns the layer."""
        self._prepared.clear()
        return self

    def train(self, mode: bool = True) -> TuckerConv2d:
        """As in every module; remembered packed weights are forgotten."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> TuckerConv2d:
        self._prepared.clear()  # or the old copy of the weights would live on beside the converted one
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The constructor's arguments, defaults left out."""
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        shown += [f"rank_in={self.rank_in}", f"rank_out={self.rank_out}", f"stride={self.stride}"]
        shown += [f"padding={self.padding!r}"] if any(self.pad_amounts) else []
        shown += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        shown += ["bias=False"] if self.bias is None else []
        shown += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        shown += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join(shown)
