"""A training run in a child that kills itself at a moment of the test's choice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def killed_at(where: str, count: int, train: Callable[[Callable[[str], None]], object]) -> int:
    """The exit code of a child that runs ``train(tick)`` and sends itself SIGKILL at the count-th ``tick(where)``.

    ``train`` ticks at the moments it names; ``fsync`` and ``replace`` of ``os``, moments of a save, tick by themselves.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        left = [count]

        def tick(place: str) -> None:
            if place == where:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        for name in ("fsync", "replace"):
            call = getattr(os, name)
            setattr(os, name, lambda *a, name=name, call=call: (tick(name), call(*a))[1])
        train(tick)
    except BaseException:  # a child must never return into the test run
        os._exit(9)
    os._exit(0)
