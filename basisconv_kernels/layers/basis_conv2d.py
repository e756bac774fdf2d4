"""``BasisConv2d``: the layer of the op ``basis_conv2d``, in the place of a ``torch.nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import conv2d
from basisconv_kernels.layers import bases, folding
from basisconv_kernels.layers.basis_conv2d_conversion import NAME, Convertible
from basisconv_kernels.layers.conversion import PADDING_MODES
from basisconv_kernels.layers.packing import Prepared, PreparedWeights, held
from basisconv_kernels.ops import basis_conv2d_planned as planned
from basisconv_kernels.ops.basis_conv2d import basis_conv2d
from basisconv_kernels.ops.basis_conv2d_native import basis_conv2d_pack
from basisconv_kernels.reference.basis_conv2d import laid_out, memory_format

# What a call depends on beside its input and residual.
REMEMBERED = (
    "stride", "pad_amounts", "padding_mode", "dilation", "groups", "activation", "precise", "backend",
    "basis_weight", "coefficients", "bias", "basis_norm",
)  # fmt: skip
BASES = ("random_orthogonal", "dct", "learned")


class BasisConv2d(Convertible):
    """Convolution with a shared filter basis, a drop-in for ``torch.nn.Conv2d``.

    ``out = act(coefficients · norm(conv2d(input, basis_weight)) + bias + residual)``, ``norm`` only if ``basis_norm``.

    Args:
        in_channels, out_channels, kernel_size: as in Conv2d; C, K and (R, S).
        basis_channels (int): Q, the number of basis filters; divisible by ``groups``.
        stride, padding, dilation, groups: as in Conv2d, of the R×S stage; padding also (top, bottom, left, right).
        bias (bool): a learnable offset [K], added once at the end; it starts at 0.
        padding_mode ("zeros", "reflect", "replicate" or "circular"): what the padding is filled with.
        basis ("random_orthogonal", "dct" or "learned"): how the basis starts: orthonormal rows at random, the lowest
            frequencies of a cosine transform, or random unit rows (orthonormal where Q/G ≤ (C/G)·R·S). The first two
            need ``Q/G ≤ (C/G)·R·S``.
        train_basis (bool, optional): whether the basis is trained; None means: only if ``basis="learned"``.
        basis_norm (bool): a BatchNorm2d over the Q basis maps. In eval mode it is folded exactly and the layer stays
            one call of the op; in training mode it needs the statistics of whole maps, so the layer runs plain PyTorch.
        compact (bool): for ``groups > 1``: True mixes the maps of each group alone (coefficients [K, Q/G]), False mixes
            all Q maps into every output.
        activation (None, "relu" or "relu6"): applied last, after the residual.
        precise, backend: as in ``basis_conv2d``.
        device, dtype: of the weights.
        generator (torch.Generator, optional): where initial values are drawn from.

    State (keys of the state_dict, the same whether the basis is trained or frozen):
        ``basis_weight`` [Q, C/G, R, S]: a Parameter where trained, else a persistent buffer, so that no optimiser and
        no weight decay reaches it. ``freeze_basis()`` and ``train_basis()`` turn one into the other.
        ``coefficients`` [K, Q] or [K, Q/G]: a Parameter; starts normal with variance 2 / (maps that one output reads).
        ``bias`` [K]: a Parameter, absent with ``bias=False``.
        ``basis_norm.*``: of the BatchNorm2d, only with ``basis_norm=True``.

    Packed weights are remembered between calls that need no gradient of the weights, and renewed when a weight was
    replaced, moved, converted, loaded or edited in place. After an edit that PyTorch does not see (through ``.data`` or
    a NumPy view) call ``repack()``, or ``train()`` or ``eval()``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names both sides and the way out.

    Source: Tayyab, Mahalanobis 2019, arXiv 1906.04509; the norm between the stages: Tayyab, Khan, Mahalanobis 2021,
    arXiv 2105.10436.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.basis_conv2d import BasisConv2d
        >>> layer = BasisConv2d(64, 128, 3, 16, padding=1, activation="relu")
        >>> layer(torch.randn(1, 64, 56, 56)).shape
        torch.Size([1, 128, 56, 56])
        >>> sum(p.numel() for p in layer.parameters())
        2176
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        basis_channels: int,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | Quad | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        basis: str = "random_orthogonal",
        train_basis: bool | None = None,
        basis_norm: bool = False,
        compact: bool = True,
        activation: str | None = None,
        precise: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.basis_channels = basis_channels
        self.groups = groups
        _check_channels(in_channels, out_channels, basis_channels, groups, compact)
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
        if basis not in BASES:
            raise ValueError(f"{NAME}: basis must be one of {', '.join(BASES)}, got {basis!r}")
        taps = in_channels // groups * self.kernel_size[0] * self.kernel_size[1]
        if basis != "learned" and basis_channels // groups > taps:
            raise ValueError(
                f"{NAME}: basis={basis!r} needs Q/groups <= (C/groups)·R·S = {taps} orthonormal filters, got "
                f"{basis_channels // groups}; lower basis_channels, or use basis='learned', which starts from unit rows"
            )
        self.padding_mode = padding_mode
        self.basis = basis
        self.activation = activation
        self.precise = precise
        self.backend = backend
        self._prepared = PreparedWeights()

        kind = {"device": device, "dtype": dtype}
        mixed = basis_channels // groups if compact else basis_channels
        weight = torch.empty(basis_channels, in_channels // groups, *self.kernel_size, **kind)
        if basis == "learned" if train_basis is None else train_basis:
            self.basis_weight = nn.Parameter(weight)
        else:
            self.register_buffer("basis_weight", weight)
        self.coefficients = nn.Parameter(torch.empty(out_channels, mixed, **kind))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **kind)) if bias else None)
        self.basis_norm = nn.BatchNorm2d(basis_channels, **kind) if basis_norm else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values again, as the constructor does; a basis taken from a convolution is drawn anew too."""
        if self.basis_weight.is_meta:
            return
        Q, *filter_shape = self.basis_weight.shape
        per_group, taps = Q // self.groups, self.basis_weight[0].numel()
        dtype = folding.wide(self.basis_weight.dtype)
        for rows in self.basis_weight.chunk(self.groups):
            if self.basis == "dct":
                drawn = bases.dct(per_group, (filter_shape[0], filter_shape[1], filter_shape[2]), dtype)
            elif per_group <= taps:
                drawn = bases.random_orthogonal(per_group, taps, dtype, generator)
            else:
                drawn = bases.random_unit(per_group, taps, dtype, generator)
            rows.copy_(drawn.reshape(rows.shape))
        K, mixed = self.coefficients.shape
        self.coefficients.copy_(bases.normal((K, mixed), dtype, generator) * (2 / mixed) ** 0.5)
        if self.bias is not None:
            self.bias.zero_()
        if self.basis_norm is not None:
            self.basis_norm.reset_parameters()

    # --- the call -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            input (Tensor[N, C, H, W] or [C, H, W]): as for Conv2d.
            residual (Tensor[N, K, OH, OW], optional): added before the activation.

        Returns:
            Tensor[N, K, OH, OW] (or [K, OH, OW]).
        """
        if not is_dynamo_compiling() and (known := self._prepared.repeat(self, input, residual)) is not None:
            return known
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None], None if residual is None else residual[None])[0]
        if self._norm_needs_maps():
            return self._two_stages(input, residual)
        basis, coefficients, bias, packed = self._weights()
        padded, padding = self._pad(input)
        out = basis_conv2d(
            padded,
            basis,
            coefficients,
            bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            residual=residual,
            precise=self.precise,
            backend=self.backend,
            packed=packed,
        )
        if packed is not None and padded is input and self.basis_norm is None and not torch.compiler.is_compiling():
            self._remember_call(packed)
        return out

    def _remember_call(self, packed: Tensor) -> None:
        """Let calls like the one just made go the short way, where the op did."""
        geometry = (self.stride, self.pad_amounts, self.dilation, self.groups)
        call = (packed, (*geometry, self.activation, self.precise, self.backend))
        tensors = (None, held(self, "basis_weight"), held(self, "coefficients"), held(self, "bias"), None)
        self._prepared.remember(self, planned.plans, call, tensors, holes=(0, 4), depends_on=REMEMBERED)

    def basis_maps(self, input: Tensor) -> Tensor:
        """Stage 1 alone, in plain PyTorch: Z [N, Q, OH, OW] of ``input`` [N, C, H, W], before any BatchNorm."""
        padded, (top, bottom, left, right) = self._pad(input)
        if (top, left) != (bottom, right):
            padded = F.pad(padded, (left, right, top, bottom))
            top = left = 0
        return conv2d(padded, self.basis_weight, None, self.stride, (top, left), self.dilation, self.groups)

    def _pad(self, input: Tensor) -> tuple[Tensor, Quad]:
        """Explicit padding where the op has none: reflect, replicate, circular. Exact, since it comes first."""
        if self.padding_mode == "zeros" or not any(self.pad_amounts):
            return input, self.pad_amounts
        top, bottom, left, right = self.pad_amounts
        padded = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        # Circular padding forgets the memory format, which the result takes from its input.
        return laid_out(padded, memory_format(input)), (0, 0, 0, 0)

    def _norm_needs_maps(self) -> bool:
        """Whether the BatchNorm takes its statistics from this call, which forbids a single pass."""
        norm = self._modules.get("basis_norm")
        return norm is not None and (norm.training or norm.running_mean is None)

    def _two_stages(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The layer in plain PyTorch, for a BatchNorm that needs the statistics of whole maps."""
        maps = self.basis_maps(input)
        if self.basis_norm is not None:
            maps = self.basis_norm(maps)
        out = F.conv2d(maps, self.coefficients[:, :, None, None], self.bias, groups=self._mixing_groups())
        if residual is not None:
            out = out + residual
        if self.activation is None:
            return out
        return F.relu(out) if self.activation == "relu" else F.relu6(out)

    def _mixing_groups(self) -> int:
        return self.groups if folding.is_compact(self.coefficients, self.basis_weight, self.groups) else 1

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(basis, coefficients, bias, packed) for the op, remembered in eager calls that need no gradient of them."""
        sources = self._sources()
        if torch.is_grad_enabled() and any([t.requires_grad for t in sources]):  # noqa: C419, for its time
            return self.basis_weight, *self.folded_coefficients(), None
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            # In the graph, where freezing folds it: a remembered tensor would become a constant of that moment.
            coefficients, bias = self.folded_coefficients()
            return self.basis_weight, coefficients, bias, self._pack(coefficients)
        bias = held(self, "bias")
        settings: tuple[Any, ...] = (self.stride, self.dilation, self.groups, self.precise)
        norm = self._modules.get("basis_norm")
        if norm is not None:
            settings = (*settings, bias is None, norm.eps)
        kept = self._prepared.get(sources, settings, self._prepare)
        if kept.coefficients is None:
            return sources[0], sources[1], bias, kept.packed
        return sources[0], kept.coefficients, kept.bias, kept.packed

    def _sources(self) -> tuple[Tensor, ...]:
        """Every tensor that the prepared weights depend on, the basis and the coefficients first."""
        basis, coefficients = held(self, "basis_weight"), held(self, "coefficients")
        norm = self._modules.get("basis_norm")
        if norm is None:
            return basis, coefficients
        found = (held(self, "bias"), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return basis, coefficients, *(t for t in found if t is not None)

    def _prepare(self) -> Prepared:
        coefficients, bias = self.folded_coefficients()
        packed = self._pack(coefficients)
        return Prepared(None, None, packed) if self.basis_norm is None else Prepared(coefficients, bias, packed)

    def _pack(self, coefficients: Tensor) -> Tensor | None:
        return basis_conv2d_pack(
            self.basis_weight,
            coefficients,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            precise=self.precise,
        )

    def repack(self) -> BasisConv2d:
        """Forget remembered packed weights; the next call makes them again. Returns the layer."""
        self._prepared.clear()
        return self

    def train(self, mode: bool = True) -> BasisConv2d:
        """As in every module; remembered packed weights are forgotten."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> BasisConv2d:
        self._prepared.clear()  # or the old copy of the weights would live on beside the converted one
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        frozen = not self.trains_basis
        super()._load_from_state_dict(*args)
        if frozen and self.trains_basis:  # assign=True puts the given object in place, even a Parameter
            self.freeze_basis()

    # --- the basis ----------------------------------------------------------------------------------------------------

    def freeze_basis(self) -> BasisConv2d:
        """Make the basis a buffer, in place: no gradient, no optimiser, no weight decay. Returns the layer."""
        if self.trains_basis:
            weight = self.basis_weight.detach()
            del self.basis_weight
            self.register_buffer("basis_weight", weight)
        return self

    def train_basis(self) -> BasisConv2d:
        """Make the basis a Parameter, in place; give it to the optimiser afterwards. Returns the layer."""
        if not self.trains_basis:
            weight = self.basis_weight
            del self.basis_weight
            self.basis_weight = nn.Parameter(weight.clone() if weight.is_inference() else weight)
        return self

    def extra_repr(self) -> str:
        """The constructor's arguments, defaults left out."""
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        shown += [f"basis_channels={self.basis_channels}", f"stride={self.stride}"]
        shown += [f"padding={self.padding!r}"] if any(self.pad_amounts) else []
        shown += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        shown += [f"groups={self.groups}, compact={self._mixing_groups() > 1}"] if self.groups > 1 else []
        shown += ["bias=False"] if self.bias is None else []
        shown += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        shown += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join([*shown, "trained basis" if self.trains_basis else "frozen basis"])


def _check_channels(C: int, K: int, Q: int, groups: int, compact: bool) -> None:
    """Refuse channel counts that are no positive ints or do not divide by the groups."""
    counts = {"in_channels": C, "out_channels": K, "basis_channels": Q, "groups": groups}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{NAME}: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{NAME}: {name} must be at least 1, got {value}")
    for name in ("in_channels", "basis_channels", *(["out_channels"] if compact else [])):
        if counts[name] % groups:
            way_out = "; or mix all groups with compact=False" if name == "out_channels" else ""
            raise ValueError(f"{NAME}: {name} must be divisible by groups = {groups}, got {counts[name]}{way_out}")
