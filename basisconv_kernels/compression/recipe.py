"""The recipe in a model file: which layers were converted, and how. A registry of layer kinds, and its strict checks.

A method that adds a layer adds a ``LayerKind`` for it where the layer is known, and calls ``register``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from basisconv_kernels.compression.container import refuse, shown

MAX_INT = 2**31 - 1
MAX_TEXT = 1000  # characters of a name
FOLDABLE = (_BatchNorm, nn.ReLU, nn.ReLU6, nn.Identity)  # what a layer may have taken in


@dataclass(frozen=True)
class Field:
    """What a value in the recipe must be: in words, and as a check."""

    expected: str
    check: Callable[[Any], bool]


def integer(least: int, most: int = MAX_INT) -> Field:
    """An int, no bool."""
    return Field(f"an int in {least}..{most}", lambda value: type(value) is int and least <= value <= most)


def number(least: float) -> Field:
    """An int or a finite float, no bool."""

    def check(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= MAX_INT and math.isfinite(value)

    return Field(f"a number in {least}..{MAX_INT}", check)


def one_of(*values: Any) -> Field:
    """One of these, told apart by type too: true is no 1."""
    shown_values = ", ".join("null" if value is None else repr(value) for value in values)
    return Field(f"one of {shown_values}", lambda value: any(type(value) is type(v) and value == v for v in values))


def sizes(count: int, least: int) -> Field:
    """A list of this many ints."""
    each = integer(least)
    return Field(
        f"{count} ints of at least {least}",
        lambda value: type(value) is list and len(value) == count and all(map(each.check, value)),
    )


def either(*fields: Field) -> Field:
    """Whatever one of the fields takes."""
    return Field(" or ".join(f.expected for f in fields), lambda value: any(f.check(value) for f in fields))


def record(fields: Mapping[str, Field]) -> Field:
    """An object with exactly these keys."""

    def check(value: Any) -> bool:
        return (
            type(value) is dict and value.keys() == fields.keys() and all(f.check(value[k]) for k, f in fields.items())
        )

    return Field("{" + ", ".join(f"{name}: {field.expected}" for name, field in fields.items()) + "}", check)


BOOLEAN = one_of(False, True)
NULL = one_of(None)
NAME = Field(f"a string of at most {MAX_TEXT} characters", lambda value: type(value) is str and len(value) <= MAX_TEXT)


@dataclass(frozen=True)
class LayerKind:
    """How one class of layers is written into a recipe and made again from it.

    Attributes:
        name: of the kind, as it stands in files; never changes.
        module_type: the class; its subclasses are not meant.
        fields: the keys of a description and what their values must be.
        describe: module → description: JSON values, with exactly the keys of ``fields``.
        rebuild: (description, module) → a new layer of that description to stand in the place of a module of the dense
            network. Its parameters and persistent buffers lie on the meta device, with the dtypes that the dense
            network implies; the loader gives them memory and values. Training flags and ``requires_grad`` are those of
            the module, no random number is drawn, and the module is not changed. It raises ArchitectureError where
            the module cannot be what the layer was made from.
        subclasses: whether a subclass may be saved, undescribed, as an ordinary module; else saving refuses it, since
            it would come back as ``module_type``.
    """

    name: str
    module_type: type[nn.Module]
    fields: Mapping[str, Field]
    describe: Callable[[Any], dict[str, Any]]
    rebuild: Callable[[dict[str, Any], nn.Module], nn.Module]
    subclasses: bool = False


_kinds: dict[str, LayerKind] = {}


def register(kind: LayerKind) -> None:
    """Make a kind known to ``save`` and ``load``.

    Raises:
        ValueError: its name or its class is taken.
    """
    taken = [k.name for k in _kinds.values() if k.name == kind.name or k.module_type is kind.module_type]
    if taken:
        raise ValueError(f"register: layer kind {kind.name!r} of {kind.module_type.__name__} is taken by {taken[0]!r}")
    _kinds[kind.name] = kind


def kind_named(name: str) -> LayerKind:
    """The kind of this name; a KeyError where there is none."""
    return _kinds[name]


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that describes a module; None for ordinary modules.

    Raises:
        TypeError: a subclass that would come back as another class.
    """
    for kind in _kinds.values():
        if type(module) is kind.module_type:
            return kind
        if isinstance(module, kind.module_type) and not kind.subclasses:
            raise TypeError(
                f"{type(module).__name__} is a subclass of {kind.module_type.__name__}, which a file would turn into "
                f"{kind.module_type.__name__} itself; remove parametrizations, or register a LayerKind for it"
            )
    return None


def described_types() -> tuple[type[nn.Module], ...]:
    """The classes of all kinds."""
    return tuple(kind.module_type for kind in _kinds.values())


@dataclass(frozen=True)
class Layer:
    """One described layer: the names of its kind and of its places in the network, and its description."""

    kind: str
    names: tuple[str, ...]
    description: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """One ``torch.fx.GraphModule``: its places in the network, and its nodes as in ``recipe_graphs``."""

    names: tuple[str, ...]
    nodes: list[Any]


@dataclass(frozen=True)
class Recipe:
    """Everything of a file but its tensors.

    Names are in ascending order, layers and graphs in that of their first names, so that equal networks have equal
    recipes. ``shared`` maps the further names of a tensor to its first, under which it is stored.
    """

    layers: tuple[Layer, ...]
    graphs: tuple[Graph, ...]
    shared: dict[str, str]

    def to_document(self) -> dict[str, Any]:
        """JSON values, for the file."""
        return {
            "layers": [{"kind": x.kind, "names": list(x.names), **x.description} for x in self.layers],
            "graphs": [{"names": list(x.names), "nodes": x.nodes} for x in self.graphs],
            "shared": self.shared,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any], tensors: Mapping[str, Any], source: str) -> Recipe:
        """The recipe of a file, with every type and range checked.

        Args:
            document: JSON values.
            tensors: the file's tensors, by name.
            source: the file's name, for messages.

        Raises:
            FileFormatError: what is wrong, and where.
        """
        _exactly(document, ("layers", "graphs", "shared"), "the recipe", source)
        for key, kind in (("layers", list), ("graphs", list), ("shared", dict)):
            if type(document[key]) is not kind:
                refuse(source, f"{key} must be a {kind.__name__}, got {shown(document[key])}")
        layers = tuple(_layer(entry, source) for entry in document["layers"])
        graphs = tuple(_graph(entry, source) for entry in document["graphs"])
        entries: tuple[Layer | Graph, ...] = (*layers, *graphs)
        if len({name for entry in entries for name in entry.names}) != sum(len(entry.names) for entry in entries):
            refuse(source, "two entries of the recipe have the same name")
        for entries in (layers, graphs):
            if sorted(entries, key=lambda entry: entry.names) != list(entries):
                refuse(source, "the entries of the recipe must be in the order of their first names")
        for name, first in document["shared"].items():
            if type(first) is not str or first not in tensors or name in tensors or not first < name:
                refuse(source, f"shared: {shown(name)} must be a later name of a stored tensor, got {shown(first)}")
        return cls(layers, graphs, document["shared"])


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """In words, how a layer's description in the file differs from that of the model's layer; empty if it does not."""
    return "; ".join(
        f"{key} is {shown(expected[key])} in the file, {shown(found[key])} in the model"
        for key in expected
        if key in found and expected[key] != found[key]
    )


def _exactly(entry: Any, keys: tuple[str, ...], what: str, source: str) -> None:
    if type(entry) is not dict or entry.keys() != set(keys):
        got = ", ".join(entry) if type(entry) is dict else shown(entry)
        refuse(source, f"{what} must hold exactly {', '.join(keys)}, got {shown(got)}")


def _names(entry: dict[str, Any], what: str, source: str) -> tuple[str, ...]:
    names = entry.get("names")
    if type(names) is not list or not names or not all(map(NAME.check, names)) or sorted(set(names)) != names:
        refuse(source, f"{what} must have a list of different names in ascending order, got {shown(names)}")
    return tuple(names)


def _layer(entry: Any, source: str) -> Layer:
    if type(entry) is not dict or type(entry.get("kind")) is not str:
        refuse(source, f"a layer of the recipe must name its kind, got {shown(entry)}")
    names = _names(entry, "a layer", source)
    kind = _kinds.get(entry["kind"])
    if kind is None:
        refuse(
            source,
            f"layer {shown(names[0])} is of the kind {shown(entry['kind'])}, which this package does not know: a newer "
            f"package wrote it, or one more must be imported; known are {', '.join(_kinds)}",
        )
    what = f"layer {shown(names[0])} ({kind.name})"
    _exactly(entry, ("kind", "names", *kind.fields), what, source)
    for key, field in kind.fields.items():
        if not field.check(entry[key]):
            refuse(source, f"{what}: {key} must be {field.expected}, got {shown(entry[key])}")
    return Layer(kind.name, names, {key: entry[key] for key in kind.fields})


def _graph(entry: Any, source: str) -> Graph:
    _exactly(entry, ("names", "nodes"), "a graph of the recipe", source)
    names = _names(entry, "a graph", source)
    if type(entry["nodes"]) is not list:
        refuse(source, f"graph {shown(names[0])}: nodes must be a list, got {shown(entry['nodes'])}")
    return Graph(names, entry["nodes"])
