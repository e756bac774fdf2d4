"""The parent's handle on worker processes: start, ask, time out, and tell how one died."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from bench.harness import engines
from bench.harness.errors import EngineMissingError, WorkerDiedError
from bench.harness.paths import ROOT

START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 900.0
STDERR_LINES = 4


class WorkerProcess:
    """One engine in its own process, asleep except while it answers. It starts at once, ``ready`` waits until it did.

    Args:
        engine: name of the engine.
        environment: variables that all workers of a run share.
    """

    def __init__(self, engine: str, environment: Mapping[str, str]) -> None:
        spec = engines.find(engine)
        self.engine = engine
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close
        paths = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [spec.python, "-m", "bench.harness.worker", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={
                **os.environ,
                **environment,
                **spec.environment,
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            },
        )
        self._pending = b""
        self._greeted = False

    def ready(self) -> WorkerProcess:
        """Wait until the engine is loaded; returns itself.

        Raises:
            EngineMissingError: what the engine needs is not installed.
            WorkerDiedError: it did not start.
        """
        if not self._greeted:
            hello = self._answer(START_LIMIT_S)
            if "missing" in hello:
                raise EngineMissingError(hello["missing"])
            self._greeted = True
        return self

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            WorkerDiedError: the process ended or hung; it is gone afterwards.
        """
        assert self._process.stdin is not None
        line = json.dumps({"do": what, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
        except BrokenPipeError:
            raise WorkerDiedError(self._last_words()) from None
        return self._answer(ANSWER_LIMIT_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], limit_s)
            if not ready:
                self._process.kill()
                raise WorkerDiedError(f"{self.engine}: no answer in {limit_s:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerDiedError(self._last_words())
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        raised = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        last = lines[raised[-1] :][:STDERR_LINES] if raised else lines[-1:]  # the error itself, without its traceback
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{self.engine}: {ended}: {' '.join(last) or 'no message'}"

    def close(self) -> None:
        """End the process: it leaves its loop when its stdin closes."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> WorkerProcess:
        return self.ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pool:
    """One process an engine, started when first asked for, started again after it died.

    Args:
        environment: of all of them.
        engines: to start at once, side by side.
    """

    def __init__(self, environment: Mapping[str, str], engines: Sequence[str] = ()) -> None:
        self.environment = dict(environment)
        self._workers = {engine: WorkerProcess(engine, self.environment) for engine in engines}
        self._missing: dict[str, str] = {}

    def get(self, engine: str) -> WorkerProcess:
        """The engine's process, loaded.

        Raises:
            EngineMissingError, WorkerDiedError: as ``WorkerProcess.ready``.
        """
        if engine in self._missing:
            raise EngineMissingError(self._missing[engine])
        if engine not in self._workers:
            self._workers[engine] = WorkerProcess(engine, self.environment)
        try:
            return self._workers[engine].ready()
        except EngineMissingError as why:
            self._missing[engine] = str(why)
            self.drop(engine)
            raise

    def drop(self, engine: str) -> None:
        """Forget a process that died."""
        worker = self._workers.pop(engine, None)
        if worker is not None:
            worker.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in list(self._workers):
            self.drop(engine)
