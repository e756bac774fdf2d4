"""What a GPU run leaves and takes up again: its archive, and the rows that are kept of a device."""

from __future__ import annotations

import tarfile

import pytest

from bench.gpu import facts, keep
from bench.gpu.archive import Archive, take_up
from bench.gpu.journal import PASSED, Journal


def test_an_archive_is_taken_up_by_the_next_run(tmp_path):
    earlier = Journal(tmp_path / "first" / "bench.jsonl")
    earlier.end("a", PASSED)
    (tmp_path / "first" / "log.txt").write_text("words")
    packed = Archive(tmp_path / "first", tmp_path / "out", "gpu-bench").pack()
    with tarfile.open(packed) as archive:
        assert archive.getnames() == ["bench.jsonl", "log.txt"]
    later = Journal(tmp_path / "second" / "bench.jsonl")
    later.end("b", PASSED)
    assert take_up(packed, later.path.parent) == 1
    assert take_up(packed, later.path.parent) == 0, "once is enough"
    assert list(later.last()) == ["a", "b"]
    (tmp_path / "no.tar.gz").write_text("nothing")
    with pytest.raises(ValueError, match="is no archive of an earlier run"):
        take_up(tmp_path / "no.tar.gz", tmp_path)


def test_kept_rows_are_taken_up_where_our_sources_do_not_matter(tmp_path):
    about = {"device": {"name": "A card", "capability": "9.0"}, "versions": {"torch": "2.11", "triton": "3.6"}}
    row = {"status": "passed", "sources": "old", "layer": "a", "graph_cold": {"median": 2.0}}
    rows = [
        {**row, "key": f"a {engine}", "engine": engine, **more}
        for engine, more in {"dense": {}, "cuda": {}, "two_step": {"status": "failed"}}.items()
    ]
    folder = tmp_path / "a-card"
    folder.mkdir()
    head = {"format": keep.FORMAT, "kind": "bench", **about, "sources": "old"}
    (folder / "bench.json").write_text(keep.text_of(head, rows))
    run = tmp_path / "run" / "bench"
    assert take_up(folder, run) == 2
    assert take_up(folder, run) == 0, "once is enough"
    journal = Journal(run / "bench.jsonl")
    now = {**about, "sources": "new"}
    done = journal.done()
    assert ("a dense", facts.stamp(now, ours=False)) in done
    assert ("a cuda", facts.stamp(now, ours=True)) not in done
    assert ("a cuda", facts.stamp({**now, "sources": "old"}, ours=True)) in done
    assert journal.last()["a dense"]["data"]["graph_cold"] == {"median": 2.0}
    (again,) = keep.keep([run], tmp_path / "results")
    assert {row["key"]: row for row in keep.read(again)["rows"]} == {row["key"]: row for row in rows[:2]}
    with pytest.raises(ValueError, match="holds no rows of a GPU"):
        take_up(tmp_path, run)
