"""Names of layers as users give them, checked before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from basisconv_kernels.compression.survey import convolutions


def resolve(model: nn.Module, argument: str, names: Iterable[str]) -> frozenset[str] | None:
    """Names of layers, or of modules that hold some → names of convolutions; None where none were given.

    Raises:
        ValueError: a name that is neither.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if not wanted:
        return None
    layers = [name for layer in convolutions(model) for name in layer.names]
    found: set[str] = set()
    for name in wanted:
        below = {layer for layer in layers if layer == name or layer.startswith(f"{name}.")}
        if not below:
            raise ValueError(_unknown(argument, name, layers))
        found |= below
    return frozenset(found)


def resolve_exact(model: nn.Module, argument: str, names: Iterable[str]) -> dict[str, str]:
    """{first name of the layer: the name given} for names of convolutions.

    Raises:
        ValueError: a name that is none, or two names of one layer.
    """
    first = {name: layer.name for layer in convolutions(model) for name in layer.names}
    found: dict[str, str] = {}
    for name in names:
        if name not in first:
            raise ValueError(_unknown(argument, name, list(first)))
        if first[name] in found:
            raise ValueError(f"compress: {argument} names one layer twice, as {found[first[name]]!r} and {name!r}")
        found[first[name]] = name
    return found


def _unknown(argument: str, name: str, layers: list[str]) -> str:
    close = difflib.get_close_matches(str(name), layers, n=3)
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else f"there are {', '.join(layers[:8])}" + (", …" if len(layers) > 8 else "")
    )
    return f"compress: {argument} names {name!r}, which is no convolution of this network; {hint}"
