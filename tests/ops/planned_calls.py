"""What the tests of repeated calls with packed weights share (``test_*_planned.py``): counting, comparing, refusing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from basisconv_kernels import PackedTensor


class Counter:
    """Calls of a planned op, and how many of them it refused."""

    def __init__(self, native):
        self.native, self.calls, self.refused = native, 0, 0

    def __call__(self, *tensors):
        self.calls += 1
        try:
            return self.native(*tensors)
        except RuntimeError:
            self.refused += 1
            raise


def counted(monkeypatch: pytest.MonkeyPatch, plans: Any) -> Counter:
    """From here on what goes the short way is counted."""
    if plans.native is None:
        pytest.skip("repeated calls have no short way here: no native library, or built where there is no Python.h")
    counter = Counter(plans.native)
    monkeypatch.setattr(plans, "native", counter)
    return counter


def same(first, second):
    """Results, of numbers or of bits, are equal in everything."""
    assert type(first) is type(second)
    if isinstance(first, PackedTensor):
        assert first.format == second.format
        first, second = first.words, second.words
    assert torch.equal(first, second)
    assert first.stride() == second.stride()
    assert first.dtype == second.dtype


def refused_in_the_same_words(plans, call, changes, error):
    """A bad call after good ones is refused like one that is the first."""
    with pytest.raises(error) as after:
        call(**changes)
    plans.known.clear()
    with pytest.raises(error) as before:
        call(**changes)
    assert str(after.value) == str(before.value)
