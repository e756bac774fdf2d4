"""The op ``basis_conv2d``: R×S convolution with Q shared basis filters, then the 1×1 recombination to K outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import env, registry, selfcheck
from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.eager import kinds
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import basis_conv2d_native as native
from basisconv_kernels.ops import basis_conv2d_planned as planned
from basisconv_kernels.ops import basis_conv2d_triton as triton
from basisconv_kernels.ops import basis_conv2d_unfused as unfused
from basisconv_kernels.ops.basis_conv2d_arguments import normal_form
from basisconv_kernels.ops.basis_conv2d_model import predictions as predictions
from basisconv_kernels.ops.basis_conv2d_model import slower_in_training, slower_than_plain
from basisconv_kernels.reference import basis_conv2d as reference

OP = "basis_conv2d"


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form; ``backend`` is the one chosen."""

    stride: Pair
    padding: Quad
    dilation: Pair
    groups: int
    activation: str | None
    precise: bool
    backend: str


# --- backends ---------------------------------------------------------------------------------------------------------


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.basis_conv2d_native:forward", native.cpu_supports),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.basis_conv2d_native:forward",
        native.cuda_supports,
        check="basisconv_kernels.ops.basis_conv2d_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.basis_conv2d_triton:forward",
        triton.supports,
        backward="basisconv_kernels.ops.basis_conv2d_triton:backward",
        check="basisconv_kernels.ops.basis_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.ops.basis_conv2d_unfused:forward", unfused.supports),
)


_targets: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., reference.Gradients]]] = {}


def _targets_of(backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., reference.Gradients]]:
    """The functions of a backend, forward and backward."""
    found = _targets.get(backend)
    if found is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        backward = reference.backward if candidate.backward is None else registry.load(candidate.backward)
        found = _targets[backend] = registry.resolve(candidate), backward
    return found


def _choose(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: tuple[int, ...], asked: str | None, *fixed: Any
) -> str:
    """Name of the backend. It looks only at what stays when batch and map size change: a constant in a graph."""
    problem = problem_of(device, dtype, layout, sizes, Settings._make((*fixed, "")))
    asked = asked or registry.wish()
    slower = {} if asked else slower_than_plain(problem)
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    _targets_of(chosen.name)  # imported here, since a graph that is traced cannot
    return chosen.name


# What torch.compiler.assume_constant_result does, without its import of the whole compiler: a second at every start.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose_to_train(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: tuple[int, ...], chosen: str, *fixed: Any
) -> str:
    """Name of the backend of a training step on a GPU in a traced graph, where forward passes run on ``chosen``."""
    problem = problem_of(device, dtype, layout, sizes, Settings._make((*fixed, "")))
    passed_over = chosen != "reference" and chosen in slower_in_training(problem, ("graph",))
    name = "reference" if passed_over and registry.wish() is None else chosen
    _targets_of(name)
    return name


_choose_to_train._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as for _choose


def _to_train(settings: Settings, input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> Settings:
    """The settings of a training step in a traced graph."""
    Q, taps_in, R, S = basis_weight.shape
    sizes = tuple(operator.index(size) for size in (taps_in, Q, coefficients.shape[0], R, S, coefficients.shape[1]))
    layout = reference.memory_format(input)
    fixed = settings[:-1]
    return Settings(*fixed, _choose_to_train(input.device.type, input.dtype, layout, sizes, settings.backend, *fixed))


def problem_of(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: tuple[int, ...], settings: Settings
) -> Conv2dProblem:
    """What the choice sees of a call; ``sizes`` are (C/G, Q, K, R, S, coefficients an output)."""
    taps_in, Q, K, R, S, mixed = sizes
    return Conv2dProblem(
        C=taps_in * settings.groups,
        Q=Q,
        K=K,
        R=R,
        S=S,
        stride=settings.stride,
        padding=settings.padding,
        dilation=settings.dilation,
        groups=settings.groups,
        compact=mixed != Q,
        dtype=dtype,
        device=device,
        channels_last=layout == torch.channels_last,
        activation=settings.activation,
        precise=settings.precise,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def _without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it changes something: under ``create_graph`` only; 4 us a backward elsewhere."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class BasisConv2dFunction(torch.autograd.Function):
    """``basis_conv2d`` with its explicit gradients; call ``basis_conv2d`` itself, which checks and casts first."""

    @staticmethod
    def forward(
        input: Tensor,
        basis_weight: Tensor,
        coefficients: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
        keep_maps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the backend that ``settings`` names; the second result is Z, kept for d coefficients if ``keep_maps``."""
        run, _ = _targets_of(settings.backend)
        return run(input, basis_weight, coefficients, bias, residual, packed, settings, keep_maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """Keep the inputs and Z; the result only where the activation's slope is read off it."""
        input, basis_weight, coefficients, _, _, _, settings, _ = inputs
        result, maps = output
        ctx.settings = settings
        if maps is not None:
            ctx.mark_non_differentiable(maps)
            ctx.set_materialize_grads(False)  # else autograd fills a gradient of Z with zeros for every backward
        ctx.save_for_backward(input, basis_weight, coefficients, result if settings.activation else None, maps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Any, ...]:
        """The formulas of ``reference.basis_conv2d.backward``, by the backend's own kernels where it has some."""
        if grad_output is None:
            return (None,) * 8
        input, basis_weight, coefficients, output, maps = ctx.saved_tensors
        stride, padding, dilation, groups, activation, _, backend = ctx.settings
        with _without_graph():
            gradients = _targets_of(backend)[1](
                grad_output,
                output,
                input,
                basis_weight,
                coefficients,
                stride,
                padding,
                dilation,
                groups,
                activation,
                tuple(ctx.needs_input_grad[:5]),
                maps,
            )
        depends_on = (grad_output, input, basis_weight, coefficients)
        return (*refuse_double_backward(OP, depends_on, gradients), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


def _apply(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """``BasisConv2dFunction.apply``; in eager mode without its binding by signature, 50 us a call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return BasisConv2dFunction.apply(*arguments)
    return super(torch.autograd.Function, BasisConv2dFunction).apply(*arguments)


# --- the public function ----------------------------------------------------------------------------------------------


def _normal_form(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    precise: Any,
    backend: str | None,
) -> Settings:
    """Check the arguments and choose the backend."""
    tensors = (input, basis_weight, coefficients, bias, residual)
    fixed, sizes = normal_form(*tensors, stride, padding, dilation, groups, activation, precise)
    layout = reference.memory_format(input)
    return Settings(*fixed, _choose(input.device.type, input.dtype, layout, sizes, backend, *fixed))


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], Settings] = {}


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Settings:
    """``_normal_form``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    try:
        signature = [(t.shape, t.dtype, t.device, t.layout) if t is not None else None for t in tensors]
        key = (*signature, tensors[0].stride(), *arguments, *map(kinds, arguments[:4]), registry.wish())
        found = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no dense tensor, or a list for a tuple: the checks know
        return _normal_form(*tensors, *arguments)
    if found is None:
        found = _normal_form(*tensors, *arguments)
        if env.tunes_on_first_use() and _was_measured_now(tensors, found, arguments[-1]):
            found = _normal_form(*tensors, *arguments)
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        if not selfcheck.capturing():  # what was not checked only because a graph is captured may be chosen later
            _plans[key] = found
    return found


def _was_measured_now(tensors: tuple[Any, ...], settings: Settings, asked: str | None) -> bool:
    from basisconv_kernels.ops import basis_conv2d_tuning  # which calls this op

    return basis_conv2d_tuning.on_first_use(tensors, settings, asked)


def _autocast(
    input: Tensor, others: tuple[Any, ...], packed: Tensor | None
) -> tuple[tuple[Any, ...], Tensor | None] | None:
    """The tensors in the autocast dtype, as torch's convolutions do it (float64 stays); None outside autocast.

    Packed weights go with the weights they were made of: a cast of those makes them useless.
    """
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    tensors = (input, *others)
    cast = tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
    same_weights = cast[1] is others[0] and cast[2] is others[1]
    return cast, packed if same_weights else None


def basis_conv2d(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    precise: bool = False,
    backend: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Convolution with a shared filter basis and the 1×1 recombination of its maps, in one pass.

    ``out = act(coefficients · conv2d(input, basis_weight) + bias + residual)``

    Args:
        input (Tensor[N, C, H, W]): images or feature maps, NCHW, channels_last or any strided view; N may be 0.
        basis_weight (Tensor[Q, C/groups, R, S]): the Q basis filters.
        coefficients (Tensor[K, Q]): recombination of the Q basis maps to K outputs. With ``groups > 1`` also
            [K, Q/groups]: block-diagonal, output k mixes the maps of its own group only.
        bias (Tensor[K], optional): added once, after the recombination.
        stride (int or pair): of the R×S convolution, (vertical, horizontal), in pixels.
        padding (int, pair, quadruple or str): zeros around the input, in pixels: (vertical, horizontal), or
            (top, bottom, left, right), ``"same"`` (stride 1 only) or ``"valid"``.
        dilation (int or pair): distance of the taps, in pixels.
        groups (int): channel groups of the R×S convolution.
        activation (None, "relu" or "relu6"): applied last.
        residual (Tensor[N, K, OH, OW], optional): added before the activation; never broadcast.
        precise (bool): no Winograd arithmetic, and the basis maps of 16-bit dtypes are kept in float32.
        backend (str, optional): run on this backend or raise; None chooses.
        packed (Tensor, optional): ``basis_conv2d_pack`` of the same weights and geometry, which spares the native
            kernel the packing; ignored by backends that need none.

    Returns:
        Tensor[N, K, OH, OW]: in the dtype of ``input`` and in the memory format that its strides state by PyTorch's own
        rule, channels_last or else NCHW; ``OH = floor((H + top + bottom − dilation·(R−1) − 1)/stride) + 1``, OW alike.

    All five tensors have gradients; that of ``basis_weight`` is skipped when it needs none. Double backward and
    ``torch.vmap`` are refused. Under autocast the tensors are cast to the autocast dtype. float32 and float64 compute
    in their own dtype, float32 on a GPU in TF32 where cuDNN's convolutions may; bfloat16 and float16 accumulate in
    float32, round the basis maps once to the dtype and the result once (a training step on a GPU without a ``backend``
    may be two convolutions of PyTorch, which round the sums with bias and residual too). Two runs give the same bits;
    in the native kernel the number of threads does not matter either.

    Raises:
        TypeError: a dtype that is not float32, bfloat16, float16 or float64, mixed dtypes, or a wrong kind of argument.
        ValueError: shapes or values that do not fit; the message names both.
        BackendUnavailable: ``backend`` cannot run this call.

    Source: Tayyab, Mahalanobis 2019, "BasisConv", arXiv 1906.04509.

    Example:
        >>> import torch
        >>> from basisconv_kernels import basis_conv2d
        >>> basis = torch.randn(16, 64, 3, 3)
        >>> mixing = torch.randn(128, 16)
        >>> basis_conv2d(torch.randn(1, 64, 56, 56), basis, mixing, padding=1, activation="relu").shape
        torch.Size([1, 128, 56, 56])
    """
    arguments = (stride, padding, dilation, groups, activation, precise, backend)
    if packed is not None and not torch.compiler.is_compiling():
        result = planned.run(input, basis_weight, coefficients, bias, residual, packed, arguments)
        if result is not None:
            return result
    tensors: tuple[Any, ...] = (input, basis_weight, coefficients, bias, residual)
    if isinstance(input, Tensor) and (cast := _autocast(input, tensors[1:], packed)) is not None:
        tensors, packed = cast
        with torch.autocast(input.device.type, enabled=False):
            return _run(tensors, packed, arguments)
    return _run(tensors, packed, arguments)


def _run(tensors: tuple[Any, ...], packed: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
    """Plan, then the autograd Function where something needs a gradient, else the backend itself."""
    settings = _normal_form(*tensors, *arguments) if torch.compiler.is_compiling() else _plan(tensors, arguments)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_gradient or torch._C._are_functorch_transforms_active():
        plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        if plain and packed is None and arguments[-1] is None and unfused.trains_faster(settings, *tensors[:3]):
            return unfused.run(tensors, settings)
        if torch.compiler.is_compiling() and arguments[-1] is None and tensors[0].device.type == "cuda":
            settings = _to_train(settings, *tensors[:3])
        keep_maps = needs_gradient and tensors[2].requires_grad
        return _apply(*tensors, packed, settings, keep_maps)[0]
    result = _targets_of(settings.backend)[0](*tensors, packed, settings)[0]
    if packed is not None and settings.backend in native.BACKENDS and not torch.compiler.is_compiling():
        planned.remember(tensors, packed, arguments, settings, lambda: _serves_any_layout(tensors, settings, arguments))
    return result


def _serves_any_layout(tensors: tuple[Any, ...], settings: Settings, arguments: tuple[Any, ...]) -> bool:
    """Whether the CPU's kernels are right for inputs of the other memory format as well; on CUDA each has its own."""
    input, basis_weight, coefficients = tensors[:3]
    if input.device.type != "cpu":
        return False
    (Q, taps_in, R, S), (K, mixed) = basis_weight.shape, coefficients.shape
    layouts = {torch.channels_last: torch.contiguous_format, torch.contiguous_format: torch.channels_last}
    other = layouts[reference.memory_format(input)]
    problem = problem_of("cpu", input.dtype, other, (taps_in, Q, K, R, S, mixed), settings)
    return bool(arguments[-1] or registry.wish()) or "cpu" not in slower_than_plain(problem)
