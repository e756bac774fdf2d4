"""Rows of the GPU commands in the repository: what is kept of them, the table that they make, and the documents."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from basisconv_kernels.core import machine, tuning
from basisconv_kernels.ops import tucker_conv2d_model as model
from bench.gpu import __main__ as command
from bench.gpu import chains, documents, keep, layers, proven

ROOT = Path(__file__).parents[2]
CONTEXT = {
    "device": {"name": "NVIDIA Abacus", "capability": "9.0", "driver": "1"},
    "versions": {"torch": "2.11.0+cu130", "cudnn": 91900, "triton": "3.6.0"},
    "sources": "new",
}
LAYER = "64to64_at56_n32_q16"


def line(key: str, status: str = "passed", at: float = 1.0, sources: str = "new", note: str = "", **data: Any) -> str:
    context = {} if status == "started" else {"context": {**CONTEXT, "sources": sources}}
    return json.dumps({"key": key, "status": status, "at": at, "note": note, "data": data, **context})


def timed(engine: str, us: float, eager: float | None = None, **more: Any) -> str:
    def spread(median: float) -> dict[str, Any]:
        return {"median": median, "q1": median, "q3": median, "least": median, "samples": 50}

    times = {"graph_cold": spread(us), "eager": spread(eager or us)}
    key = f"{more.get('layer', LAYER)} {engine}{more.get('frozen', '')}"
    return line(key, **{"layer": LAYER, "engine": engine, **times, **more})


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    """Rows, kept: their content by kind."""

    def make(**lines: list[str]) -> dict[str, Any]:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        for kind, texts in lines.items():
            (folder / f"{kind}.jsonl").write_text("\n".join(texts) + "\n")
        return {path.stem: keep.read(path) for path in keep.keep([folder], tmp_path / "results")}

    return make


def test_the_newest_row_of_a_key_is_kept_whatever_the_order_of_the_sources(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new.tar.gz"
    old.mkdir()
    (old / "bench.jsonl").write_text(line("a", at=1, value=1) + "\n" + line("b", at=1, value=2) + "\n{torn")
    (tmp_path / "bench.jsonl").write_text(line("a", "started", at=2) + "\n" + line("a", at=3, value=3) + "\n")
    with tarfile.open(new, "w:gz") as packed:
        packed.add(tmp_path / "bench.jsonl", "bench.jsonl")
    for sources in ([old, new], [new, old]):
        (path,) = keep.keep(sources, tmp_path / "results")
        assert path == tmp_path / "results" / "nvidia-abacus" / "bench.json"
        values = {row["key"]: (row["status"], row.get("value")) for row in keep.read(path)["rows"]}
        assert values == {"a": ("passed", 3), "b": ("passed", 2)}
    assert "at" not in json.dumps(keep.read(path)["rows"][0]).split('"')


def test_a_run_replaces_its_rows_alone(kept, tmp_path):
    """What another run measured stays, but not beside other versions; of tests a file and backend counts as one."""
    test = "tests/ops/test_x.py::test_{}[{}]"
    first = [line("a", value=1), line("b", value=2)]
    kept(bench=first, check=[line(test.format(i, "cuda")) for i in range(3)] + [line(test.format(0, "triton"))])
    again = kept(bench=[line("b", value=3), line("c", value=4)], check=[line(test.format(9, "cuda"))])
    assert [(row["key"], row["value"]) for row in again["bench"]["rows"]] == [("a", 1), ("b", 3), ("c", 4)]
    counts = {(row["backend"], row["counts"]["passed"]) for row in again["check"]["rows"]}
    assert counts == {("cuda", 1), ("triton", 1)}
    path = tmp_path / "results" / "nvidia-abacus" / "bench.json"
    path.write_text(path.read_text("utf-8").replace('"torch": "', '"torch": "0.'), "utf-8")
    assert [row["key"] for row in kept(bench=[line("d")])["bench"]["rows"]] == ["d"]


def test_what_began_and_did_not_end_is_unfinished(kept):
    rows = kept(bench=[line("a"), line("b", at=1), line("b", "started", at=2)])["bench"]["rows"]
    assert [row["status"] for row in rows] == ["passed", "unfinished"]


def test_tests_are_counted_and_each_reason_told_once(kept):
    wrong = "RuntimeError: current_cuda_stream, csrc/ops/cuda_stream.cpp:11, op: no CUDA\nmore"
    tests = [f"tests/ops/test_basis_conv2d.py::test_result[cuda-{i}]" for i in range(3)]
    lines = [line(tests[0]), *(line(test, "failed", note=wrong) for test in tests[1:])]
    (part,) = kept(check=lines)["check"]["rows"]
    assert (part["part"], part["backend"]) == ("tests/ops/test_basis_conv2d.py", "cuda")
    assert part["counts"] == {"passed": 1, "failed": 2}
    assert part["wrong"] == {"op: no CUDA": {"first": "test_result[cuda-1]", "times": 2}}


def test_rows_of_two_devices_and_no_rows_are_refused(tmp_path):
    other = line("b").replace("Abacus", "Other")
    (tmp_path / "bench.jsonl").write_text(f"{line('a')}\n{other}\n")
    with pytest.raises(ValueError, match="of several devices"):
        keep.keep([tmp_path / "bench.jsonl"], tmp_path / "results")
    (tmp_path / "other.txt").write_text("no archive")
    with pytest.raises(ValueError, match="is no archive"):
        keep.keep([tmp_path / "other.txt"], tmp_path / "results")
    (tmp_path / "bench.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows in"):
        keep.keep([tmp_path / "bench.jsonl"], tmp_path / "results")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_one_that_automatic_choice_reads(kept, tmp_path, monkeypatch, cache):
    lines = [timed("two_step", 20.0), timed("cuda", 10.0, 30.0), timed("dense", 5.0)]
    lines += [
        timed("two_step", 60.0, frozen=False),
        timed("cuda", 50.0, frozen=False),
        timed("triton", 70.0, frozen=False),
    ]
    content = kept(bench=lines)["bench"]
    monkeypatch.setattr(machine, "cuda_device", lambda: {"name": "NVIDIA Abacus", "capability": "9.0"})
    path = keep.tuned_path(content, tuning.PACKAGED)
    path.parent.mkdir(parents=True)
    path.write_text(keep.tuned_text(content))
    problem = keep.problem_of(LAYER)
    (table,) = tuning.tables("cuda")
    assert (table.unused, len(table.entries)) == (None, 4)
    forward = {entry["way"]: entry["ms"] for entry in tuning.entries_for("basis_conv2d", problem)}
    assert {name: times["median"] for name, times in forward["graph"].items()} == {"reference": 0.02, "cuda": 0.01}
    assert set(tuning.slower("basis_conv2d", problem)) == {"cuda"}, "it is slower in eager calls"
    assert set(tuning.slower("basis_conv2d", problem, tuning.TRAINING)) == {"triton"}


def test_every_layer_of_the_bench_has_a_problem_with_its_op():
    for layer, _ in (*layers.by_priority(), *chains.by_priority()):
        assert keep._op(keep.problem_of(layer.name)) == ("tucker_conv2d" if layer.tucker else "basis_conv2d")


def test_chains_have_a_table_of_their_own_and_decide_about_one_pass(kept):
    name = "64to64_at56_n32_i16_q16"
    lines = [timed("two_step", 40.0, layer=name), timed("dense", 45.0, layer=name), timed("cuda", 20.0, layer=name)]
    head = "| Tucker chain | three convolutions, µs | dense, µs | two passes, µs |"
    two = documents.layers(kept(bench=lines)["bench"])
    assert head in two
    assert "| – | – | – | – | cuda |" in two
    lines.append(timed("cuda_one_pass", 10.0, layer=name))
    bench = kept(bench=lines)["bench"]
    one = documents.layers(bench)
    assert f"| {name} | 40.0 | 45.0 | 20.0 | 2.00, 2.00 | 10.0 | 4.00, 4.00 | – | – | cuda_one_pass |" in one
    entries = keep.tuned_entries(bench)
    assert {entry["op"] for entry in entries} == {"tucker_conv2d"}
    assert model.against_one_pass(entries) is None


# --- the documents ----------------------------------------------------------------------------------------------------


def test_slow_rows_stand_in_the_table_and_the_choice_is_that_of_the_rows(kept):
    small = "64to64_at56_n1_q16"
    lines = [timed("two_step", 20.0), timed("dense", 30.0), timed("cuda", 10.0), timed("triton", 40.0, 80.0)]
    fast = documents.layers(kept(bench=lines)["bench"])
    assert f"| {LAYER} | 20.0 | 30.0 | 10.0 | 2.00, 2.00 | 40.0 | **0.50**, **0.25** | cuda |" in fast
    lines += [timed("two_step", 20.0, layer=small), timed("cuda", 40.0, layer=small)]
    lines += [line(f"{LAYER} cuda_wrong", "failed", note="AssertionError: errors are [0.1, 0.2]")]
    slow = documents.layers(kept(bench=lines)["bench"])
    assert slow.count("| two convolutions |\n") == 2
    assert "- `cuda_wrong`, failed 1×: AssertionError: errors are" in slow


def test_rows_of_earlier_sources_are_marked(kept):
    lines = [timed("two_step", 20.0), timed("cuda", 10.0), timed("triton", 10.0)]
    lines[2] = lines[2].replace('"sources": "new"', '"sources": "old"').replace('"at": 1.0', '"at": 0.5')
    text = documents.layers(kept(bench=lines)["bench"])
    assert "| 10.0 | 2.00, 2.00 | 10.0† | 2.00, 2.00 | cuda |" in text
    assert "† was measured before" in text


def test_what_a_gpu_proved_names_what_is_wrong(kept):
    wrong = line("tests/gpu/test_cuda_kernels.py::test_it[cuda-b]", "failed", note="Mismatch: a | b")
    lines = [line("tests/gpu/test_cuda_kernels.py::test_it[cuda-a]"), wrong]
    lines += [
        line("tests/gpu/test_wrappers.py::test_old", sources="old", at=0.5),
        line("tests/new/test_new.py::test_new"),
    ]
    text = proven.proven(kept(check=lines)["check"])
    assert "sm_80, sm_90a | 1 passed, 1 failed; wrong 1×: Mismatch: a / b |" in text
    assert "| sm_90a | before the last change: 1 passed |" in text
    assert "| loaded by torch 2.11.0+cu130 |" in text
    assert "| others: `test_new.py` |  |  | 1 passed |" in text
    assert proven.proven(None).count("not yet") == len(proven.PROVEN) + 1


def test_only_what_stands_between_the_marks_is_replaced(kept):
    found = {"bench": [kept(bench=[timed("two_step", 20.0), timed("cuda", 10.0)])["bench"]], "check": [], "probe": []}
    old = "# Title\n\n<!-- gpu summary -->\nold\n<!-- end of gpu summary -->\nrest\n"
    new = documents.updated("README.md", old, found)
    assert new.startswith("# Title\n\n<!-- gpu summary -->\n\n**NVIDIA Abacus**")
    assert "On 1 layers the CUDA kernel is 2.00 to 2.00 times as fast" in new
    assert new.endswith("\n\n<!-- end of gpu summary -->\nrest\n")
    assert documents.updated("README.md", new, found) == new
    for broken in ("none", old + old):
        with pytest.raises(ValueError, match="needs the marks"):
            documents.updated("README.md", broken, found)


@pytest.mark.parametrize("document", documents.BLOCKS)
def test_the_documents_are_those_of_the_committed_rows(document):
    """After changing rows: ``python -m bench.gpu keep``."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert documents.updated(document, text, documents.contents()) == text


def test_the_packages_tables_are_those_of_the_committed_rows():
    """After changing rows or the version: ``python -m bench.gpu keep``."""
    found = documents.contents()["bench"]
    for content in found:
        assert keep.tuned_path(content).read_text(encoding="utf-8") == keep.tuned_text(content)
    assert {keep.tuned_path(content) for content in found} == set(tuning.PACKAGED.glob("nvidia-*.json"))


def test_the_packages_table_of_an_h200_is_used_there(monkeypatch):
    monkeypatch.setattr(machine, "cuda_device", lambda: {"name": "NVIDIA H200", "capability": "9.0"})
    tuning.forget()
    table = next(table for table in tuning.tables("cuda") if table.path.parent == tuning.PACKAGED)
    assert table.unused is None
    assert tuning.entries_for("basis_conv2d", keep.problem_of(LAYER))
    tuning.forget()


def test_the_command_writes_documents_alone_without_sources(capsys, monkeypatch):
    monkeypatch.setattr(keep, "keep", lambda *_: pytest.fail("took rows"))
    monkeypatch.setattr(documents, "write", lambda: [ROOT / "README.md"])
    assert command.main(["keep"]) == 0
    assert capsys.readouterr().out == "README.md\n"


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    assert command.main(["keep", str(tmp_path / "nothing.tar.gz")]) == 2
    assert "is no archive" in capsys.readouterr().err
