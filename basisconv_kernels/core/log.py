"""The package's logger: silent unless the user configures logging or sets ``BASISCONV_LOG=dispatch``."""

from __future__ import annotations

import logging

from basisconv_kernels.core import env

logger = logging.getLogger("basisconv_kernels")
logger.addHandler(logging.NullHandler())

_said: set[str] = set()


def _configure() -> None:
    """Attach one stderr handler if the environment asks for a topic."""
    if env.log_topics():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


_configure()


def once(message: str, level: int = logging.INFO) -> None:
    """Log a message the first time it occurs in this process."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)
