"""The backend ``cuda_one_pass`` of ``tucker_conv2d`` without a GPU: what it takes, when it is chosen, tracing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from basisconv_kernels import BackendUnavailable, diagnostics, tucker_conv2d
from basisconv_kernels.core import extension, registry, selfcheck, tuning
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import tucker_conv2d as op
from basisconv_kernels.ops import tucker_conv2d_model as model
from basisconv_kernels.ops import tucker_conv2d_one_pass as one_pass

BF16 = torch.bfloat16
PROBLEM = TuckerConv2dProblem(
    C=64, rank_in=16, Q=16, K=64, padding=(1, 1, 1, 1), dtype=BF16, device="cuda", channels_last=True
)
built = pytest.mark.skipif("cuda" not in extension.facts(), reason="the native library has no CUDA kernels")


def entry(one, two, plain=9.0, way="graph", **sizes):
    """Times of an H200; a pair is the quartiles."""
    ms = {model.ONE_PASS: one, model.TWO_PASSES: two, "reference": (plain, plain)}
    spreads = {name: {"median": sum(t) / 2, "q1": t[0], "q3": t[1]} for name, t in ms.items() if t is not None}
    problem = replace(PROBLEM, **{"N": 32, "H": 56, "W": 56, **sizes}).to_json()
    return {"op": op.OP, "problem": problem, "threads": 0, "way": way, "ms": spreads, "disturbed": 0.0}


FASTER, LIKE, SLOWER = entry((1, 2), (3, 4)), entry((2, 3), (2.5, 4)), entry((5, 6), (3, 4), way="eager", N=1)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "was not measured beside two passes"),
        ([entry(None, (1, 2)), entry((1, 2), None)], "was not measured beside two passes"),
        ([LIKE], "measured no faster than two passes"),
        ([FASTER, SLOWER], "measured slower than two passes, 5.500 ms against 3.500 ms (N1 @56×56, eager)"),
        ([FASTER, LIKE], None),
        ([FASTER], None),
    ],
)
def test_one_pass_is_taken_where_it_was_measured_to_be_faster_and_never_slower(entries, told):
    found = model.against_one_pass(entries)
    assert found == told if told is None else found.startswith(told)


SMALL, LARGE = entry((1, 2), (3, 4), N=1), entry((5, 6), (3, 4), N=32)
EAGER_SMALL = entry((3, 4), (1, 2), way="eager", N=1)


@pytest.mark.parametrize(
    ("entries", "pixels", "takes_it"),
    [
        ([SMALL, LARGE], 0, False),
        ([SMALL, LARGE], 1 * 56 * 56, True),
        ([SMALL, LARGE], 1 * 7 * 7, True),
        ([SMALL, LARGE], 2 * 56 * 56, False),
        ([SMALL, LARGE], 32 * 56 * 56, False),
        ([SMALL, LARGE], 64 * 56 * 56, False),
        ([SMALL, LARGE, EAGER_SMALL], 1 * 56 * 56, False),
        ([SMALL, entry((1, 2), (3, 4), N=8), LARGE], 4 * 56 * 56, True),
        ([SMALL, entry((1, 2), (3, 4), N=8), LARGE], 16 * 56 * 56, False),
        ([entry((5, 6), (3, 4), N=1), entry((1, 2), (3, 4), N=32)], 64 * 56 * 56, True),
        ([SMALL, entry((1, 2), None, N=4), LARGE], 4 * 56 * 56, False),
        ([SMALL, {**LARGE, "problem": {"N": "32"}}], 1 * 56 * 56, True),
    ],
)
def test_a_call_of_known_size_asks_the_entries_next_to_it(entries, pixels, takes_it):
    assert (model.against_one_pass(entries, pixels) is None) == takes_it


def choice(monkeypatch, entries, problem=PROBLEM):
    """What a GPU with such a table, and kernels that passed their checks, would run."""
    monkeypatch.setattr(tuning, "entries_for", lambda *_: entries)
    monkeypatch.setattr(model.basis, "predicted_slower", lambda _: {})
    monkeypatch.setattr(registry, "absent", lambda name: None if name.startswith(("cuda", "ref")) else "not here")
    monkeypatch.setattr(selfcheck, "against", lambda check: None)
    return registry.select(op.OP, op.CANDIDATES, problem, None, model.slower_than_plain(problem)).name


def test_automatic_choice(monkeypatch):
    assert choice(monkeypatch, [FASTER]) == "cuda_one_pass"
    assert choice(monkeypatch, [FASTER, SLOWER]) == "cuda"
    assert choice(monkeypatch, [LIKE]) == "cuda"
    assert choice(monkeypatch, []) == "cuda"
    assert choice(monkeypatch, [entry((1, 2), (3, 4), plain=0.5)]) == "reference"


def test_automatic_choice_by_size(monkeypatch):
    rows = [SMALL, LARGE]
    assert choice(monkeypatch, rows, replace(PROBLEM, N=1, H=56, W=56)) == "cuda_one_pass"
    assert choice(monkeypatch, rows, replace(PROBLEM, N=8, H=56, W=56)) == "cuda"
    assert choice(monkeypatch, rows) == "cuda", "one graph for all sizes"


CHAINS = {64: 56, 128: 28, 256: 14, 512: 7}  # channels of the measured layers, and the side of their maps


@pytest.mark.parametrize(
    ("C", "N", "expected"),
    [
        (64, 0, "cuda"), (64, 1, "cuda_one_pass"), (64, 8, "cuda"), (64, 32, "cuda"),
        (128, 0, "cuda_one_pass"), (128, 1, "cuda_one_pass"), (128, 32, "cuda_one_pass"),
        (256, 0, "cuda"), (256, 1, "cuda"), (256, 32, "cuda_one_pass"),
        (512, 0, "cuda"), (512, 1, "cuda"), (512, 32, "cuda"),
    ],
)  # fmt: skip
def test_the_packages_table_of_an_h200(monkeypatch, C, N, expected):
    table = json.loads((tuning.PACKAGED / "nvidia-h200-9.0.json").read_text(encoding="utf-8"))["entries"]
    rows = [row for row in table if row["op"] == op.OP and row["problem"]["C"] == C]
    assert len(rows) == 4
    side = CHAINS[C] if N else 0
    sized = replace(PROBLEM, C=C, K=C, rank_in=C // 4, Q=C // 4, N=N, H=side, W=side)
    assert choice(monkeypatch, rows, sized) == expected


def test_explain_says_it_of_the_size_it_is_asked_about(monkeypatch):
    monkeypatch.setattr(tuning, "entries_for", lambda *_: [SMALL, LARGE])
    monkeypatch.setattr(model.basis, "predicted_slower", lambda _: {})
    monkeypatch.setattr(registry, "absent", lambda name: None if name.startswith(("cuda", "ref")) else "not here")
    monkeypatch.setattr(selfcheck, "known", lambda variant: None)
    small = diagnostics.explain(op.OP, replace(PROBLEM, N=1, H=56, W=56), None)
    large = diagnostics.explain(op.OP, replace(PROBLEM, N=32, H=56, W=56), None)
    assert (small["chosen"], large["chosen"]) == ("cuda_one_pass", "cuda")
    assert large["slower"]["cuda_one_pass"].startswith("measured slower than two passes")


class Shaped(NamedTuple):
    """What the choice asks of a tensor on a GPU."""

    shape: tuple[int, ...]
    device: torch.device = torch.device("cuda")


def test_traced_calls_and_those_on_a_processor_choose_for_every_size(monkeypatch):
    assert op.known_maps(Shaped((1, 64, 56, 48))) == (1, 56, 48)
    assert op.known_maps(Shaped((1, 64, 56, 48), torch.device("cpu"))) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert op.known_maps(Shaped((1, 64, 56, 48))) is None


def test_an_eager_call_states_its_size(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "known_maps", lambda input: (3, 5, 7))
    monkeypatch.setattr(op, "slower_than_plain", lambda problem: seen.append((problem.N, problem.H, problem.W)) or {})
    x, u_in, core, u_out = (torch.zeros(s) for s in ((3, 8, 5, 7), (8, 4), (4, 4, 3, 3), (8, 4)))
    op._normal_form(x, u_in, core, u_out, None, None, 1, 0, 1, None, False, None)
    assert seen == [(3, 5, 7)]


def test_other_devices_hear_nothing_of_it():
    assert model.ONE_PASS not in model.slower_than_plain(replace(PROBLEM, device="cpu", dtype=torch.float32))


@built
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rank_in": 128, "Q": 128, "C": 512, "K": 512}, None),
        ({"C": 19, "K": 13, "channels_last": False}, None),
        ({"stride": (2, 2), "R": 5, "S": 5, "dilation": (2, 2)}, None),
        ({"Q": 129}, "ranks up to 128"),
        ({"rank_in": 200}, "ranks up to 128"),
        ({"rank_in": 128, "stride": (4, 4)}, "too little shared memory"),
        ({"dtype": torch.float32}, "has no torch.float32 kernel"),
        ({"precise": True}, "keeps the first map in the dtype of the input"),
        ({"device": "cpu"}, "runs on CUDA devices"),
    ],
)
def test_what_it_takes(changes, reason):
    against = one_pass.supports(replace(PROBLEM, **changes))
    assert (not against) == (reason is None)
    assert reason is None or any(reason in told for told in against)


@built
def test_explain_says_why_not(monkeypatch):
    monkeypatch.setattr(registry, "absent", lambda name: None if name.startswith(("cuda", "ref")) else "not here")
    monkeypatch.setattr(selfcheck, "known", lambda variant: None)
    monkeypatch.setattr(model.basis, "predicted_slower", lambda _: {})
    found = diagnostics.explain(op.OP, replace(PROBLEM, N=8, H=56, W=56, Q=129), None)
    assert "ranks up to 128" in found["candidates"]["cuda_one_pass"][0]
    found = diagnostics.explain(op.OP, replace(PROBLEM, N=8, H=56, W=56), None)
    assert found["chosen"] == "cuda"
    assert found["slower"]["cuda_one_pass"].startswith("was not measured beside two passes")


def test_a_wish_off_the_gpu_is_refused_with_the_reason():
    x, u_in, core, u_out = (torch.zeros(s, dtype=BF16) for s in ((1, 8, 5, 5), (8, 4), (4, 4, 3, 3), (8, 4)))
    with pytest.raises(BackendUnavailable, match="cuda_one_pass: "):
        tucker_conv2d(x, u_in, core, u_out, backend="cuda_one_pass")


def test_the_check_names_what_the_kernel_depends_on():
    candidate = next(c for c in op.CANDIDATES if c.name == "cuda_one_pass")
    variant = registry.check_of(candidate, PROBLEM).variant
    words = "bfloat16 channels_last 3×3 stride 1,1 C≤16 aligned to 8 Q≤16 K≤64 of channels aligned to 8"
    assert variant == f"tucker_conv2d cuda_one_pass {words}"
    assert registry.check_of(candidate, replace(PROBLEM, C=19)).variant != variant


@built
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_shapes_strides_and_flops_of_a_traced_call(layout):
    x = torch.empty(2, 24, 9, 11, dtype=BF16, device="meta").to(memory_format=layout)
    u_in, core, u_out = (torch.empty(s, dtype=BF16, device="meta") for s in ((24, 8), (12, 8, 3, 3), (20, 12)))
    packed = torch.empty(1, dtype=torch.uint8, device="meta")
    arguments = (x, u_in, core, u_out, None, None, packed, (2, 1), (1, 1, 1, 1), (1, 1), None)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out = torch.ops.basisconv.tucker_conv2d_one_pass.default(*arguments)
    assert (out.shape, out.dtype) == ((2, 20, 5, 11), BF16)
    assert out.is_contiguous(memory_format=layout)
    assert counter.get_total_flops() == 2 * 2 * (99 * 24 * 8 + 55 * (12 * 8 * 9 + 20 * 12))


@built
def test_stages_that_are_kept_take_two_passes(monkeypatch):
    seen = []
    monkeypatch.setattr(one_pass.two_passes, "forward", lambda *arguments: seen.append(arguments) or "kept")
    assert one_pass.forward(*[None] * 7, (), keep_stages=True) == "kept"
    assert seen[0][-1] is True
