"""Tests that share a build stay on one worker: with pytest 9.2, pytest-xdist 3.8 no longer sees their groups."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("a_group")
def test_groups_are_seen(request):
    if not request.config.getoption("loadgroup", False):
        pytest.skip("one process, or another way of sharing out: nothing to group")
    assert request.node.nodeid.endswith("@a_group"), "builds run twice: take pytest below 9.2 (.ci/constraints.txt)"
