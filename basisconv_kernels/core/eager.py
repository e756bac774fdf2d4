"""The short way of a repeated eager call, which all ops with packed weights share.

The first call of its kind is checked, planned and run like every other one. What it was is then remembered under the
address of its packed weights and the arguments that are no tensors, as a plan: bytes that the native op
``<op>_planned`` reads. A later call hands plan and tensors to that op, which checks the tensors against the plan and
against each other, as it does for every caller. Where it refuses, nobody is told: the call goes the long way, which has
the words for what is wrong, if anything is. So an address that was given out again does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import extension, registry

KEPT = 4096
LASTING = (int, str, tuple, bool, type(None))  # kinds of arguments that hash and stay what they are
ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None)))


def undisturbed() -> bool:
    """Whether nothing wants to see or change the calls of torch: no autocast, transform, mode, tracer or compiler.

    Nor its deterministic mode, in which fresh memory is filled.
    """
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch._C._get_deterministic_algorithms()
        or torch.compiler.is_compiling()
    )


def plain(*tensors: Any) -> bool:
    """Whether a native op may be called on these tensors, or None, without anybody noticing: no gradient is needed."""
    if not ORDINARY.issuperset(map(type, tensors)) or not undisturbed():
        return False
    return not torch.is_grad_enabled() or not any([t.requires_grad for t in tensors if t is not None])  # noqa: C419


def kinds(value: Any) -> Any:
    """Types of an argument and its elements: 1, 1.0 and True are equal, but not all of them are good strides."""
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)


def of_same_kinds(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether equal arguments, the numbers first, are of the same kinds too."""
    return (
        some[0] is others[0]
        and some[1] is others[1]
        and some[2] is others[2]
        and some[3] is others[3]
        and some[4] is others[4]
    ) or all(kinds(a) == kinds(b) for a, b in zip(some, others, strict=True))


Key = tuple[Any, ...]


class Plans:
    """The remembered plans of one op.

    ``arguments`` are those of a call that are no tensors, as the user gave them, the numbers first; ``rest`` is what
    else the native op does not see.

    Attributes:
        native: the torch op ``<op>_planned``, without the Python around it; None where the library is not built, or was
            built before there was such an op.
        make: the torch op ``<op>_plan``.
        known: the plans.
    """

    def __init__(self, op: str) -> None:
        built = extension.load() is None and hasattr(torch.ops.basisconv, f"{op}_planned")
        self.native: Callable[..., Tensor] | None = None
        self.make: Callable[..., Tensor] | None = None
        if built:
            self.native = getattr(torch.ops.basisconv, f"{op}_planned").default._op
            self.make = getattr(torch.ops.basisconv, f"{op}_plan").default
        self.known: dict[Key, tuple[tuple[Any, ...], Tensor]] = {}

    def find(self, packed: Any, arguments: tuple[Any, ...], rest: Any = None) -> tuple[Key, Tensor] | None:
        """The plan of a call like this one, and the key under which to drop it should the native op refuse."""
        key = (id(packed), registry.wish(), arguments, rest)
        try:
            found = self.known.get(key)
        except TypeError:  # a list for a tuple
            return None
        if found is None:
            return None
        same, plan = found
        return (key, plan) if of_same_kinds(same, arguments) else None

    def run(self, found: tuple[Key, Tensor], *tensors: Any) -> Tensor | None:
        """The result of the native op by a plan that ``find`` gave; None, and the plan forgotten, where it refuses."""
        try:
            return self.native(*tensors, found[1])  # type: ignore[misc]  # there are no plans without it
        except RuntimeError:
            self.known.pop(found[0], None)
            return None

    def keep(self, packed: Any, arguments: tuple[Any, ...], rest: Any, plan: Callable[[], tuple[Any, ...]]) -> None:
        """Remember a call, unless its arguments may change; ``plan`` gives what ``make`` takes."""
        if self.make is None or any(type(argument) not in LASTING for argument in arguments):
            return
        key = (id(packed), registry.wish(), arguments, rest)
        if key in self.known:
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        self.known[key] = (arguments, self.make(*plan()))
