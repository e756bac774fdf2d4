"""``StackedBinaryConv2d``: the layer of the op ``stacked_binary_conv2d``, in the place of a ``torch.nn.Conv2d``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from basisconv_kernels.core import checks
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.estimators import ESTIMATORS, signs
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.layers import stacked_binary_conv2d_fit as fit
from basisconv_kernels.layers import straight_through
from basisconv_kernels.layers.packing import PreparedWeights
from basisconv_kernels.layers.stacked_binary_conv2d_conversion import NAME, Convertible
from basisconv_kernels.ops import stacked_binary_conv2d_planned as planned
from basisconv_kernels.ops.stacked_binary_conv2d import stacked_binary_conv2d
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_pack

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# What a call depends on beside its input and the filters.
REMEMBERED = (
    "stride", "pad_amounts", "padding_mode", "dilation", "groups", "binarize_input", "activation", "estimator",
    "backend", "scale", "bias",
)  # fmt: skip


class _Prepared(NamedTuple):
    """What the op takes: the bank as int8, the index as int64, and both packed for the native kernel."""

    bank: Tensor
    chosen: Tensor
    packed: Tensor | None


class StackedBinaryConv2d(Convertible):
    """Convolution with filters stacked from a shared bank of low-dimensional ±1 filters, a drop-in for Conv2d.

    ``out = act(scale · conv2d(input, Ŵ) + bias)``, ``Ŵ[k] = concat_i bank[index[k, i]]``; ``bank = sign(bank_latent)``
    and ``index = argmax(select_latent)`` while training, bits after ``freeze()``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in Conv2d; padding
            also (top, bottom, left, right). in_channels is divisible by ``groups·splits``.
        bank (int): n, the number of shared filters.
        splits (int): parts of a group's channels, each filled with one filter of the bank.
        bias (bool): a learnable offset [K]; it starts at 0.
        scale (bool): a learnable factor [K] an output. Without it the filters are ±1; a BatchNorm behind the layer can
            do the scaling.
        binarize_input (bool): take the signs of the input (XNOR mode).
        activation (None, "relu" or "relu6"): applied last.
        estimator (str): straight-through estimator of the signs of latents and input: ``"clip"``, ``"approx_sign"``,
            ``"swish_sign"`` or ``"identity"``. The choice of filters passes its gradient on as it is.
        backend: as in ``stacked_binary_conv2d``.
        device, dtype: of the latents.
        generator (torch.Generator, optional): where initial values are drawn from.

    State (keys of the state_dict) while training:
        ``bank_latent`` [n, C/(G·splits), R, S], ``select_latent`` [K, splits, n]: Parameters.
        ``scale`` [K], ``bias`` [K]: Parameters, absent where not asked for.
    after ``freeze()``:
        ``bank_bits`` (uint8 [⌈n·cs·R·S/8⌉]), ``index_bits`` (uint8 [⌈K·splits·⌈log2 n⌉/8⌉]): persistent buffers, the
        bits of the bank in its own order and of the index, lowest first; ``scale`` and ``bias`` as before. A state
        with these keys freezes the layer that loads it.

    Prepared filters are remembered between calls that need no gradient of the latents, as in ``BasisConv2d``; after an
    edit that PyTorch does not see call ``repack()``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names both sides and the way out.

    Source: Lan, Lan 2021, arXiv 2010.02778 (the model); latents and estimators: reconstructed from its text.

    Example:
        >>> import torch
        >>> from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
        >>> layer = StackedBinaryConv2d(256, 256, 3, bank=128, splits=4, padding=1)
        >>> layer(torch.randn(1, 256, 14, 14)).shape
        torch.Size([1, 256, 14, 14])
        >>> frozen = layer.freeze()
        >>> sum(t.nbytes for t in (frozen.bank_bits, frozen.index_bits))  # 2359296 as float32 filters
        10112
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        bank: int,
        splits: int,
        stride: int | Pair = 1,
        padding: int | Pair | Quad | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        scale: bool = True,
        padding_mode: str = "zeros",
        binarize_input: bool = False,
        activation: str | None = None,
        estimator: str = "clip",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_counts(in_channels, out_channels, bank, splits, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.bank, self.splits, self.groups = bank, splits, groups
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
        if estimator not in ESTIMATORS:
            raise ValueError(f"{NAME}: estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        self.padding_mode = padding_mode
        self.binarize_input = binarize_input
        self.activation = activation
        self.estimator = estimator
        self.backend = backend
        self._prepared = PreparedWeights()

        kind = {"device": device, "dtype": dtype}
        self.register_parameter("bank_latent", nn.Parameter(torch.empty(self.bank_shape, **kind)))
        self.register_parameter("select_latent", nn.Parameter(torch.empty(out_channels, splits, bank, **kind)))
        self.register_parameter("scale", nn.Parameter(torch.empty(out_channels, **kind)) if scale else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **kind)) if bias else None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw latents again: uniform in −1..1, where the clipped estimator passes all gradients."""
        if self.frozen:
            raise RuntimeError(f"{NAME}: a frozen layer has no latents to draw again; build a new layer")
        if self.bank_latent is None or self.select_latent is None or self.bank_latent.is_meta:
            return
        for latent in (self.bank_latent, self.select_latent):
            device = "cpu" if generator is None else generator.device
            drawn = torch.rand(latent.shape, generator=generator, device=device, dtype=torch.float32)
            latent.copy_(drawn * 2 - 1)
        if self.scale is not None:  # unit outputs for unit inputs
            self.scale.fill_((self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]) ** -0.5)
        if self.bias is not None:
            self.bias.zero_()

    # --- the call -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        """Run the layer.

        Args:
            input (Tensor[N, C, H, W] or [C, H, W], or PackedTensor): as in ``stacked_binary_conv2d``.

        Returns:
            Tensor[N, K, OH, OW] (or [K, OH, OW]).
        """
        if not is_dynamo_compiling() and (known := self._prepared.repeat(self, input)) is not None:
            return known
        if isinstance(input, Tensor) and input.dim() == 3:
            return self.forward(input[None])[0]
        bank, index, packed = self._filters()
        padded, padding = self._pad(input)
        out = stacked_binary_conv2d(
            padded,
            bank,
            index,
            self.scale,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            binarize_input=self.binarize_input,
            activation=self.activation,
            estimator=self.estimator,
            backend=self.backend,
            packed=packed,
        )
        if packed is not None and padded is input and not torch.compiler.is_compiling():
            self._remember_call(bank, index, packed)
        return out

    def _remember_call(self, bank: Tensor, index: Tensor, packed: Tensor) -> None:
        """Let calls like the one just made go the short way, where the op did, on real input."""
        geometry = (self.stride, self.pad_amounts, self.dilation, self.groups)
        arguments = (*geometry, self.binarize_input, self.activation, self.estimator, self.backend)
        call, tensors = (packed, arguments, planned.REAL), (None, bank, index, self.scale, self.bias)
        sources = ("bank_bits", "index_bits") if self.frozen else ("bank_latent", "select_latent")
        names = (*REMEMBERED, *sources)
        self._prepared.remember(self, planned.plans, call, tensors, holes=(0,), depends_on=names)

    def _pad(self, input: Tensor | PackedTensor) -> tuple[Any, Quad]:
        """Explicit padding where the op has none: reflect, replicate, circular. Exact, since it comes first."""
        if self.padding_mode == "zeros" or not any(self.pad_amounts):
            return input, self.pad_amounts
        if isinstance(input, PackedTensor):
            raise ValueError(
                f"{NAME}: padding_mode={self.padding_mode!r} takes real input, got packed bits; unpack first"
            )
        top, bottom, left, right = self.pad_amounts
        padded = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        return laid_out(padded, memory_format(input)), (0, 0, 0, 0)

    def _filters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(bank, index or selections, packed) for the op."""
        sources = (self.bank_bits, self.index_bits) if self.frozen else (self.bank_latent, self.select_latent)
        if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
            bank = straight_through.sign(self.bank_latent, self.estimator)
            return bank, straight_through.one_hot(self.select_latent), None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._prepare()  # in the graph, where freezing folds it
        return self._prepared.get(sources, (self.groups, self.binarize_input), self._prepare)

    def _prepare(self) -> _Prepared:
        bank, index = self.filters()
        packed = stacked_binary_conv2d_pack(bank, index, groups=self.groups, binarize_input=self.binarize_input)
        return _Prepared(bank.to(torch.int8), index, packed)

    def filters(self) -> tuple[Tensor, Tensor]:
        """(bank [n, cs, R, S] of ±1, index [K, splits] int64) as the next call uses them, without gradients."""
        if self.frozen:
            bank = fit.unpack_bank(self.bank_bits, self.bank_shape, torch.float32)
            return bank, fit.unpack_index(self.index_bits, (self.out_channels, self.splits), self.bank)
        return signs(self.bank_latent.detach()), self.select_latent.detach().argmax(-1)

    # --- bits ---------------------------------------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether the layer holds bits instead of latents."""
        return "bank_bits" in self._buffers

    def freeze(self) -> StackedBinaryConv2d:
        """Turn the latents into bits, in place: what inference and files need. Returns the layer.

        The results stay the same bit by bit. ``scale`` and ``bias`` stay trainable; the latents are gone.
        """
        if not self.frozen:
            bank, index = self.filters()
            self._hold(fit.pack_bank(bank), fit.pack_index(index, self.bank))
        return self

    def _hold(self, bank_bits: Tensor, index_bits: Tensor) -> None:
        self._prepared.clear()
        del self.bank_latent, self.select_latent
        self.register_buffer("bank_bits", bank_bits)
        self.register_buffer("index_bits", index_bits)

    def hold_bits(self) -> StackedBinaryConv2d:
        """Take the frozen form without values of its own, for a loader that brings them. Returns the layer."""
        if not self.frozen:
            device = self.bank_latent.device
            bank_bits = self.bank_latent.numel()
            sizes = (-(-bank_bits // 8), self.payload_bytes - -(-bank_bits // 8))
            self._hold(*(torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}bank_bits" in state_dict:
            self.hold_bits()
        super()._load_from_state_dict(state_dict, prefix, *args)
        errors = args[-1]
        if self.frozen and not self.index_bits.is_meta and self.bank & (self.bank - 1):
            largest = int(self.filters()[1].max())
            if largest >= self.bank:
                errors.append(f"{prefix}index_bits names filter {largest} of a bank of {self.bank}")

    def repack(self) -> StackedBinaryConv2d:
        """Forget remembered filters; the next call makes them again. Returns the layer."""
        self._prepared.clear()
        return self

    def train(self, mode: bool = True) -> StackedBinaryConv2d:
        """As in every module; remembered filters are forgotten."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> StackedBinaryConv2d:
        self._prepared.clear()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The constructor's arguments, defaults left out."""
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        shown += [f"bank={self.bank}, splits={self.splits}, stride={self.stride}"]
        shown += [f"padding={self.padding!r}"] if any(self.pad_amounts) else []
        shown += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        shown += [f"groups={self.groups}"] if self.groups > 1 else []
        shown += ["bias=False"] if self.bias is None else []
        shown += ["scale=False"] if self.scale is None else []
        shown += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        shown += ["binarize_input=True"] if self.binarize_input else []
        shown += [f"activation={self.activation!r}"] if self.activation else []
        return ", ".join([*shown, "frozen" if self.frozen else f"estimator={self.estimator!r}"])


def _check_counts(C: int, K: int, bank: int, splits: int, groups: int) -> None:
    """Refuse counts that are no positive ints or do not divide."""
    counts = {"in_channels": C, "out_channels": K, "bank": bank, "splits": splits, "groups": groups}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{NAME}: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{NAME}: {name} must be at least 1, got {value}")
    if C % (groups * splits):
        raise ValueError(
            f"{NAME}: in_channels must be divisible by groups·splits = {groups}·{splits}, got {C}; choose other "
            "splits, or keep the layer dense (a first layer with 3 channels, say)"
        )
    if K % groups:
        raise ValueError(f"{NAME}: out_channels must be divisible by groups = {groups}, got {K}")
