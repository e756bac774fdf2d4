"""``python -m basisconv_kernels`` and ``basisconv``: the command line, or what to install to have one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (sequence of str, optional): instead of those of the process.

    Returns:
        int: 0 if all went well, 1 if the command failed, 2 if it was called wrongly or the command line is not
        installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        lacks = " and ".join(missing)
        print(f"basisconv: the command line needs {lacks}: pip install 'basisconv_kernels[cli]'", file=sys.stderr)
        return 2
    from basisconv_kernels.cli import run

    return run(list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
