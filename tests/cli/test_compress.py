"""``compress`` and ``report``: from a network's name to a file and a table."""

from __future__ import annotations

import importlib

import pytest
import torch

from basisconv_kernels import load, testing

RULE = ("--input", "1,3,12,12", "--fraction", "0.25")


def test_compress_then_report(basisconv, network, tmp_path):
    file = tmp_path / "small.safetensors"
    compressed = basisconv("compress", "--model", network, *RULE, "--out", file)
    assert compressed.code == 0
    assert "3 of 3 convolutions replaced" in compressed.out
    assert "no --weights" in compressed.err

    recipe = basisconv("report", file, "--json").json
    assert {layer["names"][0]: layer["kind"] for layer in recipe["layers"]}["2"] == "basis_conv2d"
    assert recipe["tensors"]["2.basis_weight"]["shape"] == [6, 16, 3, 3]
    table = basisconv("report", file).out
    assert "16→24" in table
    assert "3,456 → 1,008" in table  # 24·16·9 weights become 6·16·9 + 24·6

    small = importlib.import_module("tiny_network_for_cli").small()
    loaded = load(file, small)
    assert loaded(torch.zeros(1, 3, 12, 12)).shape == (1, 8, 6, 6)


def test_compress_json_and_no_file(basisconv, network, tmp_path):
    outcome = basisconv("compress", "--model", network, *RULE, "--json", "--skip", "0")
    assert outcome.code == 0
    found = outcome.json
    assert found["file"] is None
    assert [layer["verdict"] for layer in found["layers"]] == ["kept", "replaced", "replaced"]
    assert found["layers"][0]["reason"] == "in skip"
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("rule", "value"), [("energy", "0.5"), ("basis-channels", "4"), ("macs", "0.6"), ("parameters", "0.6")]
)
def test_every_rule_is_passed_on(basisconv, network, rule, value):
    found = basisconv("compress", "--model", network, "--input", "1,3,12,12", f"--{rule}", value, "--json").json
    assert found["rule"].startswith(f"{rule.replace('-', '_')}={value}")
    assert found["totals"]["macs_after"] < found["totals"]["macs_before"]


def test_tucker_on_the_command_line(basisconv, network, tmp_path):
    file = tmp_path / "small.safetensors"
    call = ("compress", "--model", network, "--input", "1,3,12,12", "--method", "tucker")
    found = basisconv(*call, "--fraction", "0.4", "--out", file, "--json").json
    assert found["rule"].startswith("Tucker: fraction=0.4")
    replaced = [layer for layer in found["layers"] if layer["verdict"] == "replaced"]
    assert any(layer["rank_in"] for layer in replaced)
    assert "tucker_conv2d" in basisconv("report", file).out
    load(file, importlib.import_module("tiny_network_for_cli").small())
    assert basisconv(*call, "--evbmf", "0.5", "--json").json["rule"].startswith("Tucker: evbmf=0.5")
    for wrong in (("--basis-channels", "4"), ("--evbmf", "0", "--energy", "0.5")):
        outcome = basisconv(*call, *wrong)
        assert outcome.code == 2
        assert "--evbmf" in outcome.err
    assert basisconv("compress", "--model", network, "--input", "1,3,12,12", "--evbmf", "0").code == 2


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint"])
def test_weights_from_files(basisconv, network, tmp_path, kind):
    import safetensors.torch

    module, function = network.split(":")
    trained = getattr(importlib.import_module(module), function)()
    state = {name: torch.full_like(value, 0.5) for name, value in trained.state_dict().items()}
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, file)
    elif kind == "state_dict":
        torch.save(state, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    out = tmp_path / "out.safetensors"
    outcome = basisconv(
        "compress", "--model", network, "--input", "1,3,12,12", "--energy", "1", "--weights", file, "--out", out
    )
    assert outcome.code == 0
    assert outcome.err == ""
    got = load(out, getattr(importlib.import_module(module), function)())(torch.ones(1, 3, 12, 12))
    trained.load_state_dict(state)
    testing.check_same_network(got, trained(torch.ones(1, 3, 12, 12)))


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda file: torch.save(_Evil(), file), "something else than plain tensors"),
        (lambda file: file.write_bytes(b"nonsense"), "w.pt"),
        (lambda file: torch.save([1, 2], file), "must hold a state_dict"),
        (lambda file: torch.save({"0.weight": torch.zeros(2)}, file), "0.weight is [2] in the file"),
        (lambda file: torch.save({"9.weight": torch.zeros(2)}, file), "the file lacks"),
    ],
    ids=["code", "nonsense", "list", "shape", "names"],
)
def test_weights_that_do_not_fit(basisconv, network, tmp_path, content, words):
    file = tmp_path / "w.pt"
    content(file)
    outcome = basisconv("compress", "--model", network, *RULE, "--weights", file)
    assert outcome.code == 1
    assert words in outcome.err
    assert "executed" not in outcome.out
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words"), [("nothing", "no function 'nothing'"), ("not_a_network", "it returned a int")]
)
def test_functions_that_give_no_network(basisconv, network, name, words):
    outcome = basisconv("compress", "--model", f"{network.split(':')[0]}:{name}", *RULE)
    assert outcome.code == 1
    assert words in outcome.err


def test_a_module_that_is_not_there(basisconv):
    outcome = basisconv("compress", "--model", "no_such_module:network", *RULE)
    assert outcome.code == 1
    assert "--model: 'no_such_module' cannot be imported from here: No module named 'no_such_module'" in outcome.err


def test_report_refuses_an_edited_file(basisconv, network, tmp_path):
    file = tmp_path / "small.safetensors"
    basisconv("compress", "--model", network, *RULE, "--out", file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    outcome = basisconv("report", file)
    assert outcome.code == 1
    assert "truncated or edited" in outcome.err
