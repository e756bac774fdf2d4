"""The variables: read when asked for, each documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from basisconv_kernels.core import env, registry


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_nothing_set():
    assert env.backend() is None
    assert env.log_topics() == frozenset()
    assert env.as_set() == {}


@pytest.mark.parametrize(("value", "expected"), [("cpu", "cpu"), (" cpu ", "cpu"), ("", None), ("  ", None)])
def test_backend(monkeypatch, value, expected):
    monkeypatch.setenv("BASISCONV_BACKEND", value)
    assert env.backend() == expected


def test_backend_without_the_dict_behind_the_environment(monkeypatch):
    monkeypatch.setattr(env.os, "environ", {"BASISCONV_BACKEND": "cpu"})
    assert env.backend() == "cpu"
    monkeypatch.setattr(env.os, "environ", {})
    assert env.backend() is None


def test_backend_is_read_when_asked_for(monkeypatch):
    monkeypatch.setenv("BASISCONV_BACKEND", "abacus")
    assert registry.wish() == "abacus"
    with registry.use_backend("mine"):
        assert registry.wish() == "mine"
    with registry.use_backend(None):
        assert registry.wish() is None
    monkeypatch.delenv("BASISCONV_BACKEND")
    assert registry.wish() is None


@pytest.mark.parametrize(
    ("value", "expected"), [("dispatch", {"dispatch"}), (" dispatch, x ,", {"dispatch", "x"}), (",", set())]
)
def test_log_topics(monkeypatch, value, expected):
    monkeypatch.setenv("BASISCONV_LOG", value)
    assert env.log_topics() == expected


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BASISCONV_DATA", str(tmp_path))
    assert env.data_folder() == tmp_path
    monkeypatch.setenv("BASISCONV_DATA", "~/sets")
    assert env.data_folder() == Path.home() / "sets"
    monkeypatch.delenv("BASISCONV_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.data_folder() == tmp_path / "basisconv-data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert env.data_folder() == Path.home() / ".cache" / "basisconv-data"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BASISCONV_CACHE", str(tmp_path))
    assert env.cache_folder() == tmp_path
    monkeypatch.setenv("BASISCONV_CACHE", "~/measured")
    assert env.cache_folder() == Path.home() / "measured"
    monkeypatch.delenv("BASISCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_folder() == tmp_path / "basisconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert env.cache_folder() == Path.home() / ".cache" / "basisconv"


@pytest.mark.parametrize(("value", "expected"), [("first-use", True), ("", False), ("1", False), ("off", False)])
def test_tuning_on_first_use_is_asked_for_by_its_name(monkeypatch, value, expected):
    monkeypatch.setenv("BASISCONV_TUNE", value)
    assert env.tunes_on_first_use() is expected


def test_as_set_lists_ours_only(monkeypatch):
    monkeypatch.setenv("BASISCONV_LOG", "dispatch")
    monkeypatch.setenv("SECRET", "x")
    assert env.as_set() == {"BASISCONV_LOG": "dispatch"}


def test_every_variable_that_is_read_is_listed():
    listed = {variable.name for variable in env.VARIABLES}
    read = {
        node.args[0].value
        for node in ast.walk(ast.parse(inspect.getsource(env)))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("_get", "_folder")
        and isinstance(node.args[0], ast.Constant)
    }
    assert {name for name in read if name.startswith("BASISCONV_")} <= listed


def test_every_variable_is_described():
    assert all(variable.meaning and variable.values for variable in env.VARIABLES)
    assert len({variable.name for variable in env.VARIABLES}) == len(env.VARIABLES)


def test_every_variable_stands_in_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "env.md"
    if not page.exists():
        pytest.skip("the documents are not installed with the package")
    text = page.read_text(encoding="utf-8")
    assert [variable.name for variable in env.VARIABLES if variable.name not in text] == []
