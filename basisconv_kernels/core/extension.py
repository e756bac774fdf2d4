"""Loading of the native library and the facts it states about itself.

The library holds torch ops only, no Python: it is loaded once, on the first question about it, and never compiled here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY_NAME = "_C"


def path() -> Path | None:
    """The library's file, None where it is not built."""
    folder = Path(__file__).resolve().parents[1]
    found = sorted(file for pattern in ("_C.*so", "_C.*pyd", "_C.*dylib") for file in folder.glob(pattern))
    return found[0] if found else None


@functools.cache
def load() -> str | None:
    """Load the library; None on success, else the reason in words."""
    found = path()
    if found is None:
        return "the native library is not built (no C++ compiler at installation, or BASISCONV_BUILD=none)"
    try:
        torch.ops.load_library(str(found))
    except (OSError, RuntimeError) as error:
        return f"{found.name} does not load under torch {torch.__version__}: {error}"
    return None


@functools.cache
def facts() -> dict[str, Any]:
    """What was built and what this CPU offers; empty where the library is absent."""
    if load() is not None:
        return {}
    return json.loads(torch.ops.basisconv.build_facts.default())
