"""The GPU commands without a GPU: journal, supervision, archive, order of work, and a rehearsal on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import chains, check, facts, layers, networks, probe, probe_source, report, small
from bench.gpu.journal import DIED, FAILED, HUNG, PASSED, SKIPPED, Journal, Step, Unavailable, work
from bench.gpu.supervise import REPLACE_ME, supervise
from tests.cuda_on_cpu.test_compiled import disassembler

LATER = 60.0  # seconds: more than any test here takes


def steps(log, *names, **changes):
    def run_of(name):
        def run():
            log.append(name)
            if "missing" in name:
                raise Unavailable("no such tool")
            if "wrong" in name:
                raise ValueError("off by one")
            return {"value": len(name)}

        return run

    return [Step(name, run_of(name), **{"seconds": 0.1, **changes}) for name in names]


def statuses(journal):
    return {key: line["status"] for key, line in journal.last().items()}


# --- journal ----------------------------------------------------------------------------------------------------------


def test_steps_run_in_their_order_and_only_once(tmp_path):
    journal, log = Journal(tmp_path / "rows.jsonl", {"device": "Abacus"}), []
    for _ in range(2):
        assert work(steps(log, "a", "b missing", "c wrong"), journal, time.time() + LATER)
    assert log == ["a", "b missing", "c wrong"]
    assert statuses(journal) == {"a": PASSED, "b missing": SKIPPED, "c wrong": FAILED}
    last = journal.last()
    assert last["a"]["data"] == {"value": 1}
    assert last["a"]["context"] == {"device": "Abacus"}
    assert last["b missing"]["note"] == "no such tool"
    assert last["c wrong"]["note"] == "ValueError: off by one"


def test_another_stamp_runs_again(tmp_path):
    journal, log = Journal(tmp_path / "rows.jsonl"), []
    for stamp in ("one", "two", "one"):
        work(steps(log, "a", stamp=stamp), journal, time.time() + LATER)
    assert log == ["a", "a"]


def test_what_does_not_fit_into_the_time_is_left_and_shorter_ones_run(tmp_path):
    journal, log = Journal(tmp_path / "rows.jsonl"), []
    both = [*steps(log, "long", seconds=1000.0), *steps(log, "short")]
    work(both, journal, time.time() + LATER)
    assert log == ["short"]
    work(both, journal, time.time() + 2000)
    assert log == ["short", "long"]


def test_a_lost_device_asks_for_a_fresh_process(tmp_path):
    journal, log = Journal(tmp_path / "rows.jsonl"), []
    wanted = steps(log, "a wrong", "b")
    assert not work(wanted, journal, time.time() + LATER, healthy=lambda: False)
    assert work(wanted, journal, time.time() + LATER, healthy=lambda: False)
    assert log == ["a wrong", "b"]


def test_a_line_that_was_cut_off_is_left_out_and_spoils_no_other(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.end("a", PASSED)
    with journal.path.open("a") as file:
        file.write('{"key": "b", "sta')
    journal.end("c", PASSED)
    assert statuses(journal) == {"a": PASSED, "c": PASSED}


# --- supervision ------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from bench.gpu.journal import Journal, Step, work
journal = Journal(__import__("pathlib").Path(sys.argv[1]))
def hang(): time.sleep(600)
def die(): print("a fault", flush=True); os._exit(139)
steps = [Step("a", dict), Step("b", hang, patience=0.4), Step("c", die), Step("d", dict), Step("e", dict)]
work(steps, journal, time.time() + 60)
"""


def supervised(tmp_path, code, *arguments, seconds=LATER, **more):
    script = tmp_path / "worker.py"
    script.write_text(code)
    journal = Journal(tmp_path / "rows.jsonl")
    trouble = supervise(
        [sys.executable, str(script), str(journal.path), *arguments], journal, time.time() + seconds,
        tmp_path / "log.txt", environment={"PYTHONPATH": str(facts.ROOT)}, **more,
    )  # fmt: skip
    return trouble, journal


def test_a_process_that_hangs_or_dies_costs_one_step(tmp_path):
    trouble, journal = supervised(tmp_path, WORKER)
    assert trouble == ""
    assert statuses(journal) == {"a": PASSED, "b": HUNG, "c": DIED, "d": PASSED, "e": PASSED}
    assert "exit status 139" in journal.last()["c"]["note"]
    assert "a fault" in journal.last()["c"]["note"]


def test_the_time_ends_a_process_and_leaves_its_step_open(tmp_path):
    code = WORKER.replace("patience=0.4", "patience=500")
    trouble, journal = supervised(tmp_path, code, seconds=2.5)
    assert trouble == "the time is over"
    assert statuses(journal) == {"a": PASSED, "b": "started"}


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path):
    trouble, _ = supervised(tmp_path, "raise SystemExit('no torch here')")
    assert trouble.startswith("the process ended with status 1: ")
    assert "no torch here" in trouble
    trouble, _ = supervised(tmp_path, "import time; time.sleep(60)", start_patience=0.3)
    assert trouble.startswith("the process did not begin a step")


def test_a_process_may_ask_for_a_fresh_one(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from bench.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]))
count = len(journal.last())
if count < 3:
    journal.end(str(count), "passed")
    sys.exit({REPLACE_ME})
"""
    trouble, journal = supervised(tmp_path, code)
    assert trouble == ""
    assert list(journal.last()) == ["0", "1", "2"]


# --- tests as steps ---------------------------------------------------------------------------------------------------

TESTS = """
import os, pytest
from pathlib import Path
HERE = Path(__file__).parent
def test_right(): (HERE / "ran").open("a").write("x")
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="needs a CUDA device")
def test_elsewhere(): pass
def test_dies(): os._exit(9)
def test_last(): pass
"""


def test_tests_are_noted_one_by_one_and_go_on_behind_one_that_dies(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    journal = Journal(tmp_path / "check.jsonl")
    phase = check.Phase("some", (str(tmp_path), "--rootdir", str(tmp_path), "-c", "/dev/null"))
    line = check.phase_command(phase, journal.path, time.time() + LATER, "cpu")
    environment = {"PYTHONPATH": str(facts.ROOT)}
    assert supervise(line, journal, time.time() + LATER, tmp_path / "log", environment=environment) == ""
    found = {key.split("::")[-1]: line for key, line in journal.last().items()}
    assert {key: line["status"] for key, line in found.items()} == {
        "test_broken.py (import)": FAILED, "test_right": PASSED, "test_wrong": FAILED, "test_elsewhere": SKIPPED,
        "test_dies": DIED, "test_last": PASSED,
    }  # fmt: skip
    assert "one is not two" in found["test_wrong"]["note"]
    assert found["test_elsewhere"]["note"] == "needs a CUDA device"
    assert (tmp_path / "ran").read_text() == "x", "what is done is not run again"
    text, wrong = check.summary(journal)
    assert wrong
    assert "skipped 1: needs a CUDA device" in text
    assert "DIED test_some.py::test_dies" in text


def test_several_processes_share_the_tests_and_know_what_the_others_ended(tmp_path):
    tests = "".join(f"def test_{i}(): (HERE / 'ran').open('a').write('{i} ')\n" for i in range(7))
    body = f"from pathlib import Path\nHERE = Path(__file__).parent\n{tests}def test_wrong(): assert 1 == 2\n"
    (tmp_path / "test_some.py").write_text(body)
    phase = check.Phase("some", (str(tmp_path), "--rootdir", str(tmp_path), "-c", "/dev/null"))
    folder = tmp_path / "rows"
    for jobs in (3, 2):
        assert check.run(folder, time.time() + LATER, "cpu", lambda: None, [phase], jobs) == []
    assert sorted((tmp_path / "ran").read_text().split()) == [str(i) for i in range(7)]
    assert {path.name for path in folder.glob("*.jsonl")} == {"check.jsonl", "check.1.jsonl", "check.2.jsonl"}
    text, wrong = check.summary(Journal(folder / "check.jsonl"))
    assert wrong
    assert "passed 7" in text
    assert "FAILED test_some.py::test_wrong" in text


def test_every_phase_names_files_that_are_there():
    for phase in check.PHASES:
        paths = [word for word in phase.arguments if word.startswith("tests")]
        assert paths
        assert all((facts.ROOT / path).exists() for path in paths), phase


# --- the commands -----------------------------------------------------------------------------------------------------


def test_priorities():
    rows = list(layers.by_priority())
    assert rows[0] == (layers.Layer(64, 64, 56, 32, 4), ("two_step", "dense", "cuda", "triton"))
    batches = [layer.N for layer, _ in rows]
    assert batches.index(1) < batches.index(128)
    assert {layer.N for layer, _ in rows} == {1, 32, 128}
    assert {layer.share for layer, _ in rows} == {2, 4}
    assert not any(layer.tucker for layer, _ in rows)


def test_chains_are_measured_in_one_pass_and_in_two_beside_three_convolutions():
    rows = list(chains.by_priority())
    assert rows[0] == (layers.Layer(64, 64, 56, 32, 4, tucker=True), chains.ENGINES)
    assert {(layer.N, layer.tucker) for layer, _ in rows} == {(32, True), (1, True)}
    assert {"two_step", "dense", "cuda", "cuda_one_pass", "triton"} == set(chains.ENGINES)
    rehearsed = [step.key for step in chains.steps(ABOUT, "cpu", None)]
    assert "64to64_at9_n2_i16_q16 cpu" in rehearsed
    assert not any("cuda" in key for key in rehearsed)


ABOUT = {"device": {"name": "Abacus", "capability": "9.0"}, "versions": {"torch": "2", "triton": "3"}, "sources": "abc"}


def test_only_our_rows_belong_to_our_sources():
    found = {
        step.key: step.stamp for step in [*layers.steps(ABOUT, "cuda", None), *networks.steps(ABOUT, "cuda", None)]
    }
    assert found["64to64_at56_n32_q16 cuda"].endswith("abc")
    assert not found["64to64_at56_n32_q16 dense"].endswith("abc")
    assert found["resnet50_n32 auto"].endswith("abc")
    assert not found["vgg16_n1 two_step"].endswith("abc")
    assert found["training 64to64_at56_n32_q16 frozen two_step"].endswith("abc"), "one run for all of them"


def test_the_table_says_where_we_lose():
    def row(engine, median):
        times = {"median": median, "q1": median - 1, "q3": median + 1}
        return {"status": PASSED, "data": {"layer": "L", "engine": engine, "graph_cold": times}}

    text = report.table([row("two_step", 10.0), row("dense", 40.0), row("cuda", 20.0), row("triton", 5.0)])
    assert "| L | cuda | graph_cold | 20.00 (19.00–21.00) | 0.50 | 2.00 |" in text
    assert "- L cuda: 2.00× the time of two_step" in text
    assert "- L triton" not in text


@pytest.mark.parametrize("name", ["check", "bench", "probe"])
def test_without_a_device_it_says_so_and_leaves_an_archive(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(facts, "no_device", lambda: "no CUDA device")
    assert command.main([name, "--out", str(tmp_path), "--folder", str(tmp_path / "rows")]) == 2
    assert "no CUDA device; nothing was run" in capsys.readouterr().out
    with tarfile.open(tmp_path / f"gpu-{name}.tar.gz") as archive:
        assert archive.getnames() == ["summary.txt"]


def test_a_rehearsal_measures(tmp_path, capsys):
    """The whole command, on the CPU."""
    assert command.main(["probe", "--device", "cpu", "--out", str(tmp_path), "--folder", str(tmp_path / "a")]) == 0
    rows = Journal(tmp_path / "a" / "probe" / "probe.jsonl").last()
    assert {line["status"] for line in rows.values()} == {PASSED}
    assert rows["op_costs"]["data"]["us_define_impl"] > 0
    ways = [f"us_{name} {what}" for name in ("automatic", "cpu", "two convolutions") for what in ("forward", "step")]
    assert all(rows["call_costs"]["data"][way] > 0 for way in ways)
    assert rows["rates"]["context"]["versions"]["torch"]
    assert '"us_define_impl"' in capsys.readouterr().out


@pytest.mark.full
def test_a_rehearsal_goes_on_from_its_archive(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--device", "cpu"]
    assert command.main(["probe", *out, "--folder", str(tmp_path / "a")]) == 0
    first = Journal(tmp_path / "a" / "probe" / "probe.jsonl").last()
    resumed = ["--folder", str(tmp_path / "b"), "--resume", str(tmp_path / "gpu-probe.tar.gz")]
    assert command.main(["probe", *out, *resumed]) == 0
    again = Journal(tmp_path / "b" / "probe" / "probe.jsonl")
    assert [line["at"] for line in again.last().values()] == [line["at"] for line in first.values()]
    assert len(list(again.lines())) == 2 * len(first)
    capsys.readouterr()


@pytest.mark.parametrize("engine", ["cpu", "two_step", "dense"])
@pytest.mark.parametrize("tucker", [False, True], ids=["basis", "tucker"])
def test_a_row_is_checked_and_timed(engine, tucker):
    from bench.gpu.timing import CpuMeter

    data = layers.measure(layers.Layer(8, 16, 7, 2, 4, tucker), engine, "cpu", CpuMeter())
    assert 0 < data["error_share"] <= 1
    assert data["eager"]["median"] > 0
    assert json.loads(json.dumps(data))["engine"] == engine


def test_a_wrong_engine_gets_no_time(monkeypatch):
    from bench.gpu.timing import CpuMeter

    right = layers.Prepared.function
    monkeypatch.setattr(layers.Prepared, "function", lambda self, engine: lambda x: right(self, engine)(x) * 1.05)
    with pytest.raises(AssertionError, match="times what is allowed"):
        layers.measure(layers.Layer(8, 16, 7, 2, 4), "cpu", "cpu", CpuMeter())


def test_a_training_step_is_judged_by_the_signs_of_its_own_result():
    """A pixel close to 0 may count on either side; a wrong result or gradient is an error of its own size."""
    prepared = layers.Prepared(layers.Layer(8, 16, 7, 2, 4), "cpu")
    weights = [w.requires_grad_() for w in (prepared.basis, prepared.mixing, prepared.bias)]
    x = prepared.input(0).requires_grad_()
    out = networks._training_forward(prepared, "two_step", x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)

    def errors(result, sign):
        gradients = torch.autograd.grad(out, [x, *weights], grad * sign, retain_graph=True)
        return networks.relative_errors(prepared, result.detach(), gradients, grad, False)

    assert max(errors(out, 1)) < 2.0**-5
    smallest = out.detach().where(out > 0, torch.inf).amin()
    kept = out.detach() != smallest
    assert max(errors(out * kept, kept)) < 2.0**-5
    assert min(errors(out, -1)[1:]) > 1
    assert errors(torch.zeros_like(out), 1)[0] == 1
    assert errors(-out, 1)[0] > 1


def test_a_training_step_is_checked_and_timed(monkeypatch):
    from bench.gpu.timing import CpuMeter

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    data = networks.training(layers.Layer(8, 16, 7, 2, 4), "cpu", True, "cpu", CpuMeter())
    assert max(data["relative_errors"]) < 2.0**-5
    assert data["eager"]["median"] > 0
    assert torch.backends.cudnn.benchmark


@pytest.mark.full
def test_the_probe_compiles(tmp_path, monkeypatch):
    """Where there is an nvcc: what a GPU will be given, with the instructions that it is about."""
    if facts.tools()["nvcc"] is None:
        pytest.skip("nvcc is not on the path")
    made = probe.program()
    assert probe.program() == made, "built once"
    dump = disassembler("cuobjdump")
    sass = subprocess.run([dump, "-sass", made], capture_output=True, text=True, check=True).stdout
    for instruction in ("BGMMA.64x256x256.AND", "HGMMA.64x256x16", "BMMA", "POPC", "UTMALDG", "LDGSTS", "UCGABAR"):
        assert instruction in sass, instruction


def test_without_nvcc_the_probe_says_so(monkeypatch):
    monkeypatch.setattr(probe.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="nvcc is not on the path"):
        probe.program()


def test_the_probe_has_every_size():
    text = probe_source.text()
    for kind, sizes in probe_source.SIZES.items():
        assert all(f"struct {kind}_{N} " in text for N in sizes)
    assert set(small.CALLS) >= {
        "cuda",
        "cuda_sm80",
        "triton_descriptors",
        "triton_pointers",
        "triton_gradients",
        "binary_cuda",
    }
