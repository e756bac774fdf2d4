"""Peak memory of one call, as the operating system sees it: every allocator is counted, whoever owns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _kib(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise ValueError(f"memory: {STATUS} has no {field}")


def added_by(call: Callable[[], object]) -> dict[str, Any]:
    """Bytes by which the peak of the resident set during ``call`` exceeds the resident set before it.

    Meant for the first call in a process whose malloc gives large blocks back at once (``memory_environment``), after a
    small case has loaded the code. The result of the call is alive at the peak and is part of the number. The unit is
    a page.

    Returns:
        ``added_bytes``, or ``unsupported`` where the system has no resettable peak (anything but Linux).
    """
    if not STATUS.exists() or not CLEAR.exists():
        return {"unsupported": f"needs {STATUS} and {CLEAR}"}
    before = _kib("VmRSS")
    try:
        CLEAR.write_text("5")  # resets VmHWM to VmRSS
    except PermissionError as error:
        return {"unsupported": f"peak cannot be reset: {error}"}
    kept = call()
    peak = _kib("VmHWM")
    del kept
    return {"added_bytes": max(0, peak - before) * 1024}
