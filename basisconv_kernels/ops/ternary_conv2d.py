"""The op ``ternary_conv2d``: convolution with weights −1, 0 and +1, held as two bit planes, and one or two scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import registry, tuning
from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import ternary_conv2d_cuda as cuda
from basisconv_kernels.ops import ternary_conv2d_native as native
from basisconv_kernels.ops import ternary_conv2d_planned as planned
from basisconv_kernels.ops import ternary_conv2d_triton as triton
from basisconv_kernels.ops.ternary_conv2d_arguments import OP, Sizes, check_planes, normal_form
from basisconv_kernels.reference import ternary_conv2d as reference
from basisconv_kernels.reference.bitpack import unpack as unpack_bits
from basisconv_kernels.reference.ternary_conv2d_problem import SCALES, TernaryConv2dProblem


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form; ``backend`` is the one chosen."""

    stride: Pair
    padding: Quad
    dilation: Pair
    groups: int
    activation: str | None
    backend: str


# --- backends ---------------------------------------------------------------------------------------------------------


def _reference_supports(problem: TernaryConv2dProblem) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.ternary_conv2d_native:forward", native.cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.ternary_conv2d_cuda:forward",
        cuda.supports,
        check="basisconv_kernels.ops.ternary_conv2d_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.ternary_conv2d_triton:forward",
        triton.supports,
        check="basisconv_kernels.ops.ternary_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.ops.ternary_conv2d:_reference_forward", _reference_supports),
)


def _reference_forward(
    input: Tensor,
    planes: Tensor,
    scale: Tensor | None,
    negative_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    return reference.forward(input, planes, scale, negative_scale, bias, *settings[:-1])


_targets: dict[str, Callable[..., Tensor]] = {}


def _forward(backend: str) -> Callable[..., Tensor]:
    target = _targets.get(backend)
    if target is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        target = _targets[backend] = registry.resolve(candidate)
    return target


def _choose(
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    sizes: Sizes,
    scales: int,
    asked: str | None,
    *fixed: Any,
) -> str:
    """Name of the backend. It looks only at what stays when batch and map size change: a constant in a graph."""
    problem = problem_of(device, dtype, layout, sizes, scales, Settings._make((*fixed, "")))
    asked = asked or registry.wish()
    slower = {} if asked else tuning.slower(OP, problem)
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    _forward(chosen.name)
    return chosen.name


_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what assume_constant_result sets


def problem_of(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: Sizes, scales: int, settings: Settings
) -> TernaryConv2dProblem:
    """What the choice sees of a call; ``sizes`` are (C/G, K, R, S), ``scales`` how many there are."""
    taps_in, K, R, S = sizes
    return TernaryConv2dProblem(
        C=taps_in * settings.groups,
        K=K,
        R=R,
        S=S,
        stride=settings.stride,
        padding=settings.padding,
        dilation=settings.dilation,
        groups=settings.groups,
        scales=SCALES[scales],
        dtype=dtype,
        device=device,
        channels_last=layout == torch.channels_last,
        activation=settings.activation,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


class TernaryConv2dFunction(torch.autograd.Function):
    """``ternary_conv2d`` with its explicit gradients; call ``ternary_conv2d`` itself, which checks and casts first."""

    @staticmethod
    def forward(
        input: Tensor,
        planes: Tensor,
        scale: Tensor | None,
        negative_scale: Tensor | None,
        bias: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        """Run the backend that ``settings`` names."""
        return _forward(settings.backend)(input, planes, scale, negative_scale, bias, packed, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; the result only where the activation's slope is read off it."""
        input, planes, scale, negative_scale, _, _, settings = inputs
        ctx.settings = settings
        ctx.save_for_backward(input, planes, scale, negative_scale, output if settings.activation else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The formulas of ``reference.ternary_conv2d.backward``."""
        input, planes, scale, negative_scale, output = ctx.saved_tensors
        needed = ctx.needs_input_grad
        wanted = (needed[0], needed[2], needed[3], needed[4])
        stride, padding, dilation, groups, activation, _ = ctx.settings
        tensors = (grad_output, output, input, planes, scale, negative_scale)
        with torch.no_grad():
            found = reference.backward(*tensors, stride, padding, dilation, groups, activation, wanted)
        depends_on = [t for t in (grad_output, input, scale, negative_scale) if t is not None]
        d_input, *others = refuse_double_backward(OP, depends_on, found)
        return d_input, None, *others, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


# --- the public functions ---------------------------------------------------------------------------------------------


def ternary_planes(weight: Tensor) -> Tensor:
    """The two bit planes of ternary weights, as ``ternary_conv2d`` takes them.

    Args:
        weight (Tensor[K, C/groups, R, S]): −1, 0 and +1, in any dtype.

    Returns:
        Tensor[K, 2, R, S, words] (int32): plane 0 has the bits of the +1, plane 1 those of the −1 weights; channel c of
        the group is bit ``c mod 32`` of word ``c div 32``, and bits past C/groups are zero.

    Raises:
        ValueError: another value among the weights.

    Example:
        >>> import torch
        >>> from basisconv_kernels.ops.ternary_conv2d import ternary_planes, ternary_weight
        >>> weight = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1)
        >>> ternary_planes(weight).flatten().tolist()
        [1, 4]
        >>> torch.equal(ternary_weight(ternary_planes(weight), 3), weight)
        True
    """
    if not isinstance(weight, Tensor) or weight.dim() != 4 or 0 in weight.shape:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"ternary_planes: weight must be [K, C/groups, R, S] with no empty side, got {shape}")
    return reference.pack_planes(weight)


def ternary_weight(planes: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights −1, 0, +1 [K, C/groups, R, S] that planes stand for; ``channels`` is C/groups."""
    check_planes("ternary_weight", planes, channels)
    problem = reference.planes_problem(planes, channels)
    if problem is not None:
        raise ValueError(f"ternary_weight: {problem}, so these are no planes of {channels} channels")
    return reference.unpack_weight(planes, channels, dtype)


def ternary_conv2d(
    input: Tensor | PackedTensor,
    planes: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    negative_scale: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    backend: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Convolution with weights +scale, 0 and −negative_scale, which take two bits each.

    ``out = act(scale·conv2d(input, plus) − negative_scale·conv2d(input, minus) + bias)``

    Args:
        input (Tensor[N, C, H, W]): images or feature maps, NCHW, channels_last or any strided view; N may be 0. Or a
            ``PackedTensor`` of signs or of few-bit codes: whole numbers, whose sums are exact; it has no gradient, and
            the result is channels_last in the dtype of ``scale``, float32 without one.
        planes (Tensor[K, 2, R, S, words], int32): ``ternary_planes`` of the weights −1, 0, +1; ``plus`` and ``minus``
            are the ones of either plane. ``words = ceil(C/groups / 32)``. They have no gradient.
        scale (Tensor[K] or one number, optional): σ, of the +1 weights, and of the −1 weights without
            ``negative_scale``; None is 1.
        bias (Tensor[K], optional): added after the scale.
        negative_scale (Tensor[K] or one number, optional): of the −1 weights, where it is another (TTQ): it stands for
            the weight ``−negative_scale``, so a positive one keeps their sign. Needs ``scale``.
        stride, padding, dilation, groups: as in ``basis_conv2d``: padding also (top, bottom, left, right), ``"same"``
            (stride 1 only) or ``"valid"``, with exact zeros.
        activation (None, "relu" or "relu6"): applied last.
        backend (str, optional): run on this backend or raise; None chooses.
        packed (Tensor, optional): ``ternary_conv2d_pack`` of the same planes and groups, which spares the native kernel
            the packing; ignored by backends that need none.

    Returns:
        Tensor[N, K, OH, OW]: in the dtype of ``input`` and in the memory format that its strides state by PyTorch's own
        rule.

    input, scale, negative_scale and bias have gradients; ``d negative_scale = −Σ`` over the −1 weights of the dense
    weight gradient. Double backward and ``torch.vmap`` are refused. Under autocast the tensors are cast to the autocast
    dtype. float32 and float64 compute in their own dtype; bfloat16 and float16 in float32, and the result is rounded
    once. Two runs give the same bits.

    Raises:
        TypeError: a dtype that is not float32, bfloat16, float16 or float64, mixed dtypes, planes that are not int32.
        ValueError: shapes or values that do not fit; the message names both.
        BackendUnavailable: ``backend`` cannot run this call.

    Sources: Grimaldi, Tenace, Calimera 2019 (Future Internet 11(1), 7); TWN, arXiv 1605.04711; TTQ, arXiv 1612.01064.

    Example:
        >>> import torch
        >>> from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d, ternary_planes
        >>> planes = ternary_planes(torch.randint(-1, 2, (128, 64, 3, 3)))
        >>> ternary_conv2d(torch.randn(1, 64, 28, 28), planes, torch.tensor(0.05), padding=1, activation="relu").shape
        torch.Size([1, 128, 28, 28])
    """
    arguments = (stride, padding, dilation, groups, activation, backend)
    if isinstance(input, PackedTensor):
        done = _of_bits(input, (planes, scale, negative_scale, bias), packed, arguments)
        if done is not None:
            return done
        input = _unpacked(input, _dtype_of(scale))
    tensors: tuple[Any, ...] = (input, planes, scale, negative_scale, bias)
    if packed is not None and not torch.compiler.is_compiling():
        result = planned.run(tensors, packed, arguments)
        if result is not None:
            return result
    if isinstance(input, Tensor) and (cast := _autocast(tensors)) is not None:
        with torch.autocast(input.device.type, enabled=False):
            return _run(cast, packed, arguments)
    return _run(tensors, packed, arguments)


def _dtype_of(scale: Any) -> torch.dtype:
    return scale.dtype if isinstance(scale, Tensor) else torch.float32


def _of_bits(
    bits: PackedTensor, others: tuple[Any, ...], packed: Tensor | None, arguments: tuple[Any, ...]
) -> Tensor | None:
    """The result where the native kernel adds the bits' numbers in 16 bits; None where they must be unpacked."""
    planes = others[0]
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    trained = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    if traced or trained or torch.is_autocast_enabled("cpu") or not isinstance(planes, Tensor) or planes.dim() != 5:
        return None
    if not native.takes_bits(bits, planes):
        return None
    dtype = _dtype_of(others[1])
    like = torch.zeros((), dtype=dtype, device=bits.device).expand(bits.shape)
    settings = _plan((like, *others), arguments)
    if settings.backend != "cpu":
        return None
    outputs = planes.shape[0]
    scale, negative_scale, bias = (None if t is None else t.float() for t in others[1:])
    scale, negative_scale = _per_output(scale, outputs), _per_output(negative_scale, outputs)
    return native.forward_bits(bits, planes, scale, negative_scale, bias, packed, settings).to(dtype)


def _unpacked(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Signs and codes as numbers [N, C, H, W], channels_last as their words are; exact in every dtype."""
    values = unpack_bits(packed.words, packed.channels, packed.encoding).to(dtype)
    return laid_out(values, torch.channels_last)


def _autocast(tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The tensors in the autocast dtype (float64 stays, and so do planes); None outside autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], Settings] = {}


def _checked(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Settings:
    """The arguments checked, and the backend chosen."""
    input = tensors[0]
    fixed, sizes, scales = normal_form(*tensors, *arguments[:-1])
    count = sum(value is not None for value in scales)
    layout = memory_format(input)
    return Settings(*fixed, _choose(input.device.type, input.dtype, layout, sizes, count, arguments[-1], *fixed))


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Settings:
    """``_checked``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    try:
        signature = [(t.shape, t.dtype, t.device, t.layout) if t is not None else None for t in tensors]
        # 1, 1.0 and True are equal, but not all of them are good strides.
        kinds = [tuple(map(type, a)) if isinstance(a, tuple) else type(a) for a in arguments[:4]]
        key = (*signature, tensors[0].stride(), *arguments, *kinds, registry.wish())
        found = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no dense tensor, or a list for a tuple: the checks know
        return _checked(tensors, arguments)
    if found is None:
        found = _checked(tensors, arguments)
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        _plans[key] = found
    return found


def _per_output(scale: Tensor | None, outputs: int) -> Tensor | None:
    """A scale as [K]: one number serves all outputs."""
    if scale is None or (scale.dim() == 1 and scale.shape[0] == outputs):
        return scale
    return scale.reshape(1).expand(outputs)


def _run(tensors: tuple[Any, ...], packed: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
    """Plan, then the autograd Function where something needs a gradient, else the backend itself."""
    settings = _checked(tensors, arguments) if torch.compiler.is_compiling() else _plan(tensors, arguments)
    input, planes, scale, negative_scale, bias = tensors
    K = planes.shape[0]
    operands = (input, planes, _per_output(scale, K), _per_output(negative_scale, K), bias)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if needs_gradient or torch._C._are_functorch_transforms_active():
        return TernaryConv2dFunction.apply(*operands, packed, settings)
    result = _forward(settings.backend)(*operands, packed, settings)
    if packed is not None and settings.backend == "cpu" and not torch.compiler.is_compiling():
        planned.remember(tensors, packed, arguments, settings)
    return result
