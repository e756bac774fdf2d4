"""The exceptions of the package that Python's own do not cover."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run the call; the message lists every candidate's reasons."""


class ArchitectureError(ValueError):
    """A model file is intact but belongs to another network than the one given; nothing was changed."""


class FileFormatError(ValueError):
    """A file is truncated, edited, foreign or newer than this package; nothing was changed."""
