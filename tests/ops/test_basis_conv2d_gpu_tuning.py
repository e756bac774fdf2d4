"""The choice on a GPU that is not there, by what was measured on it: forward and training, near and far weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from basisconv_kernels import diagnostics
from basisconv_kernels.compression import tune
from basisconv_kernels.core import log, machine, registry, selfcheck, timing_cuda, tuning
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.core.timing import Spread
from basisconv_kernels.demo import summary
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_model as model
from basisconv_kernels.ops import basis_conv2d_training as training
from basisconv_kernels.ops import basis_conv2d_tuning, tucker_conv2d_tuning
from basisconv_kernels.ops import tucker_conv2d_model as tucker_model

DEVICE = {"name": "NVIDIA Abacus", "capability": "9.0"}
P = Conv2dProblem(
    C=64, Q=16, K=64, N=32, H=56, W=56, padding=(1, 1, 1, 1), dtype=torch.bfloat16, device="cuda", channels_last=True
)


@pytest.fixture(autouse=True)
def gpu(cache, monkeypatch):
    """A GPU without a table, on which every check passed."""
    monkeypatch.setattr(machine, "cuda_device", lambda: DEVICE)
    monkeypatch.setattr(registry, "absent", lambda name: None)
    monkeypatch.setattr(selfcheck, "against", lambda check: None)
    monkeypatch.setattr(selfcheck, "known", lambda variant: None)


def put(problem=P, step=tuning.FORWARD, op_name=op.OP, way="graph", **ms):
    """Measured times by backend."""
    times = {name: Spread(t, t, t, t, 9) for name, t in ms.items()}
    tuning.remember([timing_cuda.entry(op_name, problem.to_json(), step, way, times)], "cuda")


def chosen(problem=P):
    return registry.select(op.OP, op.CANDIDATES, problem, None, model.slower_than_plain(problem)).name


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_of_a_gpu_has_its_name_and_another_gpu_does_not_read_it(cache, monkeypatch):
    put(cuda=1, reference=2)
    (table,) = tuning.tables("cuda")
    assert table.path == cache / "tuned" / "nvidia-abacus-9.0.json"
    assert len(tuning.entries_for(op.OP, P)) == 1
    assert tuning.entries_for(op.OP, replace(P, device="cpu")) == []
    monkeypatch.setattr(machine, "cuda_device", lambda: {**DEVICE, "name": "NVIDIA Other"})
    assert tuning.entries_for(op.OP, P) == []
    monkeypatch.setattr(machine, "cuda_device", lambda: None)
    assert tuning.tables("cuda") == []
    assert tuning.entries_for(op.OP, P) == []


def test_the_number_of_threads_does_not_matter_on_a_gpu(threads):
    put(cuda=3, reference=2)
    threads(torch.get_num_threads() + 1)
    assert set(tuning.slower(op.OP, P)) == {"cuda"}


def test_the_packages_table_of_a_gpu_holds_for_every_pytorch_the_users_for_its_own(cache):
    device = tuning.described("cuda")
    entry = timing_cuda.entry(op.OP, P.to_json(), tuning.FORWARD, "graph", {"reference": Spread(1, 1, 1, 1, 9)})
    for path in (tuning.PACKAGED / "nvidia-abacus-9.0.json", tuning.user_file("cuda")):
        tuning.write([entry], path, device)
        path.write_text(path.read_text().replace(tuning.head()["packages"]["torch"], "1.0"))
    tuning.forget()
    packaged, own = tuning.tables("cuda")
    assert len(packaged.entries) == 1
    assert "its packages is" in own.unused


# --- forward ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_decides_against_the_model():
    assert chosen() == "cuda"
    put(cuda=30, triton=10, reference=20)
    assert chosen() == "triton"
    put(cuda=30, triton=30, reference=20, way="eager")
    assert chosen() == "reference", "in eager calls Triton is slower"
    assert "against 20.000 ms (N32 @56×56, eager)" in model.slower_than_plain(P)["triton"]


def test_one_slow_size_is_enough():
    put(cuda=10, triton=30, reference=20)
    put(replace(P, H=7, W=7), cuda=30, triton=30, reference=20)
    assert chosen(replace(P, N=0, H=0, W=0)) == "reference"


def test_near_weights_correct_the_model():
    near = replace(P, Q=20)
    assert chosen(near) == "cuda"
    put(cuda=90, triton=90, reference=20)
    assert chosen(near) == "reference"
    words = model.slower_than_plain(near)["cuda"]
    assert words.startswith("predicted slower than two library kernels, ")
    assert "as measured of 64→16→64, N32 @56×56, in a graph" in words


def test_nearer_weights_count_more_than_far_ones():
    put(replace(P, C=512, Q=128, K=512), cuda=90, triton=90, reference=20)
    put(cuda=10, triton=30, reference=20)
    assert chosen(replace(P, Q=20)) == "cuda"


@pytest.mark.parametrize("change", [{"R": 5}, {"stride": (2, 2)}, {"channels_last": False}, {"C": 1024, "K": 1024}])
def test_far_from_all_that_was_measured_the_least_favourable_counts(change):
    far = replace(P, Q=24, **change)
    put(cuda=10, triton=10, reference=20)
    put(replace(P, C=256, Q=64, K=256), cuda=900, triton=900, reference=20)
    assert chosen(far) == "reference"


def test_a_gpu_without_a_table_is_corrected_by_those_of_others(monkeypatch):
    entry = {"cuda": 90, "triton": 90, "reference": 20}
    times = {name: Spread(t, t, t, t, 9) for name, t in entry.items()}
    other = {"kind": "cuda", "name": "NVIDIA Other", "capability": "8.0"}
    rows = [timing_cuda.entry(op.OP, P.to_json(), tuning.FORWARD, "graph", times)]
    assert chosen() == "cuda"
    tuning.write(rows, tuning.PACKAGED / tuning.file_name(other), other)
    assert chosen() == "reference"
    put(cuda=10, triton=10, reference=20)
    assert chosen() == "cuda"
    (tuning.PACKAGED / "broken.json").write_text("{")
    tuning.forget()
    assert len(tuning.measured_on_gpus(op.OP)) == 1


def test_tucker_looks_at_its_own_times():
    chain = TuckerConv2dProblem(**{**vars(P), "rank_in": 16})
    put(chain, op_name="tucker_conv2d", cuda=30, triton=10, reference=20)
    assert set(tucker_model.slower_than_plain(chain)) == {"cuda", "cuda_one_pass"}, "one pass was not measured at all"


# --- training ---------------------------------------------------------------------------------------------------------


def tensors():
    """Input, basis and coefficients on a GPU: what the decision reads of tensors, and nothing else."""
    cuda = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    input = torch.empty(32, 64, 56, 56, device="meta").contiguous(memory_format=torch.channels_last)
    shapes = (torch.Size((16, 64, 3, 3)), torch.Size((64, 16)))
    weights = (SimpleNamespace(shape=shape, **cuda) for shape in shapes)
    return SimpleNamespace(shape=input.shape, stride=input.stride, **cuda), *weights


def settings(backend):
    return op.Settings((1, 1), (1, 1, 1, 1), (1, 1), 1, None, False, backend)


TRAINED = {"step": tuning.TRAINING}


def plainly(backend):
    """Whether a step runs as two convolutions: (eagerly, while a graph is captured)."""
    return tuple(step is not None for step in training.decide(settings(backend), P, *tensors()))


def test_a_step_that_nobody_measured_is_two_convolutions():
    for backend in ("cuda", "triton", "reference"):
        assert plainly(backend) == (True, True)
    with registry.use_backend("cuda"):
        assert plainly("cuda") == (False, False)


def test_a_step_measured_to_be_no_slower_is_ours():
    put(cuda=10, triton=30, reference=20, **TRAINED)
    assert plainly("cuda") == (False, False)
    assert plainly("triton") == plainly("reference") == (True, True)


def test_a_step_that_is_captured_obeys_the_times_in_a_graph(monkeypatch):
    put(cuda=10, reference=20, **TRAINED)
    put(cuda=30, reference=20, way="eager", **TRAINED)
    assert plainly("cuda") == (True, False)
    decided = training.decide(settings("cuda"), P, *tensors())
    assert decided.now() is decided.eager
    monkeypatch.setattr(selfcheck, "capturing", lambda: True)
    assert decided.now() is None


def test_nobody_asks_about_capturing_where_it_changes_nothing(monkeypatch):
    monkeypatch.setattr(selfcheck, "capturing", lambda: pytest.fail("asked"))
    assert training.decide(settings("cuda"), P, *tensors()).now() is not None
    assert training.OURS.now() is None


def test_a_traced_step_obeys_the_times_in_a_graph():
    def name():
        given, *weights = tensors()
        return op._to_train(settings("cuda"), given, *weights).backend

    assert name() == "reference"
    put(cuda=10, reference=20, **TRAINED)
    put(cuda=30, reference=20, way="eager", **TRAINED)
    assert name() == "cuda"
    put(cuda=30, reference=20, **TRAINED)
    assert name() == "reference"
    with registry.use_backend("cuda"):
        assert name() == "cuda"


# --- explain and tune -------------------------------------------------------------------------------------------------


def test_explain_shows_both_steps():
    put(cuda=10, triton=30, reference=20)
    put(cuda=30, reference=20, way="eager", **TRAINED)
    found = diagnostics.explain(op.OP, P, None)
    assert (found["chosen"], found["training"]["chosen"]) == ("cuda", "reference")
    assert found["tables"] == [str(tuning.user_file("cuda"))]
    text = "\n".join(" ".join(row) for row in summary.explanation_rows(found))
    assert "triton measured slower than plain PyTorch, 30.000 ms against 20.000 ms (N32 @56×56, in a graph)" in text
    assert "training step reference" in text
    assert "cuda measured slower than plain PyTorch, 30.000 ms against 20.000 ms (N32 @56×56, eager, training)" in text
    assert diagnostics.explain(op.OP, P, "cuda")["training"] is None


def test_explain_shows_the_prediction_of_what_was_not_measured():
    found = diagnostics.explain(op.OP, P, None)
    assert found["predicted"]["cuda"].endswith("times theirs (a model)")
    assert float(found["predicted"]["cuda"].split()[0]) < 1
    text = "\n".join(" ".join(row) for row in summary.explanation_rows(found))
    assert f"    predicted against two library kernels, {found['predicted']['cuda']}" in text
    put(cuda=10, reference=20)
    assert set(diagnostics.explain(op.OP, P, None)["predicted"]) == {"triton"}
    assert diagnostics.explain(op.OP, replace(P, device="cpu"), None)["predicted"] == {}


@pytest.fixture
def timed(monkeypatch):
    """What would be timed on the device, with tensors on the processor; each call runs once."""
    asked = []

    def entries(op_name, problem, step, calls, seconds):
        for name, each in calls.items():
            asked.append((step, name, next(iter(each))()))
        times = {name: Spread(1, 1, 1, 1, 9) for name in calls}
        return [timing_cuda.entry(op_name, problem.to_json(), step, way, times) for way in tuning.WAYS]

    monkeypatch.setattr(timing_cuda, "entries", entries)
    monkeypatch.setattr(timing_cuda, "MOST_COPIES", 2)
    return asked


@pytest.mark.skipif(registry.absent("cpu") is not None, reason="no native library")
def test_both_steps_are_timed_on_every_backend_that_can_run(timed):
    problem = Conv2dProblem(C=8, Q=4, K=12, N=2, H=6, W=7, bias=True, activation="relu")
    found = basis_conv2d_tuning.measure_on_gpu(problem, 0.0)
    assert [(e["step"], e["way"]) for e in found] == [(s, w) for s in ("forward", "training") for w in tuning.WAYS]
    results = {}
    for step, name, result in timed:
        results.setdefault(step, {})[name] = result
    assert set(results["forward"]) == set(results["training"]) >= {"cpu", "reference"}
    torch.testing.assert_close(results["forward"]["cpu"], results["forward"]["reference"])
    ours, plain = results["training"]["cpu"], results["training"]["reference"]
    assert [g.shape for g in ours] == [(2, 8, 6, 7), (4, 8, 3, 3), (12, 4), (12,)]
    torch.testing.assert_close(ours, plain)
    chain = TuckerConv2dProblem(C=8, rank_in=3, Q=4, K=12, N=2, H=6, W=7)
    assert [e["way"] for e in tucker_conv2d_tuning.measure_on_gpu(chain, 0.0)] == list(tuning.WAYS)


class There(torch.Tensor):
    """A tensor of the processor that says it is on a GPU."""

    device = torch.device("cuda")


@pytest.fixture
def first_use(monkeypatch):
    """Tensors of a call, its settings, and how often its problem was measured; every tensor counts as ordinary."""
    measured = []

    def measure(problem, seconds):
        measured.append(problem)
        times = {name: Spread(t, t, t, t, 9) for name, t in (("cuda", 3), ("reference", 2))}
        return [timing_cuda.entry(op.OP, problem.to_json(), tuning.FORWARD, "graph", times)]

    monkeypatch.setattr(basis_conv2d_tuning, "measure_on_gpu", measure)
    monkeypatch.setattr(basis_conv2d_tuning, "ORDINARY", (There, torch.Tensor))
    input = torch.zeros(2, 64, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = (torch.zeros(16, 64, 3, 3), torch.zeros(64, 16))
    return (input.as_subclass(There), *weights, None, None), measured


def test_a_first_use_on_a_gpu_is_measured_once(first_use):
    tensors, measured = first_use
    assert basis_conv2d_tuning.on_first_use(tensors, settings("cuda"), None)
    assert not basis_conv2d_tuning.on_first_use(tensors, settings("cuda"), None)
    (problem,) = measured
    assert (problem.device, problem.N, problem.H, problem.channels_last) == ("cuda", 2, 5, True)
    assert set(model.slower_than_plain(problem)) >= {"cuda"}
    assert tuning.user_file("cuda").exists()


def test_a_first_use_measures_nothing_while_a_graph_is_captured(first_use, monkeypatch):
    tensors, measured = first_use
    monkeypatch.setattr(selfcheck, "capturing", lambda: True)
    assert not basis_conv2d_tuning.on_first_use(tensors, settings("cuda"), None)
    assert measured == []


def test_a_first_use_without_memory_for_it_goes_on(first_use, monkeypatch, caplog):
    def no_memory(problem, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(basis_conv2d_tuning, "measure_on_gpu", no_memory)
    assert not basis_conv2d_tuning.on_first_use(first_use[0], settings("cuda"), None)
    assert "not timed on first use: CUDA out of memory." in caplog.text


def test_tune_measures_on_the_gpu_and_refuses_filters_of_bits(monkeypatch):
    for module in (basis_conv2d_tuning, tucker_conv2d_tuning):
        monkeypatch.setattr(module, "measure_on_gpu", lambda problem, seconds: [str(problem)] * 2)
    problems = [tune.parse_problem(f"N=1,C=8,H=6,W=6,Q=4,K=12,R=3{more}") for more in ("", ",rank_in=3")]
    problems = tune.variants(problems, "channels_last", torch.bfloat16, "cuda")
    assert len(tune.tune(problems, 0.01)) == 4
    bits = [tune.parse_problem("op=ternary_conv2d,N=1,C=8,H=6,W=6,K=12,R=3,scales=1")]
    with pytest.raises(ValueError, match="filters of bits are measured on the processor alone"):
        tune.variants(bits, "both", torch.float32, "cuda")
