"""What the autograd Functions of all ops share."""

from __future__ import annotations

from collections.abc import Sequence
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


def refuse_gradients(native: str, op: str, namespace: str = "basisconv") -> None:
    """Make the torch op ``<namespace>::<native>`` raise when it is called on tensors that need a gradient.

    The public function of the op goes through its autograd Function; the raw op would lose the gradient silently.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    raw = getattr(getattr(torch.ops, namespace), native).default

    def below_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(
                f"torch.ops.{namespace}.{native} has no gradient of its own: for training call basisconv_kernels.{op}, "
                "for inference (an exported program, say) run it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    library.impl(native, below_autograd, "Autograd")
    _libraries.append(library)
