"""Memory of what a layer derives from its weights for the kernel: folded coefficients and packed weights.

It is a plain attribute, no buffer: it never reaches a state_dict, a copy, a pickle, a file or an exported program.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from basisconv_kernels.core import eager, registry

ORDINARY = (Tensor, torch.nn.Parameter)
Value = TypeVar("Value", bound=tuple[Any, ...])  # of tensors and None


def held(layer: torch.nn.Module, name: str) -> Any:
    """``getattr(layer, name)`` of a parameter or buffer, without the search that makes a small layer slow."""
    if name in layer._parameters:
        return layer._parameters[name]
    return layer._buffers[name] if name in layer._buffers else getattr(layer, name)


class Prepared(NamedTuple):
    """What the op takes instead of the layer's own tensors.

    ``coefficients`` and ``bias`` hold a folded BatchNorm, None where there is none; ``packed`` is None where no native
    kernel exists.
    """

    coefficients: Tensor | None
    bias: Tensor | None
    packed: Tensor | None


class _Source(NamedTuple):
    """A tensor that a value was made from, as it was then; ``version`` is None for inference tensors."""

    tensor: Tensor
    kept: Tensor
    address: int
    version: int | None
    shape: torch.Size
    strides: tuple[int, ...]


class _Entry(NamedTuple):
    settings: Hashable
    sources: tuple[_Source, ...]
    value: Any


class PreparedWeights:
    """One remembered tuple of tensors and the proof that it still holds; and the layer's last call.

    - An address says nothing once its memory is freed and given out again, so an alias of every source tensor is kept:
      its memory stays, and an equal address is the same memory. The version counter then tells edits in place.
    - Inference tensors count no versions: copies of them are kept instead and compared value by value, which reads the
      weights once a call and is cheaper than packing them.
    - Edits that PyTorch itself does not see (through ``.data`` or a NumPy view) need ``BasisConv2d.repack``.

    Copies and pickles start empty. The entry is replaced as a whole, so threads that share a layer see a whole one.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self._call: tuple[Any, ...] | None = None  # what ``core.eager.repeat`` takes

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        return PreparedWeights, ()

    def clear(self) -> None:
        """Forget the entry and the call, and release what they kept."""
        self._entry = self._call = None

    def get(self, sources: tuple[Tensor, ...], settings: Hashable, build: Callable[[], Value]) -> Value:
        """The remembered value if no source changed since, else ``build()``, run without gradients and remembered.

        Nothing is remembered of tensor subclasses, fake and meta tensors, and under a ``torch.func`` transform.

        Args:
            sources: every tensor that ``build`` reads.
            settings: everything else that it depends on.
            build: computes the value.
        """
        entry = self._entry
        if entry is not None and entry.settings == settings and _unchanged(sources, entry.sources):
            return entry.value
        # Out of inference mode, so that the result may serve a later call that needs the gradient of its input.
        with torch.inference_mode(False), torch.no_grad():
            value = build()
            if _ordinary(sources, value):
                self._entry = _Entry(settings, tuple(map(_as_it_is, sources)), value)
        return value

    def remember(
        self,
        layer: torch.nn.Module,
        plans: eager.Plans,
        call: tuple[Any, ...],
        tensors: tuple[Any, ...],
        *,
        holes: tuple[int, ...],
        depends_on: tuple[str, ...],
    ) -> None:
        """Let ``repeat`` make the next calls of ``layer``, as long as nothing changes that they depend on.

        Calls that record gradients go the long way where a source of the weights wants one, be it no operand itself.

        Args:
            layer: whose weights ``get`` was last asked for.
            plans: of the op.
            call: packed, arguments and rest, under which the op knows a plan of this call if it went the short way.
            tensors: what the planned torch op takes before packed and plan.
            holes: places of tensors that come with each call.
            depends_on: names of the layer's attributes, parameters, buffers and modules that all this depends on.
        """
        entry = self._entry
        if entry is None or any(source.version is None for source in entry.sources):
            return
        plan = plans.of(*call)
        if plan is None:
            return
        known = {id(source.tensor): source for source in entry.sources}
        attributes, members = [], []
        for name in depends_on:
            place = next((p for p in ("_parameters", "_buffers", "_modules") if name in layer.__dict__[p]), None)
            if place is not None:
                value = layer.__dict__[place][name]
                members.append((place, name, value, known.pop(id(value), None)))
            elif name in layer.__dict__:
                attributes.append((name, layer.__dict__[name]))
            else:
                return
        if not known:  # there is no source that nobody would look at
            operands = (*tensors, call[0], plan)
            self._call = (plans.native, registry.wish(), tuple(attributes), tuple(members), operands, holes)

    def repeat(self, layer: torch.nn.Module, *tensors: Any) -> Tensor | None:
        """The result of a call like the remembered one on ``tensors``, one a hole; None where it must go the long way.

        Not for the compiler's eyes: ask ``torch.compiler.is_dynamo_compiling`` before.
        """
        if self._call is None:
            return None
        out: Tensor | None = eager.repeat(self._call, layer.__dict__, *tensors)
        if out is None:
            self._call = None
        return out


def _as_it_is(tensor: Tensor) -> _Source:
    countless = tensor.is_inference()
    kept = tensor.clone() if countless else tensor.detach()
    version = None if countless else tensor._version
    return _Source(tensor, kept, tensor.data_ptr(), version, tensor.shape, tensor.stride())


def _unchanged(sources: tuple[Tensor, ...], known: tuple[_Source, ...]) -> bool:
    if len(sources) != len(known):
        return False
    for tensor, (same, kept, address, version, shape, strides) in zip(sources, known):  # noqa: B905, for its time
        if (
            tensor is not same
            or tensor.data_ptr() != address
            or tensor.shape != shape
            or tensor.stride() != strides
            or (not torch.equal(tensor, kept) if version is None else tensor._version != version)
        ):
            return False
    return True


def _ordinary(sources: tuple[Tensor, ...], value: tuple[Any, ...]) -> bool:
    if torch._C._are_functorch_transforms_active():
        return False
    made = [tensor for tensor in value if tensor is not None]
    return all(type(t) in ORDINARY and not t.is_meta for t in sources) and all(type(t) is Tensor for t in made)
