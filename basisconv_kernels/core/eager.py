"""The short way of a repeated eager call, which all ops with packed weights and their layers share.

The first call of its kind is checked, planned and run like every other one. What it was is then remembered under the
address of its packed weights and the arguments that are no tensors, as a plan: bytes that the native op
``<op>_planned`` reads. A later call hands plan and tensors to that op, which checks the tensors against the plan and
against each other, as it does for every caller. Where it refuses, nobody is told: the call goes the long way, which has
the words for what is wrong, if anything is. So an address that was given out again does no harm.

What happens in every such call is C (``csrc/python/eager.cpp``), built with the native library and useless without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import env, extension, registry

KEPT = 4096
LASTING = (int, str, tuple, bool, type(None))  # kinds of arguments that hash and stay what they are
ORDINARY = (Tensor, torch.nn.Parameter)

# Whether somebody wants to see or change the calls of torch: autocast, a transform, a mode, a tracer or the compiler.
# In torch's deterministic mode fresh memory is filled.
DISTURBANCES = (
    torch._C._is_any_autocast_enabled,
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
    torch._C._get_deterministic_algorithms,
    torch.compiler.is_compiling,
)


def _long_way(*_: Any) -> None:
    """Nothing is remembered where the package was not built."""


def _never(*_: Any) -> bool:
    return False


#: ``plain(*tensors)``: whether a native op may be called on these tensors, or None, without anybody noticing.
plain: Callable[..., bool] = _never
#: ``call(plans.known, plans.native, packed, arguments, rest, *tensors)``: the result of a call that a plan is known of,
#: None where it must go the long way. ``arguments`` are those that are no tensors, as the user gave them; ``rest`` is
#: what else the native op does not see.
call: Callable[..., Any] = _long_way
#: ``repeat(memory, layer.__dict__, *tensors)``: the same of a layer's call; ``memory`` is made by
#: ``PreparedWeights.remember`` (layers/packing.py).
repeat: Callable[..., Any] = _long_way
_key: Callable[[Any, tuple[Any, ...], Any], Any] = _long_way

with contextlib.suppress(ImportError):
    from basisconv_kernels.core import _eager

    _eager.watch(
        ORDINARY, DISTURBANCES, torch.is_grad_enabled, registry.wish, registry.ASKED.get, registry.NOBODY,
        *env.kept_values("BASISCONV_BACKEND"),
    )  # fmt: skip
    plain, call, repeat, _key = _eager.plain, _eager.call, _eager.repeat, _eager.key


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


class Plans:
    """The remembered plans of one op.

    Attributes:
        native: the torch op ``<op>_planned``, without the Python around it; None where the library is not built, or was
            built before there was such an op.
        make: the torch op ``<op>_plan``.
        known: arguments and plan of a call by its key; an entry whose plan the native op refused is gone.
    """

    def __init__(self, op: str) -> None:
        built = extension.load() is None and hasattr(torch.ops.basisconv, f"{op}_planned")
        self.native: Callable[..., Tensor] | None = None
        self.make: Callable[..., Tensor] | None = None
        if built and _key is not _long_way:
            self.native = getattr(torch.ops.basisconv, f"{op}_planned").default._op
            self.make = getattr(torch.ops.basisconv, f"{op}_plan").default
        self.known: dict[Any, tuple[tuple[Any, ...], Tensor]] = {}

    def of(self, packed: Any, arguments: tuple[Any, ...], rest: Any = None) -> Tensor | None:
        """The plan of a call like this one, None where none is known."""
        try:
            found = self.known.get(_key(packed, arguments, rest))
        except TypeError:  # a list for a tuple
            return None
        if found is None:
            return None
        same, plan = found
        return plan if of_same_kinds(same, arguments) else None

    def run(self, plan: Tensor, packed: Any, arguments: tuple[Any, ...], rest: Any, *tensors: Any) -> Tensor | None:
        """The native op by a plan that ``of`` gave, on plain tensors; None, and the plan forgotten, if it refuses."""
        try:
            return self.native(*tensors, packed, plan)  # type: ignore[misc]  # there are no plans without it
        except RuntimeError:
            self.known.pop(_key(packed, arguments, rest), None)
            return None

    def keep(self, packed: Any, arguments: tuple[Any, ...], rest: Any, plan: Callable[[], tuple[Any, ...]]) -> None:
        """Remember a call, unless its arguments may change; ``plan`` gives what ``make`` takes."""
        if self.make is None or any(type(argument) not in LASTING for argument in arguments):
            return
        key = _key(packed, arguments, rest)
        if key in self.known:
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        self.known[key] = (arguments, self.make(*plan()))
