"""The only reader of ``os.environ`` in the package; docs/env.md lists every variable with its meaning.

Values are read when asked for, not at import: a test or a notebook may set them at any time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what it does and the values it takes."""

    name: str
    meaning: str
    values: str


VARIABLES = (
    Variable("BASISCONV_BACKEND", "backend of every op call that names none", "a backend name of `basisconv ops`"),
    Variable(
        "BASISCONV_CPU_ISA",
        "caps the instruction set of the CPU kernels; read once a process",
        "base|avx2|avx512|avx512_vpopcntdq|avx512_bf16|amx",
    ),
    Variable("BASISCONV_CACHE", "folder of what is measured on this machine: tuned/, selfcheck/", "a path"),
    Variable("BASISCONV_DATA", "folder with data sets (cifar10.npz, fashion-mnist/)", "a path"),
    Variable("BASISCONV_LOG", "what to log on stderr", "dispatch"),
    Variable("BASISCONV_TUNE", "time the backends of weights that no table knows, when first used", "first-use"),
    Variable("BASISCONV_BUILD", "read by setup.py only: which kernels to build", "auto|cpu|cuda|none"),
    Variable("NO_COLOR", "no colours in the output of the command line", "any value"),
)


def kept_values(name: str) -> tuple[dict[Any, Any] | None, Any]:
    """The dict in which ``os.environ`` keeps its values, and the key of a variable in there.

    Every call of an op asks for a backend. ``os.environ.get`` answers that a variable is not set by catching an error,
    ten times as slowly as this dict; None where Python has no such dict.
    """
    kept = getattr(os.environ, "_data", None)
    encode: Any = getattr(os.environ, "encodekey", lambda name: name)
    return kept if isinstance(kept, dict) else None, encode(name)


_, _ENCODED_BACKEND = kept_values("BASISCONV_BACKEND")


def _get(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def backend() -> str | None:
    """The backend named by ``BASISCONV_BACKEND``, or None."""
    try:
        if os.environ._data.get(_ENCODED_BACKEND) is None:  # type: ignore[attr-defined]
            return None
    except AttributeError:
        pass
    return _get("BASISCONV_BACKEND")


def log_topics() -> frozenset[str]:
    """The topics named by ``BASISCONV_LOG``, separated by commas."""
    return frozenset(part.strip() for part in (_get("BASISCONV_LOG") or "").split(",") if part.strip())


def tunes_on_first_use() -> bool:
    """Whether ``BASISCONV_TUNE`` asks for it."""
    return _get("BASISCONV_TUNE") == "first-use"


def triton_interprets() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests: its own variable ``TRITON_INTERPRET``, as it reads it."""
    return (_get("TRITON_INTERPRET") or "").lower() in ("1", "true", "yes", "on")


def cache_folder() -> Path:
    """The folder of what is measured on this machine: ``BASISCONV_CACHE``, or ``basisconv`` in the user's cache folder.

    Raises:
        RuntimeError: neither variable is set and this user has no home folder.
    """
    return _folder("BASISCONV_CACHE", "basisconv")


def data_folder() -> Path:
    """The folder with data sets: ``BASISCONV_DATA``, or ``basisconv-data`` in the user's cache folder.

    Raises:
        RuntimeError: neither variable is set and this user has no home folder.
    """
    return _folder("BASISCONV_DATA", "basisconv-data")


def _folder(variable: str, default: str) -> Path:
    """The folder that a variable names, else one in ``XDG_CACHE_HOME``, else one in ``~/.cache``."""
    named, cache = _get(variable), _get("XDG_CACHE_HOME")
    if named:
        return Path(named).expanduser()
    return (Path(cache) if cache else Path.home() / ".cache") / default


def as_set() -> dict[str, str]:
    """The variables of this package that are set now, for bug reports."""
    return {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ}
