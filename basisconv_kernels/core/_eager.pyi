from collections.abc import Callable
from typing import Any

from torch import Tensor

def watch(
    ordinary: tuple[type, ...],
    disturbances: tuple[Callable[[], Any], ...],
    records: Callable[[], bool],
    wish: Callable[[], str | None],
    wish_of_context: Callable[[], str | None],
    nobody: str,
    environment: dict[Any, Any] | None,
    variable: Any,
    /,
) -> None: ...
def plain(*tensors: Any) -> bool: ...
def key(packed: Any, arguments: tuple[Any, ...], rest: Any, /) -> tuple[Any, ...]: ...
def call(
    known: dict[Any, Any],
    native: Callable[..., Tensor] | None,
    packed: Any,
    arguments: tuple[Any, ...],
    rest: Any,
    /,
    *tensors: Any,
) -> Any: ...
def repeat(memory: tuple[Any, ...], attributes: dict[str, Any], /, *tensors: Any) -> Any: ...
