"""The op ``tucker_conv2d``: 1×1 to rank_in channels, R×S core, 1×1 to K outputs; a Tucker-2 decomposed convolution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import env, registry, selfcheck
from basisconv_kernels.core.autograd import refuse_double_backward
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.eager import kinds
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.ops import tucker_conv2d_native as native
from basisconv_kernels.ops import tucker_conv2d_one_pass as one_pass
from basisconv_kernels.ops import tucker_conv2d_planned as planned
from basisconv_kernels.ops import tucker_conv2d_triton as triton
from basisconv_kernels.ops import tucker_conv2d_unfused as unfused
from basisconv_kernels.ops.basis_conv2d_native import BACKENDS
from basisconv_kernels.ops.tucker_conv2d_arguments import known_maps, normal_form
from basisconv_kernels.ops.tucker_conv2d_model import ONE_PASS, slower_than_plain
from basisconv_kernels.reference import tucker_conv2d as reference

OP = "tucker_conv2d"


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, in normal form; ``backend`` is the one chosen."""

    stride: Pair
    padding: Quad
    dilation: Pair
    activation: str | None
    precise: bool
    backend: str


# --- backends ---------------------------------------------------------------------------------------------------------


def _cpu_supports(problem: TuckerConv2dProblem) -> list[str]:
    against = []
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in native.DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _reference_supports(problem: TuckerConv2dProblem) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.tucker_conv2d_native:forward", _cpu_supports),
    Candidate(
        ONE_PASS,
        "basisconv_kernels.ops.tucker_conv2d_one_pass:forward",
        one_pass.supports,
        check="basisconv_kernels.ops.tucker_conv2d_selfcheck:cuda_one_pass",
    ),
    Candidate(
        "cuda",
        "basisconv_kernels.ops.tucker_conv2d_native:forward",
        native.cuda_supports,
        check="basisconv_kernels.ops.tucker_conv2d_selfcheck:cuda",
    ),
    Candidate(
        "triton",
        "basisconv_kernels.ops.tucker_conv2d_triton:forward",
        triton.supports,
        backward="basisconv_kernels.ops.tucker_conv2d_triton:backward",
        check="basisconv_kernels.ops.tucker_conv2d_selfcheck:triton",
    ),
    Candidate("reference", "basisconv_kernels.ops.tucker_conv2d_unfused:forward", _reference_supports),
)

# (result, M, Z): the last two are None unless they were asked for.
Forward = tuple[Tensor, Tensor | None, Tensor | None]


_targets: dict[str, tuple[Callable[..., Forward], Callable[..., reference.Gradients]]] = {}


def _targets_of(backend: str) -> tuple[Callable[..., Forward], Callable[..., reference.Gradients]]:
    """The functions of a backend, forward and backward."""
    found = _targets.get(backend)
    if found is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        backward = reference.backward if candidate.backward is None else registry.load(candidate.backward)
        found = _targets[backend] = registry.resolve(candidate), backward
    return found


def _choose(
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    sizes: tuple[int, ...],
    maps: tuple[int, int, int] | None,
    asked: str | None,
    *fixed: Any,
) -> str:
    """Name of the backend; of one pass and two by ``maps``, (N, H, W), too.

    Where those are None it looks only at what stays when batch and map size change: a constant in a graph.
    """
    problem = problem_of(device, dtype, layout, sizes, Settings._make((*fixed, "")))
    asked = asked or registry.wish()
    N, H, W = maps or (0, 0, 0)
    slower = {} if asked else slower_than_plain(replace(problem, N=N, H=H, W=W))
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    _targets_of(chosen.name)  # imported here, since a graph that is traced cannot
    return chosen.name


# What torch.compiler.assume_constant_result does, without its import of the whole compiler: a second at every start.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def problem_of(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: tuple[int, ...], settings: Settings
) -> TuckerConv2dProblem:
    """What the choice sees of a call; ``sizes`` are (C, rank_in, rank_out, K, R, S)."""
    C, rank_in, rank_out, K, R, S = sizes
    return TuckerConv2dProblem(
        C=C,
        rank_in=rank_in,
        Q=rank_out,
        K=K,
        R=R,
        S=S,
        stride=settings.stride,
        padding=settings.padding,
        dilation=settings.dilation,
        dtype=dtype,
        device=device,
        channels_last=layout == torch.channels_last,
        activation=settings.activation,
        precise=settings.precise,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def _without_graph() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it changes something: under ``create_graph`` only."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class TuckerConv2dFunction(torch.autograd.Function):
    """``tucker_conv2d`` with its explicit gradients; call ``tucker_conv2d`` itself, which checks and casts first."""

    @staticmethod
    def forward(
        input: Tensor,
        u_in: Tensor,
        core: Tensor,
        u_out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
        keep_stages: bool,
    ) -> Forward:
        """Run the backend that ``settings`` names; M and Z are kept for the gradients of core and u_out if asked."""
        run, _ = _targets_of(settings.backend)
        return run(input, u_in, core, u_out, bias, residual, packed, settings, keep_stages)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        """Keep the inputs, M and Z; the result only where the activation's slope is read off it."""
        input, u_in, core, u_out, _, _, _, settings, _ = inputs
        result, reduced, maps = output
        ctx.settings = settings
        if reduced is not None and maps is not None:
            ctx.mark_non_differentiable(reduced, maps)
            ctx.set_materialize_grads(False)  # else autograd fills gradients of M and Z with zeros for every backward
        ctx.save_for_backward(input, u_in, core, u_out, result if settings.activation else None, reduced, maps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """The formulas of ``reference.tucker_conv2d.backward``, by the backend's own kernels where it has some."""
        if grad_output is None:
            return (None,) * 9
        input, u_in, core, u_out, output, reduced, maps = ctx.saved_tensors
        stride, padding, dilation, activation, _, backend = ctx.settings
        stages = None if reduced is None else reference.Stages(reduced, maps)
        with _without_graph():
            gradients = _targets_of(backend)[1](
                grad_output,
                output,
                input,
                u_in,
                core,
                u_out,
                stride,
                padding,
                dilation,
                activation,
                tuple(ctx.needs_input_grad[:6]),
                stages,
            )
        depends_on = (grad_output, input, u_in, core, u_out)
        return (*refuse_double_backward(OP, depends_on, gradients), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
        )


def _apply(*arguments: Any) -> Forward:
    """``TuckerConv2dFunction.apply``; in eager mode without its binding by signature, 50 us a call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return TuckerConv2dFunction.apply(*arguments)
    return super(torch.autograd.Function, TuckerConv2dFunction).apply(*arguments)


# --- the public function ----------------------------------------------------------------------------------------------


def _normal_form(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: Any,
    precise: Any,
    backend: str | None,
) -> Settings:
    """Check the arguments and choose the backend."""
    tensors = (input, u_in, core, u_out, bias, residual)
    fixed, sizes = normal_form(*tensors, stride, padding, dilation, activation, precise)
    layout = memory_format(input)
    return Settings(*fixed, _choose(input.device.type, input.dtype, layout, sizes, known_maps(input), backend, *fixed))


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], Settings] = {}


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Settings:
    """``_normal_form``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    try:
        signature = [(t.shape, t.dtype, t.device, t.layout) if t is not None else None for t in tensors]
        key = (*signature, tensors[0].stride(), *arguments, *map(kinds, arguments[:3]), registry.wish())
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
    from basisconv_kernels.ops import tucker_conv2d_tuning  # which calls this op

    return tucker_conv2d_tuning.on_first_use(tensors, settings, asked)


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
    same_weights = cast[2] is tensors[2] and cast[3] is tensors[3]
    return cast, packed if same_weights else None


def tucker_conv2d(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Quad | str = 0,
    dilation: int | Pair = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    precise: bool = False,
    backend: str | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Tucker-2 decomposed convolution: 1×1 to fewer channels, R×S core, 1×1 to the outputs.

    ``out = act(u_out · conv2d(u_inᵀ · input, core) + bias + residual)``

    It equals the convolution with ``weight[k,c,r,s] = Σ_{o,i} u_out[k,o]·core[o,i,r,s]·u_in[c,i]``; nothing stands
    between the stages. Stride, padding and dilation are those of the core; the first 1×1 runs on all pixels of the
    input and has no bias, so that zeros around its map are zeros around the input.

    Args:
        input (Tensor[N, C, H, W]): images or feature maps, NCHW, channels_last or any strided view; N may be 0.
        u_in (Tensor[C, rank_in]): factor of the input channels.
        core (Tensor[rank_out, rank_in, R, S]): the filters between the two.
        u_out (Tensor[K, rank_out]): factor of the output channels.
        bias (Tensor[K], optional): added once, at the end.
        stride (int or pair): of the R×S convolution, (vertical, horizontal), in pixels.
        padding (int, pair, quadruple or str): zeros around the input, in pixels: (vertical, horizontal), or
            (top, bottom, left, right), ``"same"`` (stride 1 only) or ``"valid"``.
        dilation (int or pair): distance of the taps, in pixels.
        activation (None, "relu" or "relu6"): applied last.
        residual (Tensor[N, K, OH, OW], optional): added before the activation; never broadcast.
        precise (bool): no Winograd arithmetic, and the maps between the stages of 16-bit dtypes are kept in float32.
        backend (str, optional): run on this backend or raise; None chooses.
        packed (Tensor, optional): ``tucker_conv2d_pack`` of the same weights and geometry, which spares the native
            kernel the packing; ignored by backends that need none.

    Returns:
        Tensor[N, K, OH, OW]: in the dtype of ``input`` and in the memory format that its strides state by PyTorch's own
        rule, channels_last or else NCHW; ``OH = floor((H + top + bottom − dilation·(R−1) − 1)/stride) + 1``, OW alike.

    All six tensors have gradients. Double backward is refused except in training steps that run as three convolutions
    of PyTorch, ``torch.vmap`` always. Under autocast the tensors are cast to the autocast dtype. float32 and float64
    compute in their own dtype; bfloat16 and float16 accumulate in float32 and round the two maps between the stages and
    the result once each to the dtype. Two runs give the same bits.

    Raises:
        TypeError: a dtype that is not float32, bfloat16, float16 or float64, mixed dtypes, or a wrong kind of argument.
        ValueError: shapes or values that do not fit; the message names both.
        BackendUnavailable: ``backend`` cannot run this call.

    Source: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications", arXiv 1511.06530, equation 3.

    Example:
        >>> import torch
        >>> from basisconv_kernels import tucker_conv2d
        >>> u_in, core, u_out = torch.randn(64, 16), torch.randn(24, 16, 3, 3), torch.randn(128, 24)
        >>> tucker_conv2d(torch.randn(1, 64, 56, 56), u_in, core, u_out, padding=1, activation="relu").shape
        torch.Size([1, 128, 56, 56])
    """
    tensors: tuple[Any, ...] = (input, u_in, core, u_out, bias, residual)
    arguments = (stride, padding, dilation, activation, precise, backend)
    if packed is not None and not torch.compiler.is_compiling():
        result = planned.run(tensors, packed, arguments)
        if result is not None:
            return result
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
        new_weights = packed is None and arguments[-1] is None
        if plain and new_weights and unfused.trains_faster(settings, tensors[0], tensors[2]):
            return unfused.run(tensors, settings)
        keep_stages = needs_gradient and (tensors[2].requires_grad or tensors[3].requires_grad)
        return _apply(*tensors, packed, settings, keep_stages)[0]
    result = _targets_of(settings.backend)[0](*tensors, packed, settings)[0]
    if packed is not None and settings.backend in BACKENDS and not torch.compiler.is_compiling():
        planned.remember(tensors, packed, arguments, settings)
    return result
