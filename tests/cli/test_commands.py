"""What all commands share: help, exit codes, one line for an error, JSON, colours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from basisconv_kernels import __main__ as entry
from basisconv_kernels import __version__

COMMANDS = ("demo", "compress", "report", "tune", "doctor", "env", "ops", "explain")
EXPLAIN = ("explain", "basis_conv2d", "--input", "8,64,56,56", "--basis-channels", "16", "--out-channels", "64")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m")


def test_help_lists_every_command(basisconv):
    outcome = basisconv("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", outcome.out)
    assert "--traceback" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(basisconv, command):
    outcome = basisconv(command, "--help")
    assert outcome.code == 0
    assert f"basisconv {command}" in outcome.out
    assert outcome.err == ""
    assert "--json" in outcome.out


def test_version(basisconv):
    assert basisconv("--version").out.strip() == f"basisconv_kernels {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("env", "--nonsense"),
        ("report",),
        ("explain", "basis_conv2d"),
        ("explain", "binary_conv2d", "--input", "1,8,9,9"),
        (*EXPLAIN[:3], "8,64,56", *EXPLAIN[4:]),
        (*EXPLAIN[:3], "8,64,0,56", *EXPLAIN[4:]),
        (*EXPLAIN, "--kernel", "three"),
        (*EXPLAIN, "--dtype", "int8"),
        (*EXPLAIN, "--activation", "gelu"),
        ("compress", "--model", "somewhere:net", "--input", "1,3,8,8"),
        ("compress", "--model", "somewhere:net", "--input", "1,3,8,8", "--energy", "0.5", "--fraction", "0.5"),
        ("compress", "--model", "somewhere", "--input", "1,3,8,8", "--energy", "0.5"),
        ("compress", "--model", "somewhere:net", "--input", "1,3,8,8", "--energy", "0.5", "--keep-dense", "maybe"),
        ("demo", "--data", "imagenet"),
        ("demo", "--network", "resnet1001"),
        ("demo", "--energy", "1.5"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(basisconv, arguments):
    outcome = basisconv(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Usage:" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "not-there.safetensors"), "not-there.safetensors: No such file"),
        (("explain", "nonsense", *EXPLAIN[2:]), "no op has the name 'nonsense'"),
        ((*EXPLAIN, "--groups", "3"), "divisible by groups = 3"),
        (("explain", "basis_conv2d", *EXPLAIN[2:4], "--out-channels", "8"), "--basis-channels must be given"),
        ((*EXPLAIN, "--bank", "3"), "--bank belongs to stacked_binary_conv2d"),
        (("explain", "ternary_conv2d", *EXPLAIN[2:]), "--basis-channels belongs to basis_conv2d"),
        (("tune", "--problem", "op=basis_conv2d,N=8"), "op must be one of binary_conv2d"),
        (("tune", "--problem", "op=binary_conv2d,N=8,C=64,H=9,W=9,K=8,R=3,bank=4"), "bank belongs to stacked_binary"),
        ((*EXPLAIN, "--kernel", "61"), "smaller than the dilated kernel"),
        (("tune", "--problem", "N=8,C=64"), "lacks H, W, Q, K, R, S"),
        (("tune", "--problem", "N=8;C=64"), "a problem reads"),
        (("compress", "--model", "nowhere_at_all:net", "--input", "1,3,8,8", "--energy", "0.5"), "nowhere_at_all"),
        (("demo", "--network", "resnet20"), "use cifar10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_failure_is_1_and_one_line(basisconv, arguments, words, tmp_path):
    extra = ("--out", tmp_path) if arguments[0] == "demo" else ()
    outcome = basisconv(*arguments, *extra)
    assert outcome.code == 1
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert lines[-1].startswith("basisconv: error: ")
    assert words in lines[-1]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("place", [0, -1])
def test_traceback_on_request(basisconv, place):
    arguments = ["report", "not-there.safetensors"]
    arguments.insert(len(arguments) if place else 0, "--traceback")
    with pytest.raises(FileNotFoundError):
        basisconv(*arguments)


@pytest.mark.parametrize("lacking", [("typer",), ("rich",), ("typer", "rich")], ids=" ".join)
def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys, lacking):
    find = entry.importlib.util.find_spec
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    assert entry.main(["env"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == (
        f"basisconv: the command line needs {' and '.join(lacking)}: pip install 'basisconv_kernels[cli]'"
    )


def test_demo_without_the_report_extra_says_what_to_install(basisconv, monkeypatch, tmp_path):
    find = entry.importlib.util.find_spec
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    outcome = basisconv("demo", "--quick", "--out", tmp_path / "demo")
    assert outcome.code == 1
    assert "matplotlib: pip install 'basisconv_kernels[report]'" in outcome.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("arguments", [("env",), ("ops",), EXPLAIN], ids=lambda arguments: arguments[0])
def test_json_alone_is_on_stdout(basisconv, arguments):
    outcome = basisconv(*arguments, "--json")
    assert outcome.code == 0
    assert outcome.json
    assert outcome.err == ""


def test_colours_only_where_wanted(basisconv, monkeypatch):
    plain = basisconv("report", "not-there.safetensors")
    assert "\x1b" not in plain.err  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(basisconv("report", "not-there.safetensors").err)
    monkeypatch.setenv("NO_COLOR", "1")
    refused = basisconv("report", "not-there.safetensors")
    assert not COLOUR.search(refused.err)
    assert not COLOUR.search(basisconv("--help").out)


def test_as_a_module_in_its_own_process():
    done = subprocess.run(
        [sys.executable, "-m", "basisconv_kernels", "env", "--json"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["basisconv_kernels"] == __version__
    assert done.stderr == ""
