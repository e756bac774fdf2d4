"""Named errors that several parts share. Imports nothing: worker processes without PyTorch load it."""

from __future__ import annotations


class UnknownNameError(ValueError):
    """A suite, case or engine was asked for that does not exist; the message lists those that do."""


class UnsupportedError(Exception):
    """An engine cannot run this case at all (not: runs it wrongly); the message says why."""


class WorkerDiedError(RuntimeError):
    """A worker's process ended or did not answer; the message carries the end of its stderr."""


class EngineMissingError(RuntimeError):
    """The engine is not installed."""
