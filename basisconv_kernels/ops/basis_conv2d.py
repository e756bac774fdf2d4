"""The op ``basis_conv2d``: R×S convolution with Q shared basis filters, then the 1×1 recombination to K outputs."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from basisconv_kernels.core import env, registry, selfcheck
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.eager import of_same_kinds
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d_native as native
from basisconv_kernels.ops import basis_conv2d_planned as planned
from basisconv_kernels.ops import basis_conv2d_training as training
from basisconv_kernels.ops.basis_conv2d_arguments import normal_form
from basisconv_kernels.ops.basis_conv2d_autograd import BasisConv2dFunction as BasisConv2dFunction
from basisconv_kernels.ops.basis_conv2d_autograd import apply
from basisconv_kernels.ops.basis_conv2d_backends import CANDIDATES, Settings, targets_of
from basisconv_kernels.ops.basis_conv2d_model import predictions as predictions
from basisconv_kernels.ops.basis_conv2d_model import slower_in_training, slower_than_plain
from basisconv_kernels.reference import basis_conv2d as reference

OP = "basis_conv2d"


# --- the choice -------------------------------------------------------------------------------------------------------


def _choose(
    device: str, dtype: torch.dtype, layout: torch.memory_format, sizes: tuple[int, ...], asked: str | None, *fixed: Any
) -> str:
    """Name of the backend. It looks only at what stays when batch and map size change: a constant in a graph."""
    problem = problem_of(device, dtype, layout, sizes, Settings._make((*fixed, "")))
    asked = asked or registry.wish()
    slower = {} if asked else slower_than_plain(problem)
    chosen = registry.select(OP, CANDIDATES, problem, asked, slower)
    targets_of(chosen.name)  # imported here, since a graph that is traced cannot
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
    targets_of(name)
    return name


_choose_to_train._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as for _choose


def _to_train(settings: Settings, input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> Settings:
    """The settings of a training step in a traced graph."""
    fixed, layout = settings[:-1], reference.memory_format(input)
    sizes = _sizes(basis_weight, coefficients)
    return Settings(*fixed, _choose_to_train(input.device.type, input.dtype, layout, sizes, settings.backend, *fixed))


def _sizes(basis_weight: Tensor, coefficients: Tensor) -> tuple[int, ...]:
    Q, taps_in, R, S = basis_weight.shape
    return tuple(operator.index(size) for size in (taps_in, Q, coefficients.shape[0], R, S, coefficients.shape[1]))


def _seen(settings: Settings, input: Tensor, basis_weight: Tensor, coefficients: Tensor) -> Conv2dProblem:
    """What the choice sees of a call on these tensors."""
    layout = reference.memory_format(input)
    return problem_of(input.device.type, input.dtype, layout, _sizes(basis_weight, coefficients), settings)


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


class Plan:
    """What is known of calls of one kind: their settings, and since the first training step what those run as.

    ``arguments`` are those of the first call that are no tensors, as given.
    """

    __slots__ = ("arguments", "settings", "training")

    def __init__(self, settings: Settings, arguments: tuple[Any, ...]) -> None:
        self.settings = settings
        self.arguments = arguments
        self.training: training.Training | None = None

    def step(self, tensors: tuple[Any, ...]) -> training.Step | None:
        """Two convolutions for a training step that happens now; None where it is our Function's."""
        found = self.training
        if found is None:
            problem = _seen(self.settings, *tensors[:3])
            found = self.training = training.decide(self.settings, problem, *tensors[:3])
        return found.now()


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Plan:
    """``_normal_form``, remembered by shapes, strides, dtypes and arguments: what makes a repeated call cheap."""
    input, basis_weight, coefficients, bias, residual = tensors
    try:
        key = (
            input.shape, input.stride(), input.dtype, input.device, input.layout,
            basis_weight.shape, basis_weight.dtype, basis_weight.device, basis_weight.layout,
            coefficients.shape, coefficients.dtype, coefficients.device, coefficients.layout,
            None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout),
            None if residual is None else (residual.shape, residual.dtype, residual.device, residual.layout),
            arguments, registry.wish(),
        )  # fmt: skip
        found = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no dense tensor, or a list for a tuple: the checks know
        return Plan(_normal_form(*tensors, *arguments), arguments)
    if found is not None and of_same_kinds(found.arguments, arguments):
        return found
    made = Plan(_normal_form(*tensors, *arguments), arguments)
    if env.tunes_on_first_use() and _was_measured_now(tensors, made.settings, arguments[-1]):
        made = Plan(_normal_form(*tensors, *arguments), arguments)
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    if not selfcheck.capturing():  # what was not checked only because a graph is captured may be chosen later
        _plans[key] = made
    return made


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

    All five tensors have gradients; that of ``basis_weight`` is skipped when it needs none. Double backward is refused
    except in training steps that run as two convolutions of PyTorch, ``torch.vmap`` always. Under autocast the tensors
    are cast to the autocast dtype. float32 and float64 compute in their own dtype, float32 on a GPU in TF32 where
    cuDNN's convolutions may; bfloat16 and float16 accumulate in float32, round the basis maps once to the dtype and the
    result once (a training step on a GPU without a ``backend`` may be two convolutions of PyTorch, which round the sums
    with bias and residual too). Two runs give the same bits; in the native kernel the number of threads does not matter
    either.

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
    if packed is not None and not is_dynamo_compiling():
        result = planned.run(input, basis_weight, coefficients, bias, residual, packed, arguments)
        if result is not None:
            return result
    tensors: tuple[Any, ...] = (input, basis_weight, coefficients, bias, residual)
    autocast = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    if autocast and isinstance(input, Tensor) and (cast := _autocast(input, tensors[1:], packed)) is not None:
        tensors, packed = cast
        with torch.autocast(input.device.type, enabled=False):
            return _run(tensors, packed, arguments)
    return _run(tensors, packed, arguments)


def _run(tensors: tuple[Any, ...], packed: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
    """Plan, then the autograd Function where something needs a gradient, else the backend itself."""
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    plan = None if compiling else _plan(tensors, arguments)
    settings = _normal_form(*tensors, *arguments) if plan is None else plan.settings
    input, basis_weight, coefficients, bias, residual = tensors
    needs_gradient = torch.is_grad_enabled() and (
        input.requires_grad
        or basis_weight.requires_grad
        or coefficients.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if needs_gradient or transformed:
        if arguments[-1] is None:
            if plan is not None and packed is None and not transformed and (step := plan.step(tensors)) is not None:
                return step(*tensors)
            if compiling and input.device.type == "cuda":
                settings = _to_train(settings, *tensors[:3])
        keep_maps = needs_gradient and coefficients.requires_grad
        return apply(*tensors, packed, settings, keep_maps)
    result = targets_of(settings.backend)[0](*tensors, packed, settings)[0]
    if packed is not None and settings.backend in native.BACKENDS and not compiling:
        planned.remember(tensors, packed, arguments, settings, lambda: _serves_any_layout(tensors, settings, arguments))
    return result


def _serves_any_layout(tensors: tuple[Any, ...], settings: Settings, arguments: tuple[Any, ...]) -> bool:
    """Whether the CPU's kernels are right for inputs of the other memory format as well; on CUDA each has its own."""
    if tensors[0].device.type != "cpu":
        return False
    problem = _seen(settings, *tensors[:3])
    other = replace(problem, channels_last=not problem.channels_last)
    return bool(arguments[-1] or registry.wish()) or "cpu" not in slower_than_plain(other)
