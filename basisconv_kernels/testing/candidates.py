"""A user's own kernel, named as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from torch import Tensor

Kernel = Callable[..., Tensor]

ARGUMENTS = ("stride", "padding", "dilation", "groups", "activation", "residual", "precise")


def load(name: str) -> Kernel:
    """Import a kernel with the signature of ``basis_conv2d``.

    Args:
        name (str): ``"package.module:function"``, importable from here.

    Returns:
        Callable: takes ``(input, basis_weight, coefficients, bias, *, stride, padding, dilation, groups, activation,
        residual, precise)`` in normal form: pairs, padding as (top, bottom, left, right).

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
    _check_signature(name, kernel)
    return kernel


def _check_signature(name: str, kernel: Kernel) -> None:
    try:
        signature = inspect.signature(kernel)
    except (TypeError, ValueError):  # a built-in function or a torch op states none
        return
    try:
        signature.bind("input", "basis_weight", "coefficients", "bias", **dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise TypeError(
            f"candidate: {name}{signature} must take (input, basis_weight, coefficients, bias, *, "
            f"{', '.join(ARGUMENTS)}): {error}"
        ) from error
