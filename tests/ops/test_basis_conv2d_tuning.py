"""Automatic choice of ``basis_conv2d`` and the measured table: eager, compiled, and on first use."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import BasisConv2d, basis_conv2d, use_backend
from basisconv_kernels.core import log, registry, tuning
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_backends as backends
from basisconv_kernels.ops import basis_conv2d_tuning

PROBLEM = Conv2dProblem(C=8, Q=4, K=12, N=2, H=6, W=7, padding=(1, 1, 1, 1))
LAST = torch.channels_last

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
]


def say_slower(problem: Conv2dProblem = PROBLEM) -> None:
    """Write a table in which the native kernel takes twice the time of plain PyTorch."""
    ms = {name: {"median": t, "q1": t, "q3": t} for name, t in (("cpu", 2.0), ("reference", 1.0))}
    entry = {"op": op.OP, "problem": problem.to_json(), "threads": torch.get_num_threads(), "ms": ms, "disturbed": 0.0}
    tuning.write([entry], tuning.user_file())


def tensors(N: int = 2, H: int = 6, W: int = 7, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, 8, H, W), (4, 8, 3, 3), (12, 4))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The backends that ran, in order."""
    called: list[str] = []

    def note(name):
        run = registry.resolve(next(c for c in op.CANDIDATES if c.name == name))

        def noting(*arguments):
            called.append(name)
            return run(*arguments)

        return noting

    monkeypatch.setattr(
        backends,
        "_targets",
        {candidate.name: (note(candidate.name), op.reference.backward) for candidate in op.CANDIDATES},
    )
    return called


def call(*arguments, **settings):
    return basis_conv2d(*arguments, **{"padding": 1, **settings})


def test_without_a_table_the_kernel_runs(ran):
    call(*tensors())
    assert ran == ["cpu"]


def test_what_was_measured_slower_is_passed_over_at_every_size(ran):
    say_slower()
    for size in ((2, 6, 7), (1, 6, 7), (2, 20, 30), (0, 6, 7)):
        call(*tensors(*size))
        call(*tensors(*size), activation="relu", bias=torch.zeros(12))
    assert set(ran) == {"reference"}


def test_only_what_was_measured_is_passed_over(ran):
    say_slower()
    input, *weights = tensors()
    call(input.contiguous(memory_format=LAST), *weights)
    call(*tensors(dtype=torch.bfloat16))
    call(*tensors(), padding=0)
    call(*tensors(), precise=True)
    assert set(ran) == {"cpu"}


def test_each_memory_format_has_its_own_choice(ran):
    """Also in turn, with equal shapes: what is remembered of a call must not serve the other format."""
    say_slower()
    input, *weights = tensors()
    for _ in range(2):
        call(input, *weights)
        call(input.contiguous(memory_format=LAST), *weights)
    assert ran == ["reference", "cpu"] * 2


def test_a_wish_is_stronger_than_the_table(ran, monkeypatch):
    say_slower()
    call(*tensors(), backend="cpu")
    with use_backend("cpu"):
        call(*tensors())
    monkeypatch.setenv("BASISCONV_BACKEND", "cpu")
    call(*tensors())
    assert ran == ["cpu"] * 3


def test_the_log_says_why(monkeypatch, caplog):
    say_slower()
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    for N in (1, 2):
        call(*tensors(N))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("basis_conv2d [8→4→12 3×3 float32 cpu padding 1,1,1,1] → reference (not cpu: measured")
    assert "2.000 ms against 1.000 ms (N2 @6×7" in message


def test_gradients_take_the_same_choice(ran):
    say_slower()
    input, *weights = tensors()
    call(input.requires_grad_(), *weights).sum().backward()
    assert ran == ["reference"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_a_compiled_graph_takes_the_same_choice(slow, last, dynamic):
    if slow:
        say_slower()
        say_slower(Conv2dProblem(C=8, Q=4, K=12, N=2, H=6, W=7, padding=(1, 1, 1, 1), channels_last=True))
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
    sizes = ((2, 6, 7), (3, 9, 11), (5, 8, 13))
    with torch.no_grad():
        for size in sizes:
            input, *weights = tensors(*size)
            input = input.contiguous(memory_format=LAST) if last else input
            assert torch.equal(compiled(input, *weights), call(input, *weights))
    for graph in graphs:
        natives = [n for n in graph.graph.nodes if str(n.target).startswith("basisconv.basis_conv2d")]
        assert len(natives) == (0 if slow else 1)
    assert len(graphs) == {True: 1, None: 2, False: len(sizes)}[dynamic]


def test_a_layer_takes_the_same_choice(ran):
    say_slower()
    layer = BasisConv2d(8, 12, 3, 4, padding=1).eval().requires_grad_(False)
    layer(tensors()[0])
    assert ran == ["reference"]


def test_a_table_that_speaks_against_all_leaves_the_first():
    candidates = op.CANDIDATES
    against = {candidate.name: () for candidate in candidates}
    everything = dict.fromkeys(against, "slower")
    assert registry.first(candidates, against, None, everything) is candidates[0]
    second = candidates[1]
    assert registry.first(candidates, against, None, {candidates[0].name: "slower"}) is second
    assert registry.first(candidates, against, candidates[0].name, everything) is candidates[0]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_an_entry_is_what_the_reader_expects():
    entry = basis_conv2d_tuning.measure(PROBLEM, 0.01)
    assert set(entry["ms"]) == {"cpu", "reference"}
    assert entry["fastest"] in entry["ms"]
    assert tuning._is_entry(json.loads(json.dumps(entry)))
    assert entry["problem"] == PROBLEM.to_json()


@pytest.mark.parametrize(
    "change",
    [{"residual": True}, {"channels_last": True}, {"dtype": torch.float64}, {"groups": 2, "compact": True}],
    ids=str,
)
def test_every_kind_of_problem_can_be_measured(change):
    problem = Conv2dProblem(C=8, Q=4, K=12, N=2, H=6, W=7, **change)
    backends = {"reference"} if "dtype" in change else {"cpu", "reference"}
    assert set(basis_conv2d_tuning.measure(problem, 0.001)["ms"]) == backends


@pytest.fixture
def measured(monkeypatch) -> list[Conv2dProblem]:
    """``BASISCONV_TUNE=first-use``, and the problems that were measured; the kernel always turns out slower."""
    problems: list[Conv2dProblem] = []

    def measure(problem, seconds):
        problems.append(problem)
        ms = {name: {"median": t, "q1": t, "q3": t} for name, t in (("cpu", 2.0), ("reference", 1.0))}
        base = {"op": op.OP, "problem": problem.to_json(), "threads": torch.get_num_threads()}
        return {**base, "ms": ms, "disturbed": 0.0, "fastest": "reference"}

    monkeypatch.setenv("BASISCONV_TUNE", "first-use")
    monkeypatch.setattr(basis_conv2d_tuning, "measure", measure)
    return problems


def test_first_use_is_off_by_default(monkeypatch, cache):
    monkeypatch.setattr(basis_conv2d_tuning, "measure", lambda *_: pytest.fail("measured"))
    for value in (None, "", "0", "no"):
        monkeypatch.setenv("BASISCONV_TUNE", value or "")
        call(*tensors())
        op._plans.clear()
    assert not cache.exists()


def test_first_use_measures_weights_once_and_obeys(ran, measured):
    for size in ((2, 6, 7), (2, 6, 7), (3, 9, 9)):
        call(*tensors(*size))
    assert measured == [PROBLEM]
    assert ran == ["reference"] * 3
    assert len(json.loads(tuning.user_file().read_text("utf-8"))["entries"]) == 1
    input, *weights = tensors()
    call(input.contiguous(memory_format=LAST), *weights, bias=torch.zeros(12), activation="relu")
    assert (measured[1].channels_last, measured[1].bias, measured[1].activation) == (True, True, "relu")


def test_first_use_leaves_known_weights_alone(measured, ran):
    say_slower()
    call(*tensors())
    assert measured == []
    assert ran == ["reference"]


def test_first_use_really_measures(monkeypatch):
    monkeypatch.setenv("BASISCONV_TUNE", "first-use")
    monkeypatch.setattr(basis_conv2d_tuning, "FIRST_USE_SECONDS", 0.01)
    input, *weights = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(input.requires_grad_(), *weights).sum().backward()
    (entry,) = json.loads(tuning.user_file().read_text("utf-8"))["entries"]
    assert entry["problem"]["dtype"] == "bfloat16"
    assert set(entry["ms"]) == {"cpu", "reference"}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "how", ["named", "wished", "no other backend", "meta", "empty", "counted", "functional", "compiled"]
)
def test_first_use_does_not_measure(how, measured):
    input, *weights = tensors()
    if how == "named":
        call(input, *weights, backend="cpu")
    elif how == "wished":
        with use_backend("cpu"):
            call(input, *weights)
    elif how == "no other backend":
        call(*tensors(dtype=torch.float64))
    elif how == "meta":
        call(*(tensor.to("meta") for tensor in (input, *weights)))
    elif how == "empty":
        call(input[:0], *weights)
    elif how == "counted":
        with FlopCounterMode(display=False) as counter:
            call(input, *weights)
        assert counter.get_total_flops() == 2 * PROBLEM.macs()
    elif how == "functional":
        torch.func.grad(lambda x: call(x, *weights).sum())(input)
    else:
        torch.compile(call, backend="eager", fullgraph=True)(input, *weights)
    assert measured == []
