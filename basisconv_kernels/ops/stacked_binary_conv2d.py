"""The op ``stacked_binary_conv2d``: one bank of low-dimensional ±1 filters over all channel splits, then stacking."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import log, registry, selfcheck, tuning
from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.eager import kinds
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import stacked_binary_conv2d_native as native
from basisconv_kernels.ops import stacked_binary_conv2d_planned as planned
from basisconv_kernels.ops import stacked_binary_conv2d_triton as triton
from basisconv_kernels.ops.stacked_binary_conv2d_arguments import OP, Sizes, check_values, normal_form
from basisconv_kernels.reference import stacked_binary_conv2d as reference
from basisconv_kernels.reference.stacked_binary_conv2d import Settings
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem

# --- backends ---------------------------------------------------------------------------------------------------------


def _cpu_supports(problem: StackedBinaryConv2dProblem) -> list[str]:
    against = []
    if not native.PRESENT:
        against.append("the native library was built without this op")
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in native.DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _reference_supports(problem: StackedBinaryConv2dProblem) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.stacked_binary_conv2d_native:forward", _cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.stacked_binary_conv2d_native:forward_on_cuda",
        native.cuda_supports,
        check="basisconv_kernels.ops.stacked_binary_conv2d_native:cuda_check",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.stacked_binary_conv2d_triton:forward",
        triton.supports,
        check="basisconv_kernels.ops.stacked_binary_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.reference.stacked_binary_conv2d:forward", _reference_supports),
)

_targets: dict[str, Callable[..., Tensor]] = {}


def _forward(backend: str) -> Callable[..., Tensor]:
    target = _targets.get(backend)
    if target is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        target = _targets[backend] = registry.resolve(candidate)
    return target


def _choose(device: str, layout: torch.memory_format, sizes: tuple[int, ...], asked: str | None, *settings: Any) -> str:
    """Name of the backend. It looks only at what stays when batch and map size change: a constant in a graph.

    Plain tuples are what a graph's tracer passes on as constants.
    """
    problem = problem_of(device, layout, Sizes(*sizes), Settings(*settings))
    asked = asked or registry.wish()
    slower = {} if asked else tuning.slower(OP, problem)
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    _forward(chosen.name)
    if chosen.name == "cpu" and native.stacked_binary_conv2d_form(*problem.shapes, problem.groups) == "expanded":
        log.once(
            f"{OP} [{problem}]: the {problem.n} bank filters over all splits cost no less than full ones, which run"
        )
    return chosen.name


_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def problem_of(
    device: str, layout: torch.memory_format, sizes: Sizes, settings: Settings
) -> StackedBinaryConv2dProblem:
    """What the choice sees of a call."""
    signs = settings.binarize or settings.encoding == "sign"
    return StackedBinaryConv2dProblem(
        C=settings.channels,
        K=sizes.K,
        n=sizes.n,
        splits=sizes.splits,
        R=sizes.R,
        S=sizes.S,
        stride=settings.stride,
        padding=settings.padding,
        dilation=settings.dilation,
        groups=settings.groups,
        mode="signs" if signs else "real" if settings.encoding is None else "codes",
        planes=sizes.planes,
        dtype=settings.dtype,
        device=device,
        channels_last=layout == torch.channels_last,
        activation=settings.activation,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def _without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it changes something: under ``create_graph`` only."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class StackedBinaryConv2dFunction(torch.autograd.Function):
    """``stacked_binary_conv2d`` with its explicit gradients; call that function itself, which checks first."""

    @staticmethod
    def forward(
        input: Tensor,
        bank: Tensor,
        selection: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        index: Tensor,
        packed: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        """Run the backend that ``settings`` names; ``selection`` stands for ``index`` and is there for its gradient."""
        return _forward(settings.backend)(input, bank, index, scale, bias, packed, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, and the result only where the activation's slope is read off it."""
        input, bank, selection, scale, bias, index, _, settings = inputs
        ctx.settings = settings
        ctx.dtypes = [None if t is None else t.dtype for t in (input, bank, selection, scale, bias)]
        ctx.save_for_backward(input, bank, scale, index, output if settings.activation else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The formulas of ``reference.stacked_binary_conv2d.backward``."""
        input, bank, scale, index, output = ctx.saved_tensors
        with _without_graph():
            wanted = tuple(ctx.needs_input_grad[:5])
            found = reference.backward(grad_output, output, input, bank, index, scale, ctx.settings, wanted)
            gradients = [
                None if gradient is None else gradient.to(dtype)
                for gradient, dtype in zip(found, ctx.dtypes, strict=True)
            ]
        depends_on = [t for t in (grad_output, input, bank, scale) if t is not None and t.is_floating_point()]
        return (*refuse_double_backward(OP, depends_on, gradients), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


def _apply(*arguments: Any) -> Tensor:
    """``StackedBinaryConv2dFunction.apply``; in eager mode without its binding by signature, 50 us a call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return StackedBinaryConv2dFunction.apply(*arguments)
    return super(torch.autograd.Function, StackedBinaryConv2dFunction).apply(*arguments)


# --- the public function ----------------------------------------------------------------------------------------------


def _normal_form(tensors: tuple[Any, ...], arguments: tuple[Any, ...], asked: str | None) -> tuple[Settings, Sizes]:
    """Check the arguments and choose the backend."""
    settings, sizes = normal_form(*tensors, *arguments)
    input = tensors[0]
    layout = torch.channels_last if isinstance(input, PackedTensor) else memory_format(input)
    return settings._replace(backend=_choose(input.device.type, layout, tuple(sizes), asked, *settings)), sizes


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], tuple[Settings, Sizes]] = {}


def _signature(value: Any) -> Any:
    """What the checks and the choice see of a tensor; the checks of a packed one ran when it was made."""
    if value is None:
        return None
    if isinstance(value, PackedTensor):
        return (value.words.shape, value.channels, value.planes, value.encoding, value.device)
    return (value.shape, value.dtype, value.device, value.layout)


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...], asked: str | None) -> tuple[Settings, Sizes]:
    """``_normal_form``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    try:
        strides = tensors[0].stride() if isinstance(tensors[0], Tensor) else None
        wish = (asked, registry.wish())
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


def stacked_binary_conv2d(
    input: Tensor | PackedTensor,
    bank: Tensor | PackedTensor,
    index: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    binarize_input: bool = False,
    activation: str | None = None,
    estimator: str = "clip",
    backend: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Convolution with filters that are stacked from a shared bank of low-dimensional ±1 filters, in one pass.

    ``out = act(scale · conv2d(input, Ŵ) + bias)`` with ``Ŵ[k] = concat_i bank[index[k, i]]`` over the channel splits

    The bank runs once over every split, and each output adds up one map a split: K outputs for the work of n filters.
    With one split and the index 0, 1, …, K − 1 it is a convolution with ordinary binary weights (BWN).

    Args:
        input (Tensor[N, C, H, W] or PackedTensor): real numbers of any float dtype and strides; or what ``bitpack``
            made: signs, or unsigned codes of 1 to 4 bits, which enter as the numbers 0 to 2^bits − 1. N may be 0.
        bank (Tensor[n, C/(groups·splits), R, S] or PackedTensor): the n shared filters, +1 and −1 in a float dtype or
            int8; or ``bitpack`` of them.
        index (Tensor[K, splits]): integers, the bank filter of each output and split. For training also the same as
            one-hot selections [K, splits, n] of a float dtype, which have a gradient.
        scale (Tensor[K], optional): a factor an output; may be negative or zero.
        bias (Tensor[K], optional): added after the factor.
        stride, dilation (int or pair): (vertical, horizontal), in pixels.
        padding (int, pair, quadruple or str): as in ``basis_conv2d``; it counts as zero in every mode.
        groups (int): channel groups; the splits lie inside a group, and all groups share the bank.
        binarize_input (bool): take the signs of a real input (``x >= 0`` is +1, NaN −1): XNOR mode, whole numbers.
        activation (None, "relu" or "relu6"): applied last.
        estimator (str): what stands in for the derivative of the sign of the input: ``"clip"``, ``"approx_sign"``,
            ``"swish_sign"`` or ``"identity"``, as in ``binary_conv2d``.
        backend (str, optional): run on this backend or raise; None chooses.
        packed (Tensor, optional): ``stacked_binary_conv2d_pack`` of the same bank, index and geometry, which spares
            the native kernel the packing; ignored by backends that need none.

    Returns:
        Tensor[N, K, OH, OW]: of the dtype and memory format of a real input; for a packed one channels_last, of the
        dtype of scale, bias or bank, else float32. Under autocast a real input is cast first.

    Sums are float32 (float64 for float64), the result is rounded once to the dtype; signs and codes give exact sums.
    input, bank, one-hot selections, scale and bias have gradients, the same in every run: those of the expression
    above, also for selections and bank values that were not taken. Double backward and ``torch.vmap`` are refused.

    Raises:
        TypeError: a dtype or kind of argument that does not fit.
        ValueError: shapes that do not fit, bank values other than ±1, an index out of range, a packed format that is
            not known; the message names both sides. Compiled programs check values in the native kernel alone.
        BackendUnavailable: ``backend`` cannot run this call.

    Source: Lan, Lan 2021, "Compressing Deep Convolutional Neural Networks by Stacking Low-dimensional Binary
    Convolution Filters", arXiv 2010.02778. Binary weights alone: Rastegari et al. 2016, arXiv 1603.05279.

    Example:
        >>> import torch
        >>> from basisconv_kernels import stacked_binary_conv2d
        >>> bank = torch.where(torch.randn(16, 32, 3, 3) >= 0, 1.0, -1.0)
        >>> index = torch.randint(16, (64, 2))
        >>> stacked_binary_conv2d(torch.randn(1, 64, 28, 28), bank, index, padding=1).shape
        torch.Size([1, 64, 28, 28])
    """
    arguments = (stride, padding, dilation, groups, binarize_input, activation, estimator)
    tensors: tuple[Any, ...] = (input, bank, index, scale, bias)
    if packed is not None and not torch.compiler.is_compiling():
        result = planned.run(tensors, packed, (*arguments, backend))
        if result is not None:
            return result
    if isinstance(input, Tensor) and input.is_floating_point() and (cast := _autocast(input)) is not None:
        with torch.autocast(input.device.type, enabled=False):
            return _run((cast, *tensors[1:]), packed, arguments, backend)
    return _run(tensors, packed, arguments, backend)


def _autocast(input: Tensor) -> Tensor | None:
    """The input in the autocast dtype, as torch's convolutions do it (float64 stays); None outside autocast."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return input if input.dtype == torch.float64 else input.to(torch.get_autocast_dtype(device))


def _run(tensors: tuple[Any, ...], packed: Tensor | None, arguments: tuple[Any, ...], asked: str | None) -> Tensor:
    """Plan and check the values, then the autograd Function where something needs a gradient, else the backend."""
    traced = torch.compiler.is_compiling()
    settings, sizes = _normal_form(tensors, arguments, asked) if traced else _plan(tensors, arguments, asked)
    input, bank, index, scale, bias = tensors
    selection = None
    readable = not (traced or index.device.type == "meta" or torch._C._are_functorch_transforms_active())
    readable = readable and not (index.is_cuda and selfcheck.capturing())  # reading would break a graph's capture
    if packed is None and readable and not torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        check_values(bank, index, sizes.n)
    if index.dim() == 3:
        selection, index = index, index.detach().argmax(-1)
    operands = (
        input.words if isinstance(input, PackedTensor) else input,
        bank.words if isinstance(bank, PackedTensor) else bank,
        selection,
        scale,
        bias,
    )
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    index = index.to(torch.int64)
    if needs_gradient or torch._C._are_functorch_transforms_active():
        return _apply(*operands, index, packed, settings)
    result = _forward(settings.backend)(*operands[:2], index, scale, bias, packed, settings)
    if packed is not None and settings.backend == "cpu" and not traced:
        planned.remember(tensors, packed, (*arguments, asked), settings)
    return result
