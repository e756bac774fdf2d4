"""Filter bases of trained networks: the orthogonality loss and the statistics of a layer's input patches.

The decomposition itself is ``layers.decompose``, since the layer needs it too.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels.core import checks
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.folding import wide

FORMS = ("cosine", "frobenius")
ROWS_TOGETHER = 512  # of several bases in one product, whose blocks off the diagonal are work for nothing


def orthogonality_loss(module_or_tensor: nn.Module | Tensor, groups: int = 1, form: str = "cosine") -> Tensor:
    """How far the rows of a filter basis are from orthogonal; 0 where they are, differentiable.

    ``cosine``: ``Σ_{q≠r} (f̂_q·f̂_r)² / (Q(Q−1))`` with ``f̂ = f/‖f‖``, blind to the lengths of the rows.
    ``frobenius``: ``‖F·Fᵀ − I‖² / Q²``, which holds the lengths at 1 too. Per group, averaged over the groups; the
    cosine form is 0 for one row a group, and no less than ``(Q−D)/(D(Q−1))`` where Q exceeds the length D of a row.

    Args:
        module_or_tensor (Module or Tensor[Q, C/G, R, S] or [Q, D]): a basis, or a layer or network: then the sum over
            its ``BasisConv2d`` layers whose basis is trained.
        groups (int): G, for a tensor; a layer knows its own.
        form ("cosine" or "frobenius"): which of the two.

    Returns:
        Tensor[]: a scalar, float32 at least.

    Raises:
        ValueError: no layer trains its basis (a loss without a gradient would train nothing), or another form.

    Source: the term of Tayyab, Khan, Mahalanobis 2021, arXiv 2105.10436, without its part that is always 0.

    Example:
        >>> import torch
        >>> from basisconv_kernels.compression.basis import orthogonality_loss
        >>> float(orthogonality_loss(torch.eye(4, 9)))
        0.0
        >>> float(orthogonality_loss(torch.ones(4, 9))) > 0.99
        True
    """
    if form not in FORMS:
        raise ValueError(f"orthogonality_loss: form must be one of {', '.join(FORMS)}, got {form!r}")
    if isinstance(module_or_tensor, Tensor):
        return _loss(module_or_tensor, groups, form)
    layers = [m for m in module_or_tensor.modules() if isinstance(m, BasisConv2d) and m.trains_basis]
    if not layers:
        raise ValueError(
            "orthogonality_loss: no BasisConv2d of this module trains its basis, so the loss would train nothing; "
            "call train_basis() on the layers, or compress with train_basis=True"
        )
    return torch.stack(
        [_loss(layer.basis_weight, layer.groups, form) for layer in layers if layer.groups > 1 or form != "cosine"]
        + [_cosine_together(bases) for bases in _batches(layers) if form == "cosine"]
    ).sum()


def _batches(layers: list[BasisConv2d]) -> list[list[Tensor]]:
    """The ungrouped bases as [Q, D], those of one D, dtype and device together, a few hundred rows at once."""
    found: list[list[Tensor]] = []
    last: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    for layer in layers:
        if layer.groups > 1:
            continue
        basis = layer.basis_weight
        if basis.is_contiguous(memory_format=torch.channels_last):  # the order of a filter's taps does not matter
            basis = basis.permute(0, 2, 3, 1)
        rows = basis.flatten(1)
        key = (rows.shape[1], rows.dtype, rows.device)
        if key not in last or sum(map(len, last[key])) + len(rows) > ROWS_TOGETHER:
            last[key] = []
            found.append(last[key])
        last[key].append(rows)
    return found


def _cosine_together(bases: list[Tensor]) -> Tensor:
    """Σ of the cosine form over bases of one row length, by one product: small networks are bound by launches."""
    block, share = _blocks(tuple(map(len, bases)), bases[0].device)
    unit = F.normalize(torch.cat(bases).to(wide(bases[0].dtype)), dim=1)
    gram = unit @ unit.mT
    within = (block[:, None] == block).fill_diagonal_(False)
    return ((gram * within).square().sum(1) * share.to(gram.dtype)).sum()


@functools.cache
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row: the number of its basis, and 1/(Q(Q−1)). Remembered, since a CUDA graph cannot copy them anew."""
    with torch.inference_mode(False):
        block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        share = torch.tensor([1 / max(1, size * (size - 1)) for size in sizes], dtype=torch.float64)[block]
        return block.to(device), share.to(device)


def _loss(basis: Tensor, groups: int, form: str) -> Tensor:
    Q = basis.shape[0]
    if basis.dim() < 2 or groups < 1 or Q < 1 or Q % groups:
        raise ValueError(
            f"orthogonality_loss: the basis must be [Q, C/groups, R, S] with Q divisible by groups = {groups}, "
            f"got {list(basis.shape)}"
        )
    per_group = Q // groups
    rows = basis.reshape(groups, per_group, -1).to(wide(basis.dtype))
    if form == "frobenius":
        gram = rows @ rows.mT
        return (gram - torch.eye(per_group, dtype=gram.dtype, device=gram.device)).square().sum() / (
            groups * per_group**2
        )
    unit = F.normalize(rows, dim=2)
    gram = unit @ unit.mT
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    return off_diagonal.square().sum() / (groups * max(1, per_group * (per_group - 1)))


class PatchCorrelation:
    """Mean of p·pᵀ over the input patches p of a convolution, gathered batch by batch in float64.

    ``value`` is Tensor[G, D, D], the ``input_correlation`` of ``BasisConv2d.from_conv``. It takes 8·G·D² bytes: 42 MB
    for a 3×3 convolution of 256 channels.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv
        taps = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        self._sum = torch.zeros(conv.groups, taps, taps, dtype=torch.float64)
        self._count = 0

    def add(self, input: Tensor) -> None:
        """Take in an input [N, C, H, W] (or [C, H, W]) of the convolution."""
        conv = self._conv
        kernel, stride, dilation = (checks.pair("PatchCorrelation", "size", v, at_least=1)
                                    for v in (conv.kernel_size, conv.stride, conv.dilation))  # fmt: skip
        top, bottom, left, right = checks.padding4("PatchCorrelation", conv.padding, kernel, stride, dilation)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        for image in input.detach().reshape(-1, *input.shape[-3:]).split(1):
            padded = F.pad(image.to("cpu", torch.float64), (left, right, top, bottom), mode=mode)
            patches = F.unfold(padded, kernel, dilation, 0, stride)[0].reshape(conv.groups, self._sum.shape[1], -1)
            self._sum += patches @ patches.mT
            self._count += patches.shape[2]

    @property
    def value(self) -> Tensor:
        """Tensor[G, D, D].

        Raises:
            ValueError: nothing was taken in.
        """
        if self._count == 0:
            raise ValueError("PatchCorrelation: no input was taken in, so there is no mean; run the network first")
        return self._sum / self._count
