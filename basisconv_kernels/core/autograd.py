"""What the autograd Functions of all ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_by_name(op: str) -> NoReturn:
    """Raise NotImplementedError: second derivatives of ``op`` are not there."""
    raise NotImplementedError(
        f"{op}: double backward is not supported; where second derivatives are needed use two "
        "torch.nn.functional.conv2d calls (to_plain(model) converts a whole model)"
    )


class _NoDoubleBackward(torch.autograd.Function):
    """Identity on gradients whose own gradient is refused by the op's name."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_by_name(ctx.op)


def refuse_double_backward(
    op: str, depends_on: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return first-order gradients that raise, by the op's name, when somebody differentiates them again.

    Under ``create_graph=True`` a gradient computed by hand would otherwise look like a constant: a silent wrong answer.

    Args:
        op: name of the op, for the message.
        depends_on: the tensors that the gradients are functions of.
        gradients: what the backward computed, without a graph.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients)
    present = [gradient for gradient in gradients if gradient is not None]
    marked = iter(_NoDoubleBackward.apply(op, len(present), *present, *depends_on))
    return tuple(None if gradient is None else next(marked) for gradient in gradients)


_libraries: list[torch.library.Library] = []  # registrations live as long as these


def _refuse_gradients(name: str, op: str, arguments: Sequence[Any]) -> None:
    """Raise where a gradient is wanted through a torch op that has none."""
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments):
        raise RuntimeError(
            f"torch.ops.{name} has no gradient of its own: for training call basisconv_kernels.{op}, "
            "for inference (an exported program, say) run it under torch.no_grad()"
        )


def register_without_gradient(native: str, op: str, fake: Callable[..., Any]) -> None:
    """Teach torch shapes and gradients of the native op ``basisconv::<native>``.

    The public function of the op goes through its autograd Function; the raw op would lose a gradient silently, so it
    raises when it is called on tensors that need one. Its kernels ask themselves (csrc/ops/gradients_glue.h), and
    ``fake`` is made to: a function of ours for the Autograd key would put Python into every call of a compiled program.

    Args:
        native: name of the torch op.
        op: public function that it serves.
        fake: what it does to shapes, for tracing.
    """

    @functools.wraps(fake)
    def asking(*arguments: Any) -> Any:
        _refuse_gradients(f"basisconv.{native}", op, arguments)
        return fake(*arguments)

    torch.library.register_fake(f"basisconv::{native}", asking)
    library = torch.library.Library("basisconv", "FRAGMENT")
    library.impl(native, torch.library.fallthrough_kernel, "Autograd")
    library.impl(native, _refuse_transforms(native, op), "FuncTorchDynamicLayerFrontMode")
    _libraries.append(library)


def _refuse_transforms(native: str, op: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.ops.basisconv.{native} knows no transforms of torch.func; basisconv_kernels.{op} has gradients"
        )

    return refuse


def call_raw(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call a torch op that has no gradient of its own, where gradients are the caller's Function's, or nobody's.

    In eager mode with gradients off, since the op would ask every tensor; in a graph as it is.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    recording = torch.is_grad_enabled()
    with torch._C._AutoDispatchBelowAutograd():
        if not recording:
            return op(*arguments)
        torch._C._set_grad_enabled(False)
        try:
            return op(*arguments)
        finally:
            torch._C._set_grad_enabled(True)


def refuse_gradients(name: str, op: str) -> None:
    """Make the torch op ``basisconv_triton::<name>``, which is Python anyway, raise on tensors that need a gradient."""
    library = torch.library.Library("basisconv_triton", "FRAGMENT")
    raw = getattr(torch.ops.basisconv_triton, name).default

    def below_autograd(*args: Any) -> Any:
        _refuse_gradients(f"basisconv_triton.{name}", op, args)
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    library.impl(name, below_autograd, "Autograd")
    _libraries.append(library)
