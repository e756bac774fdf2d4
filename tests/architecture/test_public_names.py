"""What ``import basisconv_kernels`` offers: every name documented, every error that a call may raise among them."""

from __future__ import annotations

import inspect

import pytest

import basisconv_kernels
from basisconv_kernels.core import errors


@pytest.mark.parametrize("name", basisconv_kernels.__all__)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(basisconv_kernels, name))


def test_the_list_is_what_was_imported():
    """Submodules aside, nothing is public by accident."""
    found = {
        name
        for name, value in vars(basisconv_kernels).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert found == set(basisconv_kernels.__all__)
    assert basisconv_kernels.__all__ == sorted(basisconv_kernels.__all__)


def test_every_error_is_public():
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised <= set(basisconv_kernels.__all__)
