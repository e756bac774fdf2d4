"""A pytest plugin: tests as steps of a journal, ``-p bench.gpu.pytest_journal --journal FILE``.

Tests that an earlier run ended are left out, so an interrupted run goes on. After a failure the device is asked whether
it still answers; if not, or when the time is over, the session ends, and a fresh process goes on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import facts
from bench.gpu.journal import FAILED, PASSED, SKIPPED, Journal
from bench.gpu.supervise import REPLACE_ME

PATIENCE = 180.0  # seconds that one test may take: some compile kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the plugin."""
    group = parser.getgroup("journal")
    group.addoption("--journal", metavar="FILE", help="note every test here, and leave out those that are")
    group.addoption("--journal-device", default="cuda", help="cuda, or cpu in a rehearsal")
    group.addoption("--journal-part", default="0/1", metavar="I/N", help="run every N-th test from the I-th on")
    group.addoption("--journal-deadline", type=float, default=float("inf"), help="seconds since the epoch")


def pytest_configure(config: pytest.Config) -> None:
    """Begin where a journal is asked for."""
    path = config.getoption("--journal")
    if path:
        config.pluginmanager.register(Noting(config, Path(path)), "basisconv-journal")


class Noting:
    """The hooks of one session."""

    def __init__(self, config: pytest.Config, path: Path):
        self.device = config.getoption("--journal-device")
        self.deadline = config.getoption("--journal-deadline")
        about = facts.context(self.device)
        self.stamp = facts.stamp(about, ours=True)
        self.journal = Journal(path, about)
        self.replace = False
        self.began = 0.0
        self.found: tuple[str, str] = (PASSED, "")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is done, and what is for others."""
        done = self.journal.done()
        i, n = map(int, config.getoption("--journal-part").split("/"))
        left = [item for item in items[i::n] if (item.nodeid, self.stamp) not in done]
        if len(left) < len(items):
            kept = set(left)
            config.hook.pytest_deselected(items=[item for item in items if item not in kept])
            items[:] = left

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure of its own."""
        if report.failed:
            last = report.longreprtext.strip().splitlines()[-1:]
            self.journal.end(f"{report.nodeid} (import)", FAILED, self.stamp, note="".join(last)[:2000], data={})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.journal.start(nodeid, self.stamp, PATIENCE)
        self.began, self.found = time.time(), (PASSED, "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One of its phases ended."""
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            told = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-3:]
            self.found = (FAILED, "\n".join(told)[:2000])
        elif report.skipped and self.found[0] == PASSED:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.found = (SKIPPED, str(reason).removeprefix("Skipped: "))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test ended."""
        status, note = self.found
        seconds = round(time.time() - self.began, 3)
        self.journal.end(nodeid, status, self.stamp, note=note, seconds=seconds, data={})

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """End the session where this process is of no more use."""
        if nextitem is None:
            return
        if time.time() > self.deadline:
            item.session.shouldstop = "the time is over"
        elif self.found[0] == FAILED and not facts.answers(self.device):
            self.replace = True
            item.session.shouldstop = "the device is lost for this process"

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """0 once every test was noted, however it ended: the journal says that."""
        if self.replace:
            session.exitstatus = REPLACE_ME
        elif exitstatus not in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            session.exitstatus = 0
