"""``doctor``, ``env``, ``ops`` and ``explain``: facts from the registry, and failures that are noticed."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import diagnostics
from basisconv_kernels.core import checks, extension, registry
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.testing import Mismatch

EXPLAIN = ("explain", "basis_conv2d", "--input", "8,64,56,56", "--basis-channels", "16", "--out-channels", "64")


def test_doctor_finds_this_installation_healthy(basisconv):
    outcome = basisconv("doctor", "--json")
    assert outcome.code == 0
    found = {finding["what"]: finding for finding in outcome.json}
    assert {finding["state"] for finding in outcome.json} <= {"ok", "missing"}
    for candidate in op.CANDIDATES:
        state = "missing" if registry.absent(candidate.name) else "ok"
        assert found[f"basis_conv2d on {candidate.name}"]["state"] == state
    assert found["demo data"]["state"] == "ok"


def test_doctor_notices_a_wrong_kernel(basisconv, monkeypatch):
    def wrong(backend: str, dtype: torch.dtype, device: str) -> None:
        if backend == "reference" and dtype is torch.bfloat16:
            raise Mismatch("first mismatch at [n=0, k=0, y=0, x=0]")

    monkeypatch.setattr(diagnostics, "TINY_RUNS", {"basis_conv2d": wrong})
    outcome = basisconv("doctor")
    assert outcome.code == 1
    assert "failed" in outcome.out
    assert "bfloat16: first mismatch" in outcome.out
    assert "does not work: basis_conv2d on reference" in outcome.err


@pytest.mark.parametrize(("file_is_there", "state"), [(False, "missing"), (True, "failed")])
def test_doctor_tells_not_built_from_broken(monkeypatch, tmp_path, file_is_there, state):
    if file_is_there:
        (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(diagnostics, "PACKAGE", tmp_path)
    monkeypatch.setattr(extension, "load", lambda: "it does not load")
    monkeypatch.setattr(extension, "facts", dict)
    library = next(finding for finding in diagnostics._installation() if finding.what == "native library")
    assert (library.state, library.detail) == (state, "it does not load")


def test_env_reports_variables_and_versions(basisconv, monkeypatch):
    monkeypatch.setenv("BASISCONV_LOG", "dispatch")
    found = basisconv("env", "--json").json
    assert found["torch"] == torch.__version__
    assert found["torch_git"] == torch.version.git_version
    assert found["threads"] == torch.get_num_threads()
    assert found["variables"]["BASISCONV_LOG"] == "dispatch"
    text = basisconv("env").out
    assert f"torch: {torch.__version__}" in text
    assert "BASISCONV_LOG dispatch" in text


def test_an_op_is_a_module_with_a_function_of_its_name():
    modules = diagnostics.op_modules()
    assert op.OP in modules
    for name, module in modules.items():
        assert callable(getattr(module, name))
        assert module.CANDIDATES


def test_ops_says_what_the_candidates_say(basisconv):
    rows = basisconv("ops", "--json").json
    for candidate in op.CANDIDATES:
        for row in [row for row in rows if (row["op"], row["backend"]) == (op.OP, candidate.name)]:
            for dtype in checks.FLOAT_DTYPES:
                problem = diagnostics._ordinary(dtype, row["device"])
                assert row["dtypes"][diagnostics.dtype_name(dtype)] == list(candidate.supports(problem))
    assert {row["backend"] for row in rows if row["op"] == op.OP} == {candidate.name for candidate in op.CANDIDATES}
    lines = basisconv("ops").out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split()[:3] == ["op", "backend", "device"]


def test_explain_agrees_with_the_choice_of_a_real_call(basisconv):
    found = basisconv(*EXPLAIN, "--padding", "1", "--json").json
    assert found["output"] == [8, 64, 56, 56]
    assert found["macs_dense"] == 8 * 56 * 56 * 64 * 64 * 9
    assert found["macs_basis"] == 8 * 56 * 56 * (16 * 64 * 9 + 64 * 16)
    assert found["break_even"] == pytest.approx(57.6)
    assert found["pays"] is True
    shapes = {"input": (1, 64, 6, 6), "basis_weight": (16, 64, 3, 3), "coefficients": (64, 16)}
    tensors = [torch.zeros(shape) for shape in shapes.values()]
    settings = op._normal_form(*tensors, None, None, 1, 1, 1, 1, None, False, None)
    assert found["chosen"] == settings.backend


def test_explain_past_break_even(basisconv):
    found = basisconv("explain", "basis_conv2d", "--input", "1,8,9,9", "--basis-channels", "8", "--out-channels", "8")
    assert "not below it: the dense convolution costs no more" in found.out


@pytest.mark.parametrize("backend", ["cpu", "no_such_backend"])
def test_explain_names_the_reasons_against_a_wish(basisconv, backend):
    outcome = basisconv(*EXPLAIN, "--dtype", "float64", "--backend", backend)
    assert outcome.code == 1
    assert "runs on" in outcome.out
    assert f"backend {backend!r} cannot run this" in outcome.err
    assert ("float64" if backend == "cpu" else "not a backend of this op") in outcome.out


def test_explain_needs_no_device(basisconv):
    outcome = basisconv(*EXPLAIN, "--device", "cuda", "--json")
    assert outcome.code == 0
    assert "runs on the CPU" in " ".join(outcome.json["candidates"]["cpu"]) or registry.absent("cpu")


def test_explain_groups_compact(basisconv):
    grouped = ("--groups", "4", "--compact")
    found = basisconv(*EXPLAIN, *grouped, "--json").json
    assert found["weights_basis"] == 16 * 16 * 9 + 64 * 4
    assert found["break_even"] == pytest.approx(64 * 144 / (144 + 16))


TUCKER = ("explain", "tucker_conv2d", "--input", "2,64,9,9", "--basis-channels", "16", "--out-channels", "32")


def test_explain_of_a_tucker_convolution(basisconv):
    found = basisconv(*TUCKER, "--rank-in", "8", "--padding", "1", "--json").json
    assert found["problem"].startswith("N2 64→8→16→32 3×3 @9×9")
    assert found["macs_basis"] == 2 * 81 * (64 * 8 + 16 * 8 * 9 + 32 * 16)
    assert found["macs_dense"] == 2 * 81 * 32 * 64 * 9
    assert (found["weights_basis"], found["weights_dense"]) == (64 * 8 + 16 * 8 * 9 + 32 * 16, 32 * 64 * 9)
    assert (found["break_even"], found["pays"]) == (None, True)
    assert "the stages cost less" in basisconv(*TUCKER, "--rank-in", "8").out
    assert "the dense convolution costs no more MACs" in basisconv(*TUCKER, "--rank-in", "640").out
    assert basisconv(*TUCKER).code == 1
    assert "--rank-in belongs to tucker_conv2d" in basisconv(*EXPLAIN, "--rank-in", "8").err


SIZES = ("--input", "2,64,9,9", "--out-channels", "32", "--padding", "1")


def test_explain_of_filters_of_bits(basisconv):
    dense = 2 * 81 * 32 * 64 * 9
    found = basisconv("explain", "binary_conv2d", *SIZES, "--packed", "--bits-out", "--json").json
    assert (found["operations"], found["stored_bytes"], found["form"]) == (dense, 32 * 64 * 9 // 8, None)
    assert "packed signs float32 → packed" in found["problem"]
    found = basisconv("explain", "stacked_binary_conv2d", *SIZES, "--bank", "8", "--splits", "2", "--json").json
    assert found["operations"] == 2 * 81 * (8 * 64 * 9 + 32 * 2)
    assert (found["stored_bytes"], found["form"]) == ((8 * 32 * 9 + 32 * 2 * 3) // 8, "stacked")
    out = basisconv("explain", "ternary_conv2d", *SIZES, "--scales", "2", "--bias").out
    assert "two scales" in out
    assert f"{32 * 64 * 9 // 4:,} bytes instead of {4 * 32 * 64 * 9:,} of float32 (16×)" in out


def test_doctor_runs_every_op():
    ran = {finding.what for finding in diagnostics.doctor() if finding.state == "ok"}
    assert {f"{name} on reference" for name in diagnostics.TINY_RUNS} <= ran
