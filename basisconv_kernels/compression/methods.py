"""The methods that ``compress`` knows: which converter serves which class of configuration.

A method is one file with a converter and, next to it or in ``config.py``, a frozen dataclass that states what it shall
do. It calls ``register_method`` once, and ``model.py`` imports it; nothing else of ``compress`` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from basisconv_kernels.compression.report import UNNAMED, LayerReport
from basisconv_kernels.compression.survey import ConvLayer
from basisconv_kernels.layers.conversion import foreign_hooks, refusal

FilterFunction = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Task:
    """What a converter is told beside its configuration.

    Attributes:
        example_inputs: of the network, as ``compress`` takes them.
        batches: inputs of the network to calibrate with, at least one.
        only, skip: first or further names of the layers to take alone, or to leave out; None where none were given.
        filter_fn: (name, module) → whether the layer may be replaced.
        named: names of the layers that the configuration is for, by name pattern; None where it is for all.
        read: {first name of a layer: why nothing can stand in its place}, of ``outside_reads``.
    """

    example_inputs: Any
    batches: Sequence[Any]
    only: frozenset[str] | None = None
    skip: frozenset[str] | None = None
    filter_fn: FilterFunction | None = None
    named: frozenset[str] | None = None
    read: Mapping[str, str] = field(default_factory=dict)

    def narrowed(self, names: frozenset[str]) -> Task:
        """The same for the layers of these names alone."""
        return replace(self, named=names)

    def why_not(self, layer: ConvLayer) -> str | None:
        """Why a layer is out of the question, whatever its filters hold; None where it is not."""
        against = refusal(layer.module)
        if against is not None:
            return against
        names = set(layer.names)
        if self.named is not None and not names & self.named:
            return UNNAMED
        if self.only is not None and not names & self.only:
            return "not in only"
        if self.skip is not None and names & self.skip:
            return "in skip"
        if self.filter_fn is not None and not self.filter_fn(layer.name, layer.module):
            return "refused by filter_fn"
        if layer.tied_to is not None:
            return f"shares its weight parameter with {layer.tied_to}"
        if foreign_hooks(layer.module):
            return "carries hooks, which a conversion would lose"
        if layer.name in self.read:
            return self.read[layer.name]
        if layer.calls == 0:
            return "not reached by example_inputs"
        return None


# (network, its configuration, task) → (network, a row for every convolution). The network may be changed in place; it
# is a copy unless the user asked otherwise. Everything is checked before anything is changed.
Converter = Callable[[nn.Module, Any, Task], tuple[nn.Module, tuple[LayerReport, ...]]]


@dataclass(frozen=True)
class Method:
    """One method of compression.

    Attributes:
        config: the class whose instances ask for it; ``str`` of an instance is what reports call the rule.
        convert: does it.
        layers: the classes of modules that it puts into a network. Each has ``to_plain(*, collapse)``; buffers of
            their own, not of their children, are weights that are not trained and count as parameters.
        check: (network, configuration) → nothing; raises the errors that the configuration alone can tell before any
            other step of a pipeline has run.
    """

    config: type[Any]
    convert: Converter
    layers: tuple[type[nn.Module], ...] = ()
    check: Callable[[nn.Module, Any], None] | None = None


_methods: dict[type[Any], Method] = {}


def register_method(method: Method) -> None:
    """Make a method known to ``compress``.

    Raises:
        ValueError: its class of configurations is taken.
    """
    if method.config in _methods:
        raise ValueError(f"register_method: {method.config.__name__} is taken")
    _methods[method.config] = method


def method_of(config: Any) -> Method:
    """The method that a configuration asks for.

    Raises:
        TypeError: it is no instance of a registered class.
    """
    method = _methods.get(type(config))
    if method is None:
        known = sorted(kind.__name__ for kind in _methods)
        names = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
        raise TypeError(
            f"compress: config must be a {names}, a list of such steps, or a mapping of name patterns to them, got "
            f"{type(config).__name__}"
        )
    return method


def own_layers() -> tuple[type[nn.Module], ...]:
    """The classes of modules that the methods put into networks, each once."""
    return tuple(dict.fromkeys(kind for method in _methods.values() for kind in method.layers))
