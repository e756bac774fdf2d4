"""All suites by name."""

from __future__ import annotations

from bench import basis_conv2d, binary_conv2d, stacked_binary_conv2d, ternary_conv2d, tucker_conv2d
from bench.harness.case import Suite
from bench.harness.errors import UnknownNameError


def suites() -> dict[str, Suite]:
    """All suites by name, in the order of their numbers."""
    modules = (basis_conv2d, binary_conv2d, stacked_binary_conv2d, ternary_conv2d, tucker_conv2d)
    found = [suite for module in modules for suite in module.suites()]
    return {suite.name: suite for suite in sorted(found, key=lambda suite: _order(suite.name))}


def _order(name: str) -> tuple[int, str]:
    """C2 before C10, names without a number last."""
    number = name.removeprefix("C")
    return (int(number), "") if number.isdigit() else (10**6, name)


def find(name: str) -> Suite:
    """A suite by name, whatever the case of its letters.

    Raises:
        UnknownNameError: no such suite.
    """
    found = suites()
    for suite in found.values():
        if suite.name.lower() == name.lower():
            return suite
    raise UnknownNameError(f"bench: no suite has the name {name!r}; there are {', '.join(found)}")
