"""The process in which Triton's kernels are interpreted, and the skips where Triton is not installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

LONGEST = 600  # seconds of one call; a lost child must not hold the run


def _version(distribution: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(distribution).split(".")[:2])


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call a function of ``tests.triton.interpreted`` in a process of its own under ``TRITON_INTERPRET=1``.

    Triton decides when it is imported, for its whole process, and torch imports it by itself: so neither this process
    nor any other test can share it. Exceptions come back as they are.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not run with NumPy 2.4 or newer")
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, context) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        from tests.triton import interpreted

        pool.submit(interpreted.start).result(LONGEST)
        patch.undo()

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            return pool.submit(function, *arguments).result(LONGEST)

        yield call
