"""Choice of a backend: order, reasons, wishes, and the log that says why."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import threading

import pytest

from basisconv_kernels import BackendUnavailable
from basisconv_kernels.core import log, registry
from basisconv_kernels.core.registry import Candidate


@pytest.fixture
def candidates(monkeypatch):
    """Three: one that never can, one for even problems, one for all; ``absent`` knows them."""
    known = {"broken": "the fuse is blown", "even": None, "any": None}
    monkeypatch.setattr(registry, "absent", lambda name: known.get(name, f"no backend has the name {name!r}"))
    monkeypatch.setattr(log, "_said", set())
    return (
        Candidate("broken", "math:nothing", lambda problem: ()),
        Candidate("even", "math:sqrt", lambda problem: ["is odd", "is not even"] if problem % 2 else []),
        Candidate("any", "math:floor", lambda problem: ()),
    )


def test_reasons_of_all_in_order(candidates):
    assert registry.reasons(candidates, 3) == {
        "broken": ("the fuse is blown",),
        "even": ("is odd", "is not even"),
        "any": (),
    }


@pytest.mark.parametrize(("problem", "chosen"), [(2, "even"), (3, "any")])
def test_the_first_that_can_is_chosen(candidates, problem, chosen):
    assert registry.select("op", candidates, problem, None).name == chosen


def test_each_choice_is_logged_once_with_why_not_the_others(candidates, caplog):
    caplog.set_level(logging.INFO, logger="basisconv_kernels")
    for problem in (3, 3, 2):
        registry.select("op", candidates, problem, None)
    assert [record.getMessage() for record in caplog.records] == [
        "op [3] → any (not broken: the fuse is blown | even: is odd; is not even)",
        "op [2] → even (not broken: the fuse is blown)",
    ]


def test_a_wish_is_fulfilled_or_refused_with_all_reasons(candidates):
    assert registry.select("op", candidates, 2, "any").name == "any"
    with pytest.raises(BackendUnavailable) as raised:
        registry.select("op", candidates, 3, "even")
    assert str(raised.value) == (
        "op: backend 'even' cannot run [3]\n  broken: the fuse is blown\n  even: is odd; is not even\n  any: can run"
    )


def test_an_unknown_wish_is_named(candidates):
    with pytest.raises(BackendUnavailable) as raised:
        registry.select("op", candidates, 2, "abacus")
    assert str(raised.value).splitlines()[:2] == [
        "op: backend 'abacus' cannot run [2]",
        "  abacus: no backend has the name 'abacus'",
    ]


def test_when_none_can_all_reasons_are_given(candidates):
    with pytest.raises(BackendUnavailable) as raised:
        registry.select("op", candidates[:2], 3, None)
    assert str(raised.value) == ("op: no backend can run [3]\n  broken: the fuse is blown\n  even: is odd; is not even")


def test_resolve_imports_the_target(candidates):
    assert registry.resolve(candidates[1]) is math.sqrt
    with pytest.raises(AttributeError):
        registry.resolve(candidates[0])


def test_use_backend_nests_and_is_undone_after_an_error():
    before = registry.wish()
    with registry.use_backend("one"):
        assert registry.wish() == "one"
        with contextlib.suppress(KeyError), registry.use_backend("two"):
            assert registry.wish() == "two"
            raise KeyError
        assert registry.wish() == "one"
        with registry.use_backend(None):
            assert registry.wish() is None
    assert registry.wish() == before


def test_use_backend_belongs_to_its_thread():
    seen = []
    with registry.use_backend("mine"):
        thread = threading.Thread(target=lambda: seen.append(registry.wish()))
        thread.start()
        thread.join()
    assert seen == [registry.wish()]


def test_the_reference_is_never_absent():
    assert registry.absent("reference") is None


def test_an_unknown_backend_is_absent_by_name():
    assert registry.absent("abacus") == "no backend has the name 'abacus'"


PROGRAM = """
import torch
from basisconv_kernels import BackendUnavailable, basis_conv2d, use_backend
tensors = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(4, 1)
basis_conv2d(*tensors, backend="reference")
with use_backend("reference"):
    basis_conv2d(*tensors)
try:
    basis_conv2d(*tensors)
except BackendUnavailable as error:
    print(str(error).splitlines()[0])
"""


def test_the_environment_names_the_backend_of_calls_that_name_none():
    environment = {**os.environ, "BASISCONV_BACKEND": "abacus", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "basis_conv2d: backend 'abacus' cannot run [2→1→4 3×3 float32 cpu]"
