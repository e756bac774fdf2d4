"""The op ``binary_conv2d``: convolution of ±1 (or few-bit) activations with ±1 filters, exact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import registry, tuning
from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.eager import kinds
from basisconv_kernels.core.packed import PackedTensor, Threshold
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import binary_conv2d_native as native
from basisconv_kernels.ops import binary_conv2d_planned as planned
from basisconv_kernels.ops import binary_conv2d_triton as triton
from basisconv_kernels.ops.basis_conv2d_native import BACKENDS
from basisconv_kernels.ops.binary_conv2d_arguments import Sizes, check_scale_group, normal_form
from basisconv_kernels.reference import binary_conv2d as reference
from basisconv_kernels.reference.binary_conv2d import Settings
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem

OP = "binary_conv2d"


# --- backends ---------------------------------------------------------------------------------------------------------


def _cpu_supports(problem: Any) -> list[str]:
    against = []
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in native.DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _reference_supports(problem: Any) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.binary_conv2d_native:forward", _cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.binary_conv2d_native:forward",
        native.cuda_supports,
        check="basisconv_kernels.ops.binary_conv2d_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.binary_conv2d_triton:forward",
        triton.supports,
        check="basisconv_kernels.ops.binary_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.reference.binary_conv2d:forward", _reference_supports),
)

_targets: dict[str, Callable[..., Tensor]] = {}


def _forward(backend: str) -> Callable[..., Tensor]:
    target = _targets.get(backend)
    if target is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        target = _targets[backend] = registry.resolve(candidate)
    return target


def _choose(
    device: str, dtype: torch.dtype, channels_last: bool, sizes: tuple[int, ...], asked: str | None, *fixed: Any
) -> str:
    """Name of the backend. It looks only at what stays when batch and map size change: a constant in a graph."""
    problem = problem_of(device, dtype, channels_last, Sizes(*sizes), Settings._make((*fixed, "")))
    asked = asked or registry.wish()
    slower = {} if asked else tuning.slower(OP, problem)
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    _forward(chosen.name)
    return chosen.name


_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def problem_of(
    device: str, dtype: torch.dtype, channels_last: bool, sizes: Sizes, settings: Settings
) -> BinaryConv2dProblem:
    """What the choice sees of a call; ``dtype`` is that of a real input, of the float result for a packed one."""
    return BinaryConv2dProblem(
        C=sizes.C,
        K=sizes.K,
        R=sizes.R,
        S=sizes.S,
        stride=settings.stride,
        padding=settings.padding,
        padding_value=settings.padding_value,
        dilation=settings.dilation,
        groups=settings.groups,
        planes=sizes.planes,
        unsigned=settings.encoding == "unsigned",
        dtype=dtype,
        device=device,
        channels_last=channels_last,
        activation=settings.activation,
        output=settings.output,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def _without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it changes something: under ``create_graph`` only."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class BinaryConv2dFunction(torch.autograd.Function):
    """``binary_conv2d`` to floats with its explicit gradients; call ``binary_conv2d`` itself, which checks first."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        pixel_scale: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        """Run the backend that ``settings`` names."""
        return _forward(settings.backend)(input, weight, scale, bias, pixel_scale, None, packed, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, and the result only where the activation's slope is read off it; v is computed again."""
        input, weight, scale, bias, pixel_scale, _, settings = inputs
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, scale, pixel_scale, output if settings.activation else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The formulas of ``reference.binary_conv2d.backward``."""
        input, weight, scale, pixel_scale, output = ctx.saved_tensors
        with _without_graph():
            wanted = tuple(ctx.needs_input_grad[:5])
            found = reference.backward(grad_output, output, input, weight, scale, pixel_scale, ctx.settings, wanted)
            gradients = [
                None if gradient is None else gradient.to(dtype)
                for gradient, dtype in zip(
                    found,
                    (input.dtype, weight.dtype, scale if scale is None else scale.dtype, ctx.bias_dtype,
                     pixel_scale if pixel_scale is None else pixel_scale.dtype),
                    strict=True,
                )
            ]  # fmt: skip
        depends_on = [t for t in (grad_output, input, weight, scale, pixel_scale) if t is not None]
        floats = [t for t in depends_on if t.is_floating_point()]
        return (*refuse_double_backward(OP, floats, gradients), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


class _OneOf(torch.autograd.Function):
    """``scale[scale_group]`` whose gradient adds up in a fixed order, as that of indexing does not everywhere."""

    @staticmethod
    def forward(scale: Tensor, scale_group: Tensor) -> Tensor:
        return scale.index_select(0, scale_group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.count = inputs[0].shape[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (scale_group,) = ctx.saved_tensors
        places = torch.arange(ctx.count, device=scale_group.device)
        return (places[:, None] == scale_group).to(gradient.dtype) @ gradient, None


def _apply(*arguments: Any) -> Tensor:
    """``BinaryConv2dFunction.apply``; in eager mode without its binding by signature, 50 us a call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return BinaryConv2dFunction.apply(*arguments)
    return super(torch.autograd.Function, BinaryConv2dFunction).apply(*arguments)


# --- the public function ----------------------------------------------------------------------------------------------


def _normal_form(tensors: tuple[Any, ...], arguments: tuple[Any, ...], asked: str | None) -> tuple[Settings, Sizes]:
    """Check the arguments and choose the backend."""
    settings, sizes = normal_form(*tensors, *arguments)
    input = tensors[0]
    packed = isinstance(input, PackedTensor)
    dtype = settings.dtype if packed else input.dtype
    channels_last = reference.layout_of(input, settings) == torch.channels_last
    backend = _choose(input.device.type, dtype, channels_last, tuple(sizes), asked, *settings[:-1])
    return settings._replace(backend=backend), sizes


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], tuple[Settings, Sizes]] = {}


def _signature(value: Any) -> Any:
    """What the checks and the choice see of a tensor."""
    if value is None:
        return None
    if isinstance(value, PackedTensor):
        words = value.words
        parts = (value.channels, value.planes, value.encoding, value.word_bits, value.bit_order, value.version)
        return (words.shape, words.stride(), words.dtype, words.device, *parts)
    if isinstance(value, Threshold):
        return (value.value.shape, value.value.dtype, value.value.device)
    return (value.shape, value.dtype, value.device, value.layout)


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...], asked: str | None) -> tuple[Settings, Sizes]:
    """``_normal_form``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    try:
        strides = tensors[0].stride() if isinstance(tensors[0], Tensor) else None
        device = tensors[0].device.type
        cast = device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        wish = (asked, registry.wish(), cast)
        key = (*map(_signature, tensors), strides, *arguments, *map(kinds, arguments[:5]), *wish)
        found = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no dense tensor, or a list for a tuple: the checks know
        return _normal_form(tensors, arguments, asked)
    if found is None:
        found = _normal_form(tensors, arguments, asked)
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        _plans[key] = found
    return found


def binary_conv2d(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedTensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    padding_value: int = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    threshold: Threshold | None = None,
    scale_group: Tensor | None = None,
    pixel_scale: Tensor | None = None,
    output: str = "float",
    estimator: str | tuple[str, str] = "clip",
    backend: str | None = None,
    packed: Tensor | None = None,
) -> Any:
    """Convolution of the signs of the input with the signs of the filters, in whole numbers.

    ``v = conv2d(sign(input), sign(weight))``, then ``out = act(v·scale·pixel_scale + bias)``, ``v`` or bits of ``v``

    Args:
        input (Tensor[N, C, H, W] or PackedTensor): real numbers of any float dtype and strides, whose sign is taken
            inside (``x >= 0`` is +1, so ±0 is +1 and NaN is −1); or what ``bitpack`` made: signs, or unsigned codes of
            1 to 4 bits, which enter as the numbers 0 to 2^bits − 1. N may be 0.
        weight (Tensor[K, C/groups, R, S] or PackedTensor): real numbers of any float dtype, whose sign is taken inside;
            or ``bitpack`` of them.
        scale (Tensor[K], optional): a factor an output, XNOR-Net's α; may be negative or zero.
        bias (Tensor[K], optional): added after the factors.
        stride, dilation (int or pair): (vertical, horizontal), in pixels.
        padding (int, pair, quadruple or str): as in ``basis_conv2d``, in pixels.
        padding_value (0, 1 or -1): what the padding counts as. 0 adds nothing, as float training does it; signs
            alone take ±1, unsigned codes only 0.
        groups (int): channel groups.
        activation (None, "relu" or "relu6"): of a float result, applied last.
        threshold (Threshold[K], optional): for ``output="packed"``: which v become the bit 1; None is ``v >= 0``.
            ``Threshold.fold`` makes it of scale, bias and the BatchNorm behind them.
        scale_group (Tensor[K], optional): int64; output k takes ``scale[scale_group[k]]``: filters that share a scale.
        pixel_scale (Tensor[N, 1, OH, OW], optional): a factor a pixel, XNOR-Net's map of input magnitudes; see
            ``magnitude_map``.
        output (str): ``"float"``; ``"int32"``, v itself; ``"packed"``, bits for the next layer, a ``PackedTensor``.
        estimator (str or pair): what stands in for the derivative of sign in the gradients of input and weight:
            ``"clip"`` (1 where |x| ≤ 1), ``"approx_sign"``, ``"swish_sign"`` or ``"identity"``.
        backend (str, optional): run on this backend or raise; None chooses.
        packed (Tensor, optional): ``binary_conv2d_pack`` of the same weight and geometry, which spares the native
            kernel the packing; ignored by backends that need none.

    Returns:
        Tensor[N, K, OH, OW] or PackedTensor: floats have the dtype of a real input, for a packed one that of scale,
        bias or pixel_scale, else float32; under autocast its dtype, while signs are taken before any cast. The memory
        format is that of a real input, and channels_last for a packed one.

    v is exact, the same on every backend. A float result is computed in float32 (float64 for float64) and rounded once.
    Of a float result input, weight, scale, bias and pixel_scale have gradients, the same in every run; integers and
    bits have none. Double backward and ``torch.vmap`` are refused.

    Raises:
        TypeError: a dtype or kind of argument that does not fit.
        ValueError: shapes or values that do not fit, a packed format that is not known; the message names both.
        BackendUnavailable: ``backend`` cannot run this call.

    Source: Rastegari, Ordonez, Redmon, Farhadi 2016, "XNOR-Net", arXiv 1603.05279. Estimators: clip, Hubara et al.
    2016, arXiv 1602.02830; approx_sign, Liu et al. 2018, arXiv 1808.00278; swish_sign, Darabi et al. 2018, arXiv
    1812.11800.

    Example:
        >>> import torch
        >>> from basisconv_kernels import binary_conv2d, bitpack
        >>> x, weight = torch.randn(1, 64, 28, 28), torch.randn(128, 64, 3, 3)
        >>> scale = weight.abs().mean((1, 2, 3))
        >>> binary_conv2d(x, weight, scale, padding=1).shape
        torch.Size([1, 128, 28, 28])
        >>> bits = binary_conv2d(bitpack(x), bitpack(weight), padding=1, output="packed")
        >>> bits.shape, bits.words.shape
        ((1, 128, 28, 28), torch.Size([1, 1, 28, 28, 4]))
    """
    tensors = (input, weight, scale, bias, pixel_scale, threshold, scale_group)
    arguments = (stride, padding, padding_value, dilation, groups, activation, output, estimator)
    eager = not torch.compiler.is_compiling()
    if packed is not None and eager:
        result = planned.run(tensors, packed, (*arguments, backend))
        if result is not None:
            return result
    if not eager:
        settings, sizes = _normal_form(tensors, arguments, backend)
    else:
        settings, sizes = _plan(tensors, arguments, backend)
    if scale_group is not None:
        if scale_group.device.type == "cpu" and eager:
            check_scale_group(scale, scale_group)  # type: ignore[arg-type]
        scale = _OneOf.apply(scale, scale_group)
    operands = (
        input.words if isinstance(input, PackedTensor) else input,
        weight.words if isinstance(weight, PackedTensor) else weight,
        scale,
        bias,
        pixel_scale,
    )
    found = _run(operands, threshold, packed, settings)
    if packed is not None and settings.backend in BACKENDS and eager:
        planned.remember(tensors, packed, (*arguments, backend), settings)
    return PackedTensor(found, sizes.K) if output == "packed" else found


def _run(operands: tuple[Any, ...], threshold: Threshold | None, packed: Tensor | None, settings: Settings) -> Tensor:
    """The autograd Function where something needs a gradient, else the backend itself."""
    if settings.output != "float":
        input, weight = (t.detach() for t in operands[:2])
        return _forward(settings.backend)(input, weight, None, None, None, threshold, packed, settings)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if needs_gradient or torch._C._are_functorch_transforms_active():
        return _apply(*operands, packed, settings)
    return _forward(settings.backend)(*operands, None, packed, settings)
