"""Words in and out of the command line: messages, JSON, columns of text, and options with a form of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

LONGEST_MESSAGE = 1200


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(lines) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} … (--traceback shows all)"


def say(text: str, style: str = "") -> None:
    """A message on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text, style=style)


def warn(message: Any, *_: Any, **__: Any) -> None:
    """A Python warning as a message; takes the place of ``warnings.showwarning``."""
    say(f"basisconv: warning: {message}", "yellow")


def print_json(value: Any) -> None:
    """A result for programs, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_rows(rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """Columns of text; ``styles`` colour whole rows on a terminal."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        console.print("  ".join([*cells, row[-1]]).rstrip(), style=styles[number] if styles else "")


def sizes(text: str, option: str, count: int) -> tuple[int, ...]:
    """``1,3,224,224`` → ints; wrong usage otherwise."""
    parts = text.replace("x", ",").replace("×", ",").split(",")
    if len(parts) != count or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"must be {count} whole numbers above 0, such as 1,3,224,224, got {text!r}", param_hint=option
        )
    return tuple(int(part) for part in parts)


def pair(text: str, option: str, least: int) -> tuple[int, int]:
    """``3`` or ``3,5`` → two ints; wrong usage otherwise."""
    parts = text.replace("x", ",").split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise typer.BadParameter(
            f"must be one or two whole numbers of at least {least}, got {text!r}", param_hint=option
        )
    return int(parts[0]), int(parts[-1])


def one_of(option: str, value: Any, known: Sequence[Any]) -> None:
    """Wrong usage where the value of an option is not one of the known ones."""
    if value not in known:
        names = ", ".join(str(name) for name in known if name is not None)
        raise typer.BadParameter(f"must be one of {names}, got {value!r}", param_hint=option)


def dtype(name: str) -> torch.dtype:
    """``float32`` → ``torch.float32``; wrong usage where the ops do not take it."""
    from basisconv_kernels.core import checks
    from basisconv_kernels.core.problem import dtype_name

    dtypes = {dtype_name(known): known for known in checks.FLOAT_DTYPES}
    one_of("--dtype", name, list(dtypes))
    return dtypes[name]


def flat(value: Any) -> str:
    """A JSON value as words."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {flat(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(flat(part) for part in value)
    return "none" if value is None else str(value)
