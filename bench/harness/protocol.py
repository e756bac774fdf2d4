"""What a worker process and its parent say to each other, and the parts of an engine that the worker drives.

One JSON object a line. The parent writes to the worker's stdin, the worker answers on its stdout; in between it sleeps
in a blocking read. Requests: ``prepare``, ``output``, ``calibrate``, ``sample``, ``memory``, ``release``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Method:
    """One way in which an engine can compute a case.

    Attributes:
        form: fused, two_step or dense.
        layout: how the maps lie in memory: ``channels_last`` or ``nchw``.
        call: runs it once; this is what is timed.
        output: the results of one fresh call, float32, as [N, K, OH, OW] whatever the layout.
        detail: more about who computes.
        mode: the context that a program enters once around many calls, such as ``torch.no_grad``; it is not timed.
    """

    form: str
    layout: str
    call: Callable[[], object]
    output: Callable[[], list[Array]]
    detail: str = ""
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Files:
    """The folder that ``payload.build`` wrote."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        """``case``, ``kind``, ``dtype``, ``forms``."""
        found: dict[str, Any] = json.loads((self.folder / "payload.json").read_text())
        return found


class Engine(Protocol):
    """Somebody who can compute cases; made once in its own process."""

    def prepare(self, files: Files) -> list[Method]:
        """All methods for this case.

        Raises:
            errors.UnsupportedError: none.
        """
