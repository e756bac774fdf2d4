"""Launches of Triton kernels whose arguments beside the tensors never change: bound once, then handed on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Head = Tensor | TensorDescriptor | None

_threads = threading.local()


def _bind_device(heads: Sequence[Head]) -> None:
    """Give this thread a CUDA context, which the driver wants for a descriptor: any call of the runtime brings one."""
    first = next((head for head in heads if head is not None), None)
    base = first.base if isinstance(first, TensorDescriptor) else first
    if base is not None:
        torch.zeros(1, device=base.device)
        _threads.bound = True


class Launch:
    """A kernel with its grid, constants and options; the first call compiles it, all others skip Triton's binding.

    Binding and specializing some 45 arguments takes most of the host's time of a launch. What Triton would specialize
    on must therefore be the same in all calls of one ``Launch``: dtypes, which tensors are None, whether addresses are
    multiples of 16 bytes, the device, and all numbers.

    Args:
        kernel: a ``triton.jit`` function whose first parameters are tensors or descriptors.
        programs: on the x axis of the grid.
        rest: the values of all other parameters, constants too, in their order.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, programs: int, rest: Sequence[Any], **options: Any):
        self.kernel, self.grid, self.rest, self.options = kernel, (programs, 1, 1), tuple(rest), options
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *heads: Head) -> None:
        """Launch on the current stream of the current device."""
        if not getattr(_threads, "bound", False):
            _bind_device(heads)
        if self._compiled is not None:
            self._compiled(*heads, *self.rest)
            return
        made = self.kernel[self.grid](*heads, *self.rest, **self.options)
        if made is not None:  # the interpreter makes none
            self._compiled = made[self.grid]


def template(shape: Sequence[int], strides: Sequence[int], block: Sequence[int], like: Tensor) -> TensorDescriptor:
    """A description that was checked on one tensor, without keeping it."""
    made = TensorDescriptor(like, list(shape), list(strides), list(block))
    made.base = None
    return made


def rebased(descriptor: TensorDescriptor, base: Tensor) -> TensorDescriptor:
    """A template of a tensor that is known to fit it: without the checks of the constructor."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved
