"""A user's own kernel, named as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from torch import Tensor

Kernel = Callable[..., Tensor]

# What a kernel of each op must take: tensors by position, the rest by name.
SIGNATURES = {
    "basis_conv2d": (
        ("input", "basis_weight", "coefficients", "bias"),
        ("stride", "padding", "dilation", "groups", "activation", "residual", "precise"),
    ),
    "tucker_conv2d": (
        ("input", "u_in", "core", "u_out", "bias"),
        ("stride", "padding", "dilation", "activation", "residual", "precise"),
    ),
}


def load(name: str, op: str = "basis_conv2d") -> Kernel:
    """Import a kernel with the signature of an op.

    Args:
        name (str): ``"package.module:function"``, importable from here.
        op (str): a key of ``SIGNATURES``.

    Returns:
        Callable: takes, for ``basis_conv2d``, ``(input, basis_weight, coefficients, bias, *, stride, padding, dilation,
        groups, activation, residual, precise)`` in normal form: pairs, padding as (top, bottom, left, right).

    Raises:
        ValueError: the name has no such form.
        ImportError: the module cannot be imported, or has no such function.
        TypeError: what was found cannot be called this way.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"candidate: must be 'package.module:function', got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"candidate: {module_name!r} cannot be imported ({error}); is it on PYTHONPATH?") from error
    kernel = getattr(module, attribute, None)
    if kernel is None:
        raise ImportError(f"candidate: module {module_name!r} has no {attribute!r}")
    if not callable(kernel):
        raise TypeError(f"candidate: {name} must be a function, got {type(kernel).__name__}")
    _check_signature(name, kernel, *SIGNATURES[op])
    return kernel


def _check_signature(name: str, kernel: Kernel, tensors: tuple[str, ...], named: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(kernel)
    except (TypeError, ValueError):  # a built-in function or a torch op states none
        return
    try:
        signature.bind(*tensors, **dict.fromkeys(named))
    except TypeError as error:
        raise TypeError(
            f"candidate: {name}{signature} must take ({', '.join(tensors)}, *, {', '.join(named)}): {error}"
        ) from error
