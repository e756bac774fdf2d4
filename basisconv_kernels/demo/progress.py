"""What the demo says while it works: bars on a terminal, one line a stage elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[float], None]
REDRAW = 0.2  # seconds between two drawings of a bar


class Stages:
    """Announces stages one after the other and remembers how long each took.

    Args:
        count (int): how many stages there will be.
        console (Console): where to; stderr of this process by default.

    Attributes:
        seconds: {stage: seconds}, in order; stages of one name add up.
    """

    def __init__(self, count: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.count, self.done = count, 0
        self.seconds: dict[str, float] = {}
        self._bar: Progress | None = None

    def __enter__(self) -> Stages:
        if self.console.is_terminal:
            columns: list[Any] = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
            ]
            # No thread that draws by itself: it would run beside what is being timed.
            self._bar = Progress(
                *columns, TimeElapsedColumn(), console=self.console, transient=True, auto_refresh=False
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def stage(self, kind: str, detail: str = "") -> Iterator[Advance]:
        """One stage; gives a function that takes the share done, 0..1.

        Args:
            kind (str): what is done, the key in ``seconds``.
            detail (str): to what, for people.
        """
        self.done += 1
        title = f"{self.done:>2}/{self.count} {kind}{' ' if detail else ''}{detail}"
        task = self._bar.add_task(title, total=1.0) if self._bar is not None else None
        if self._bar is not None:
            self._bar.refresh()
        start = drawn = time.perf_counter()

        def advance(share: float) -> None:
            nonlocal drawn
            if self._bar is not None and task is not None and time.perf_counter() > drawn + REDRAW:
                drawn = time.perf_counter()
                self._bar.update(task, completed=share, refresh=True)

        try:
            yield advance
        finally:
            if self._bar is not None and task is not None:
                self._bar.remove_task(task)
                self._bar.refresh()
        spent = time.perf_counter() - start
        self.seconds[kind] = self.seconds.get(kind, 0.0) + spent
        self.console.print(f"{title}, {spent:.1f} s", markup=False)
