"""``tune``: what is measured, where it is written, and that ``explain`` and ``doctor`` then know it."""

from __future__ import annotations

import json

import pytest
import torch

from basisconv_kernels import BinaryConv2d, StackedBinaryConv2d, TernaryConv2d, bitpack
from basisconv_kernels.compression import tune
from basisconv_kernels.core import registry, tuning

PROBLEM = "N=1,C=8,H=6,W=6,Q=4,K=12,R=3,padding=1"
EXPLAIN = (
    "explain", "basis_conv2d", "--input", "3,8,20,20", "--basis-channels", "4", "--out-channels", "12",
    "--padding", "1",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("cache")


def test_both_formats_are_written_and_added_to(basisconv, cache):
    first = basisconv("tune", "--problem", PROBLEM, "--seconds", "0.01", "--json").json
    assert {key: first[key] for key in tuning.head()} == tuning.head()
    assert [entry["problem"]["channels_last"] for entry in first["entries"]] == [True, False]
    for entry in first["entries"]:
        assert entry["problem"]["K"] == 12
        assert entry["fastest"] in entry["ms"]
        assert entry["threads"] == torch.get_num_threads()
    file = tuning.user_file()
    assert first["file"] == str(file)
    assert file.is_relative_to(cache)
    more = basisconv("tune", "--problem", PROBLEM, "--problem", PROBLEM.replace("Q=4", "Q=3"), "--seconds", "0.01")
    assert f"{file}: 4 problems" in more.out
    assert len(json.loads(file.read_text())["entries"]) == 4


@pytest.mark.parametrize(("layout", "is_last"), [("nchw", False), ("channels_last", True)])
def test_one_format_and_another_dtype(basisconv, layout, is_last):
    options = ("--layout", layout, "--dtype", "bfloat16", "--dry-run", "--json")
    (entry,) = basisconv("tune", "--problem", PROBLEM, "--seconds", "0.01", *options).json["entries"]
    assert (entry["problem"]["channels_last"], entry["problem"]["dtype"]) == (is_last, "bfloat16")


@pytest.mark.parametrize("option", [("--layout", "sideways"), ("--dtype", "int8")], ids=" ".join)
def test_unknown_formats_and_dtypes_are_wrong_usage(basisconv, option):
    outcome = basisconv("tune", "--problem", PROBLEM, *option)
    assert outcome.code == 2
    assert f"got '{option[1]}'" in " ".join(outcome.err.replace("│", " ").split())


def test_the_layers_of_a_network(basisconv, network, tmp_path):
    outcome = basisconv(
        "tune", "--model", network, "--input", "2,3,12,12", "--seconds", "0.01", "--layout", "nchw",
        "--out", tmp_path / "t.json", "--json",
    )  # fmt: skip
    assert outcome.code == 0
    shapes = [(e["problem"]["C"], e["problem"]["K"], e["problem"]["H"]) for e in outcome.json["entries"]]
    assert shapes == [(3, 16, 12), (16, 24, 12), (24, 8, 6)]


def test_explicit_padding_is_measured_as_the_op_sees_it():
    from basisconv_kernels import BasisConv2d

    layer = BasisConv2d(4, 6, 3, 2, padding=(1, 2), padding_mode="reflect")
    (problem,) = tune.model_problems(layer, torch.zeros(1, 4, 5, 7))
    assert (problem.H, problem.W, problem.padding) == (7, 11, (0, 0, 0, 0))


def test_a_network_without_basis_layers_is_refused():
    with pytest.raises(ValueError, match="no layer of the network became a BasisConv2d"):
        tune.model_problems(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 5, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [("groups=3", "divisible by groups"), ("groups=0", "divisible by groups"), ("stride=0", "at least 1")],
)
def test_impossible_problems_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        tune.parse_problem(f"{PROBLEM},{change}")


def test_dry_run_writes_nothing(basisconv, cache):
    outcome = basisconv("tune", "--problem", PROBLEM, "--seconds", "0.01", "--dry-run")
    assert outcome.code == 0
    assert "N1 8→4→12 3×3 @6×6 NCHW" in outcome.out
    assert not cache.exists()


def test_a_busy_machine_is_reported(basisconv, monkeypatch):
    measured = [{**entry, "disturbed": 0.9} for entry in tune.tune([tune.parse_problem(PROBLEM)], 0.01)]
    monkeypatch.setattr(tune, "tune", lambda *_: measured)
    outcome = basisconv("tune", "--problem", PROBLEM, "--layout", "nchw")
    assert "busy during 1 of 1 problems, which do not count" in " ".join(outcome.err.split())
    assert "does not count: busy" in outcome.out


def forged(factor: float) -> list[dict]:
    """What tune measures of PROBLEM in NCHW, with the native kernel ``factor`` times as fast as plain PyTorch."""
    (entry,) = tune.tune([tune.parse_problem(PROBLEM)], 0.01)
    times = {"cpu": 2.0 / factor, "reference": 2.0}
    spread = {name: {"median": ms, "q1": 0.9 * ms, "q3": 1.1 * ms} for name, ms in times.items()}
    return [{**entry, "ms": spread, "disturbed": 0.0}]


def test_explain_without_a_table(basisconv):
    assert "none for this processor: run `basisconv tune`" in basisconv(*EXPLAIN).out
    found = basisconv(*EXPLAIN, "--json").json
    assert (found["tables"], found["measured"], found["slower"]) == ([], [], {})


@pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")
@pytest.mark.parametrize(("factor", "chosen"), [(4.0, "cpu"), (0.25, "reference")])
def test_explain_shows_the_table_and_its_verdict(basisconv, factor, chosen):
    tuning.write(forged(factor), tuning.user_file())
    found = basisconv(*EXPLAIN, "--json").json
    assert found["chosen"] == chosen
    assert found["tables"] == [str(tuning.user_file())]
    assert [entry["ms"]["cpu"]["median"] for entry in found["measured"]] == [2.0 / factor]
    assert list(found["slower"]) == (["cpu"] if chosen == "reference" else [])
    text = basisconv(*EXPLAIN).out
    assert str(tuning.user_file()) in text
    assert "reference 2.000 [1.800–2.200] ms (N1 @6×6" in text
    slower = "measured slower than plain PyTorch, 8.000 ms against 2.000 ms (N1 @6×6"
    assert (slower in text) == (chosen == "reference")
    assert "nothing for these weights" in basisconv(*EXPLAIN, "--channels-last").out
    wished = basisconv(*EXPLAIN, "--backend", "cpu", "--json").json
    assert wished["chosen"] == "cpu"


def test_doctor_shows_the_table(basisconv):
    def finding():
        return next(f for f in basisconv("doctor", "--json").json if f["what"] == "tuned table")

    assert finding()["state"] == "missing"
    assert "run `basisconv tune`" in finding()["detail"]
    tuning.write(forged(0.25), tuning.user_file())
    assert finding()["state"] == "ok"
    assert f"{tuning.user_file()}: 1 problems; a kernel is slower than plain PyTorch in 1" in finding()["detail"]
    tuning.user_file().write_text("{")
    tuning.forget()
    assert finding()["state"] == "missing"
    assert "is not used: cannot be read" in finding()["detail"]


BIT_PROBLEMS = {
    "binary_conv2d": "op=binary_conv2d,N=1,C=40,H=6,W=6,K=12,R=3,padding=1,packed=1",
    "stacked_binary_conv2d": "op=stacked_binary_conv2d,N=1,C=8,H=6,W=6,K=12,R=3,padding=1,bank=5,splits=2",
    "ternary_conv2d": "op=ternary_conv2d,N=1,C=8,H=6,W=6,K=12,R=3,padding=1,scales=2",
}


@pytest.mark.parametrize(("op", "text"), BIT_PROBLEMS.items(), ids=BIT_PROBLEMS)
def test_filters_of_bits_are_measured_and_found_again_by_the_choice(basisconv, op, text, monkeypatch):
    """What a call of a layer looks up is what ``tune`` wrote: the same fields, whatever batch and map."""
    found = basisconv("tune", "--problem", text, "--seconds", "0.01", "--layout", "channels_last", "--json").json
    (entry,) = found["entries"]
    assert entry["op"] == op
    assert set(entry["ms"]) >= {"reference"}
    shown = basisconv("tune", "--problem", text, "--seconds", "0.01", "--layout", "nchw", "--dry-run").out
    assert f"{op} N1 {entry['problem']['C']}→12 3×3 @6×6" in shown
    seen = []
    monkeypatch.setattr(tuning, "slower", lambda name, problem: seen.append((name, problem)) or {})
    x = torch.randn(3, entry["problem"]["C"], 7, 9).contiguous(memory_format=torch.channels_last)
    sizes = {"padding": 1, "bias": False}
    layer = {
        "binary_conv2d": lambda: BinaryConv2d(40, 12, 3, scaling=None, **sizes),
        "stacked_binary_conv2d": lambda: StackedBinaryConv2d(8, 12, 3, bank=5, splits=2, **sizes),
        "ternary_conv2d": lambda: TernaryConv2d(8, 12, 3, rule="ttq", **sizes),
    }[op]()
    given = bitpack(x) if op == "binary_conv2d" else x
    with torch.no_grad():
        layer(given)
    ((_, problem),) = [call for call in seen if call[0] == op]
    keys = [tuning._weights_key(op, values) for values in (problem.to_json(), entry["problem"])]
    assert keys[0] == keys[1]
    (of_layer,) = tune.model_problems(torch.nn.Sequential(layer), given)
    assert tuning._weights_key(op, of_layer.to_json()) == keys[0]
