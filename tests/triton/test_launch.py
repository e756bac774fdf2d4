"""Launches that Triton binds once."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from basisconv_kernels.triton_kernels import _launch
from basisconv_kernels.triton_kernels._launch import Launch, rebased, template


class Recorded:
    """As a ``JITFunction`` it notes what it binds, as a compiled kernel what it is launched with."""

    def __init__(self, compiled=None):
        self.compiled, self.calls = compiled, []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self.compiled

        return call


def test_the_first_call_binds_and_all_others_go_to_the_compiled_kernel():
    compiled = Recorded()
    jit = Recorded(compiled)
    launch = Launch(jit, 7, (3, True, "relu"), num_warps=4)
    a, b, c = (torch.zeros(1) for _ in range(3))
    launch(a, None)
    launch(b, None)
    launch(c, None)
    assert jit.calls == [((7, 1, 1), (a, None, 3, True, "relu"), {"num_warps": 4})]
    assert compiled.calls == [((7, 1, 1), (t, None, 3, True, "relu"), {}) for t in (b, c)]


def test_the_interpreter_compiles_nothing():
    jit = Recorded()
    launch = Launch(jit, 1, ())
    launch(None)
    launch(None)
    assert len(jit.calls) == 2


def test_the_first_launch_of_a_thread_calls_the_runtime(monkeypatch):
    """A driver describes no tensor in a thread without a context."""
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: made.append((threading.get_ident(), device)))
    monkeypatch.setattr(_launch, "_threads", threading.local())
    launch, tensor = Launch(Recorded(), 1, ()), torch.ones(1)

    def twice():
        launch(None, tensor)
        launch(None, tensor)

    twice()
    other = threading.Thread(target=twice)
    other.start()
    other.join()
    assert made == [(threading.get_ident(), tensor.device), (other.ident, tensor.device)]


def test_a_template_describes_any_tensor_of_its_kind_and_keeps_none():
    first, second = torch.zeros(4, 64), torch.ones(4, 64)
    made = template([4, 64], [64, 1], [2, 64], first)
    assert made.base is None
    assert rebased(made, second) == TensorDescriptor(second, [4, 64], [64, 1], [2, 64])
    assert made.base is None
    with pytest.raises(AssertionError, match="contiguous"):
        template([4, 64], [64, 2], [2, 64], first)
