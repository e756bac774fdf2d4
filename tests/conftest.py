"""Options, markers and the fixture ``kernel`` that all op tests share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core import registry, tuning
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import (
    basis_conv2d_planned,
    binary_conv2d_planned,
    stacked_binary_conv2d_planned,
    ternary_conv2d_planned,
    tucker_conv2d_planned,
)
from basisconv_kernels.testing import Case
from basisconv_kernels.testing.candidates import SIGNATURES

# No times are judged, that of drawing an example included: a busy machine is no fault of what is tested.
_UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", max_examples=150, **_UNTIMED)
hypothesis.settings.register_profile("full", max_examples=2_000, **_UNTIMED)

# Geometries that the fuzz test draws for each dtype. In the long run the three dtypes of a native CPU kernel make 1e5.
GEOMETRIES, GEOMETRIES_OF_THE_LONG_RUN = 150, 33_334

ON_CUDA = ("cuda", "triton")
_CACHE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


@dataclass(frozen=True)
class KernelUnderTest:
    """A function with the signature of the op, bound to a backend, and where its tensors must be."""

    name: str
    device: str
    run: Callable[..., Any]
    supports: Callable[[Any], Any] = lambda problem: ()

    def case(self, case: Case, dtype: torch.dtype) -> Case:
        """The case on this kernel's device and dtype; skips the test where the backend says that it cannot run it."""
        case = case.at(dtype=dtype, device=self.device)
        against = self.supports(case.problem)
        if against:
            pytest.skip("; ".join(against))
        return case


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("basisconv")
    group.addoption(
        "--full", action="store_true", help="also the long tests, 1e5 geometries and more examples elsewhere"
    )
    group.addoption("--geometries", type=int, metavar="N", help="geometries that the fuzz test draws for each dtype")
    group.addoption("--candidate", metavar="package.module:function", help="run the op cases on this kernel alone")
    group.addoption(
        "--candidate-op", default="basis_conv2d", choices=list(SIGNATURES), help="what --candidate computes"
    )
    group.addoption("--candidate-device", default="cpu", help="device of the tensors for --candidate (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    # Neither what was measured on this machine nor a wish of its user decides which backend the tests run on.
    config.stash[_CACHE] = tempfile.TemporaryDirectory()
    os.environ["BASISCONV_CACHE"] = config.stash[_CACHE].name
    for name in ("BASISCONV_BACKEND", "BASISCONV_TUNE"):
        os.environ.pop(name, None)
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "default")
    # On maps this small a second thread only waits, for whole time slices where other processes run (xdist, say). The
    # tests that are about threads take the fixture of that name.
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        config.stash[_CACHE].cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        long = item.get_closest_marker("full") is not None and not config.getoption("--full")
        of_its_op = getattr(getattr(item, "module", None), "OP", None) == config.getoption("--candidate-op")
        takes_it = "kernel" in getattr(item, "fixturenames", ()) and of_its_op
        foreign = config.getoption("--candidate") and not takes_it
        (dropped if long or foreign else kept).append(item)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    items.sort(
        key=lambda item: item.get_closest_marker("full") is None
    )  # long ones first, so that workers end together


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize ``kernel`` by the backends of the op that the test module names in ``OP``, or by ``--candidate``."""
    if "kernel" not in metafunc.fixturenames:
        return
    candidate = metafunc.config.getoption("--candidate")
    if candidate:
        run = testing.load(candidate, metafunc.config.getoption("--candidate-op"))
        kernel = KernelUnderTest(candidate, metafunc.config.getoption("--candidate-device"), run)
        metafunc.parametrize("kernel", [pytest.param(kernel, id=candidate)])
        return
    op = importlib.import_module(f"basisconv_kernels.ops.{metafunc.module.OP}")
    public = getattr(op, metafunc.module.OP)
    parameters = []
    for chosen in op.CANDIDATES:
        for device in (
            ("cuda",) if chosen.name in ON_CUDA else ("cpu", "cuda") if chosen.name == "reference" else ("cpu",)
        ):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            absent = registry.absent(chosen.name)
            if absent and not marks:
                marks.append(pytest.mark.skip(reason=f"{chosen.name}: {absent}"))
            run = functools.partial(public, backend=chosen.name)
            name = chosen.name if device == "cpu" or chosen.name in ON_CUDA else f"{chosen.name}-{device}"
            parameters.append(pytest.param(KernelUnderTest(name, device, run, chosen.supports), id=name, marks=marks))
    metafunc.parametrize("kernel", parameters)


@pytest.fixture
def geometries(request: pytest.FixtureRequest) -> int:
    """How many geometries a fuzz test draws for one dtype."""
    long = request.config.getoption("--full")
    return request.config.getoption("--geometries") or (GEOMETRIES_OF_THE_LONG_RUN if long else GEOMETRIES)


@pytest.fixture
def threads() -> Any:
    """``torch.set_num_threads`` that is undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


PLANNED = (
    basis_conv2d_planned,
    binary_conv2d_planned,
    stacked_binary_conv2d_planned,
    ternary_conv2d_planned,
    tucker_conv2d_planned,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache folder, no tuned table and no remembered choice; all of them are as before after the test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BASISCONV_CACHE", str(folder))
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(op, "_plans", {})
    for module in PLANNED:
        monkeypatch.setattr(module.plans, "known", {})
    tuning.forget()
    yield folder
    tuning.forget()


@pytest.fixture
def fresh_compiler() -> Any:
    """``torch.compile`` without what earlier tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def cuda_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA's graphs and events with a clock of their own: every call that runs takes ``us`` microseconds of it."""
    state = SimpleNamespace(now=0.0, us=7.0, capturing=None, captured=[], refuses=False)

    class Graph:
        def __init__(self) -> None:
            self.calls = 0
            state.captured.append(self)

        def replay(self) -> None:
            state.now += self.calls * state.us

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = state.now

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    @contextlib.contextmanager
    def capture(graph: Graph):
        if state.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        state.capturing = graph
        yield
        state.capturing = None

    for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": capture, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state
