"""The op ``basis_conv2d``: R×S convolution with Q shared basis filters, then the 1×1 recombination to K outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basisconv_kernels.core import checks, extension, registry
from basisconv_kernels.core.autograd import refuse_double_backward, refuse_gradients
from basisconv_kernels.core.checks import Pair, Quad
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.core.registry import Candidate
from basisconv_kernels.reference import basis_conv2d as reference

OP = "basis_conv2d"
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_NATIVE = extension.load() is None  # a constant: graphs are traced through the functions that ask


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


def _cpu_supports(problem: Conv2dProblem) -> list[str]:
    against = []
    if problem.device != "cpu":
        against.append(f"runs on the CPU, the tensors are on {problem.device}")
    if problem.dtype not in NATIVE_DTYPES:
        against.append(f"has no {problem.dtype} kernel")
    return against


def _reference_supports(problem: Conv2dProblem) -> list[str]:
    return []


CANDIDATES = (
    Candidate("cpu", "basisconv_kernels.ops.basis_conv2d:_native_forward", _cpu_supports),
    Candidate("reference", "basisconv_kernels.ops.basis_conv2d:_reference_forward", _reference_supports),
)


def _native_forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The torch op that C++ registers for the CPU and for CUDA."""
    arguments = (input, basis_weight, coefficients, bias, residual, packed, *settings[:-1])
    if torch.compiler.is_compiling():
        return torch.ops.basisconv.basis_conv2d.default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # gradients are our Function's; asking autograd costs 5 us a call
        return torch.ops.basisconv.basis_conv2d.default(*arguments)


def _reference_forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    settings: Settings,
) -> Tensor:
    return reference.forward(input, basis_weight, coefficients, bias, residual, *settings[:-1])


_targets: dict[str, Callable[..., Tensor]] = {}


def _forward(backend: str) -> Callable[..., Tensor]:
    target = _targets.get(backend)
    if target is None:
        candidate = next(c for c in CANDIDATES if c.name == backend)
        target = _targets[backend] = registry.resolve(candidate)
    return target


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, sizes: tuple[int, ...], asked: str | None, *arguments: Any) -> str:
    """Name of the backend. It looks only at what stays the same when batch and map size change, a constant in a graph."""
    settings = Settings(*arguments, backend="")
    taps_in, Q, K, R, S, mixed = sizes
    problem = Conv2dProblem(
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
        activation=settings.activation,
        precise=settings.precise,
    )
    chosen = registry.select(OP, CANDIDATES, problem, asked or registry.wish())
    _forward(chosen.name)
    return chosen.name


def basis_conv2d_pack(
    basis_weight: Tensor,
    coefficients: Tensor,
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    groups: int = 1,
    precise: bool = False,
) -> Tensor | None:
    """Rearrange weights once for the native kernel, for the ``packed`` argument of ``basis_conv2d``.

    Args:
        basis_weight (Tensor[Q, C/groups, R, S]): as for ``basis_conv2d``.
        coefficients (Tensor[K, Q] or [K, Q/groups]): as for ``basis_conv2d``.
        stride, dilation, groups, precise: as they will be given to ``basis_conv2d``.

    Returns:
        Tensor[bytes] (uint8), good for this instruction set and geometry only and checked on use; None where the native
        kernel does not take these tensors, and then ``packed=None`` is right.
    """
    if not HAS_NATIVE or basis_weight.device.type != "cpu" or basis_weight.dtype not in NATIVE_DTYPES:
        return None
    return torch.ops.basisconv.basis_conv2d_pack.default(
        basis_weight,
        coefficients,
        checks.pair(OP, "stride", stride, at_least=1),
        checks.pair(OP, "dilation", dilation, at_least=1),
        groups,
        precise,
    )


# --- registration of the native op ------------------------------------------------------------------------------------


def _fake_forward(
    input: Tensor,
    basis_weight: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    precise: bool,
) -> Tensor:
    """Shape, dtype and strides of the result, for tracing."""
    kernel = (basis_weight.shape[2], basis_weight.shape[3])
    OH, OW = checks.output_size(
        OP, (input.shape[2], input.shape[3]), kernel, tuple(stride), tuple(padding), tuple(dilation)
    )
    return torch.empty(
        (input.shape[0], coefficients.shape[0], OH, OW),
        dtype=input.dtype,
        device=input.device,
        memory_format=reference.memory_format(input),
    )


def _fake_pack(
    basis_weight: Tensor,
    coefficients: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precise: bool,
) -> Tensor:
    shapes = ([int(size) for size in basis_weight.shape], [int(size) for size in coefficients.shape])
    size = torch.ops.basisconv.basis_conv2d_packed_bytes.default(*shapes, stride, dilation, groups, precise)
    return basis_weight.new_empty(size, dtype=torch.uint8)


def _flops(
    input: Sequence[int],
    basis_weight: Sequence[int],
    coefficients: Sequence[int],
    *_: Any,
    out_shape: Sequence[int],
    **__: Any,
) -> int:
    """Two FLOP a multiply-accumulate of both stages; activation, bias and residual count nothing, as in torch."""
    Q, taps_in, R, S = basis_weight
    N, K, OH, OW = out_shape
    return 2 * N * OH * OW * (Q * taps_in * R * S + K * coefficients[1])


def _register() -> None:
    """Teach torch what the native op does to shapes, gradients and FLOP counts."""
    torch.library.register_fake("basisconv::basis_conv2d", _fake_forward)
    torch.library.register_fake("basisconv::basis_conv2d_pack", _fake_pack)
    refuse_gradients("basis_conv2d", OP)
    refuse_gradients("basis_conv2d_pack", OP)
    register_flop_formula(torch.ops.basisconv.basis_conv2d)(_flops)


if HAS_NATIVE:
    _register()


# --- autograd ---------------------------------------------------------------------------------------------------------


class BasisConv2dFunction(torch.autograd.Function):
    """``basis_conv2d`` with its explicit gradients; call the function ``basis_conv2d``, which checks and casts first."""

    @staticmethod
    def forward(
        input: Tensor,
        basis_weight: Tensor,
        coefficients: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        """Run the backend that ``settings`` names."""
        return _forward(settings.backend)(input, basis_weight, coefficients, bias, residual, packed, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; the output only where the activation's slope is read off it. Z is not kept."""
        input, basis_weight, coefficients, _, _, _, settings = inputs
        ctx.settings = settings
        ctx.save_for_backward(input, basis_weight, coefficients, output if settings.activation else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The formulas of ``reference.basis_conv2d.backward``."""
        input, basis_weight, coefficients, output = ctx.saved_tensors
        stride, padding, dilation, groups, activation, _, _ = ctx.settings
        with torch.no_grad():
            gradients = reference.backward(
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
            )
        return (*refuse_double_backward(OP, (grad_output, input, basis_weight, coefficients), gradients), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse ``torch.vmap``."""
        raise NotImplementedError(
            f"{OP}: torch.vmap is not supported; put the mapped dimension into the batch dimension N of input"
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
    """Check every argument against every other and choose the backend."""
    checks.tensor(OP, "input", input, 4, "[N, C, H, W]")
    checks.tensor(OP, "basis_weight", basis_weight, 4, "[Q, C/groups, R, S]")
    checks.tensor(OP, "coefficients", coefficients, 2, "[K, Q]")
    C, H, W = input.shape[1:]
    Q, taps_in, R, S = basis_weight.shape
    K, mixed = coefficients.shape
    if bias is not None:
        checks.tensor(OP, "bias", bias, 1, "[K]")
    if residual is not None:
        checks.tensor(OP, "residual", residual, 4, "[N, K, OH, OW]")
    others = {"basis_weight": basis_weight, "coefficients": coefficients, "bias": bias, "residual": residual}
    checks.same_kind(OP, "input", input, others)

    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be at least 1, got {groups}")
    if min(Q, R, S, taps_in) < 1:
        raise ValueError(f"{OP}: basis_weight must be [Q, C/groups, R, S] with no empty side, got {list(basis_weight.shape)}")
    if K < 1:
        raise ValueError(f"{OP}: coefficients must be [K, Q] with K at least 1, got {list(coefficients.shape)}")
    if taps_in * groups != C:
        raise ValueError(
            f"{OP}: basis_weight must be [Q, C/groups, R, S] with C/groups = {C}/{groups} from input.shape[1], "
            f"got {list(basis_weight.shape)}"
        )
    if Q % groups:
        raise ValueError(f"{OP}: Q = basis_weight.shape[0] must be divisible by groups = {groups}, got {Q}")
    if mixed != Q and (groups == 1 or mixed != Q // groups):
        compact = f", or [K, Q/groups] = [{K}, {Q // groups}] block-diagonal" if groups > 1 else ""
        raise ValueError(
            f"{OP}: coefficients must be [K, Q] with Q = basis_weight.shape[0] = {Q}{compact}, "
            f"got {list(coefficients.shape)}"
        )
    if mixed != Q and K % groups:
        raise ValueError(
            f"{OP}: coefficients [K, Q/groups] need K divisible by groups = {groups}, got {list(coefficients.shape)}"
        )
    if bias is not None and bias.shape[0] != K:
        raise ValueError(f"{OP}: bias must be [K] with K = coefficients.shape[0] = {K}, got {list(bias.shape)}")

    stride = checks.pair(OP, "stride", stride, at_least=1)
    dilation = checks.pair(OP, "dilation", dilation, at_least=1)
    padding = checks.padding4(OP, padding, (R, S), stride, dilation)
    checks.activation(OP, activation)
    OH, OW = checks.output_size(OP, (H, W), (R, S), stride, padding, dilation)
    if residual is not None and tuple(residual.shape) != (input.shape[0], K, OH, OW):
        raise ValueError(
            f"{OP}: residual must be [N, K, OH, OW] = {[input.shape[0], K, OH, OW]}, got {list(residual.shape)}; "
            "it is added before the activation and not broadcast"
        )
    # operator.index makes a size that a graph left open a constant: one graph a weight shape, for all batches and maps.
    sizes = tuple(operator.index(size) for size in (taps_in, Q, K, R, S, mixed))
    fixed = (stride, padding, dilation, groups, activation, bool(precise))
    return Settings(*fixed, _choose(input.device.type, input.dtype, sizes, backend, *fixed))


_PLANS_KEPT = 4096
_plans: dict[tuple[Any, ...], Settings] = {}


def _plan(tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Settings:
    """``_normal_form``, remembered by shapes, dtypes and arguments: what makes a repeated call cheap."""
    try:
        signature = [(t.shape, t.dtype, t.device) if t is not None else None for t in tensors]
        key = (*signature, *arguments, registry.wish())
        found = _plans.get(key)
    except (AttributeError, TypeError):  # no tensor, or a list where a tuple could stand: the checks know
        return _normal_form(*tensors, *arguments)
    if found is None:
        found = _normal_form(*tensors, *arguments)
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        _plans[key] = found
    return found


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
        Tensor[N, K, OH, OW]: in the dtype and the memory format of ``input``,
        ``OH = floor((H + top + bottom − dilation·(R−1) − 1)/stride) + 1``, OW alike.

    All five tensors have gradients; that of ``basis_weight`` is skipped when it needs none. Double backward and
    ``torch.vmap`` are refused. Under autocast the tensors are cast to the autocast dtype. float32 and float64 compute in
    their own dtype; bfloat16 and float16 accumulate in float32, round the basis maps once to the dtype and the result
    once. Results do not depend on the number of threads; two runs give the same bits.

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
    if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
                for t in (input, basis_weight, coefficients, bias, residual)]  # fmt: skip
        with torch.autocast(input.device.type, enabled=False):
            return basis_conv2d(
                *cast[:4], stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation,
                residual=cast[4], precise=precise, backend=backend,
                packed=packed if cast[1] is basis_weight and cast[2] is coefficients else None,
            )  # fmt: skip
    tensors = (input, basis_weight, coefficients, bias, residual)
    arguments = (stride, padding, dilation, groups, activation, precise, backend)
    if torch.compiler.is_compiling():
        settings = _normal_form(*tensors, *arguments)
    else:
        settings = _plan(tensors, arguments)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or basis_weight.requires_grad
        or coefficients.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return BasisConv2dFunction.apply(*tensors, packed, settings)
    if torch._C._are_functorch_transforms_active():
        return BasisConv2dFunction.apply(*tensors, packed, settings)
    return _forward(settings.backend)(*tensors, packed, settings)
