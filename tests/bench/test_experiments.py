"""The results page says what the rows say; the experiments run, resume and agree with themselves."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("matplotlib")

from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.demo import data
from bench.experiments import report, setting
from bench.experiments import run as module
from bench.experiments.table import TABLE, Experiment, Stage


def test_the_page_is_that_of_the_rows():
    page = report.PAGE.read_text(encoding="utf-8")
    made = page.partition(report.START)[2].partition(report.END)[0]
    assert made.strip() == report.text(report.read(report.ROWS), report.read(report.LATENCY)).strip()


def test_rows_carry_what_a_reader_needs():
    rows = report.read(report.ROWS)
    assert rows
    for row in rows:
        assert {"device", "data", "seed", "git", "versions", "threads", "macs", "test_accuracy"} <= set(row)
        assert row["git"]["dirty"] is False
        assert not row["shortened"]
        for stage in row.get("stages", ()):
            best = max(epoch["validation"] for epoch in stage["curve"])
            assert stage["validation_accuracy"] == best
            assert stage["curve"][stage["chosen_epoch"] - 1]["validation"] == best


def test_names_are_told_apart():
    assert len({experiment.name for experiment in TABLE}) == len(TABLE)
    names = {experiment.name for experiment in TABLE}
    assert all(experiment.start in names | {"published", "random"} for experiment in TABLE)


@pytest.fixture
def few_images(monkeypatch):
    """CIFAR-10's place is taken by noise, and the network by a narrow one."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> data.Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return data.Split(images, torch.randint(10, (count,), generator=generator))

    images = data.ImageSet("noise", split(24), split(12), (0.5,) * 3, (0.25,) * 3)
    held_back = split(12)
    monkeypatch.setattr(setting, "cifar10", lambda: (images, held_back))
    monkeypatch.setattr(setting, "NARROW_VGG", (4, 8))
    monkeypatch.setattr(module, "BATCH", 8)


def test_an_experiment_gives_a_row_and_the_same_one_again(few_images, tmp_path):
    experiment = Experiment(
        "trial", "none", "small-vgg", "random", (Stage(None, 1, 0.01), Stage(TuckerConfig(fraction=0.5), 2, 0.01))
    )
    rows = [module.run(experiment, 1, tmp_path, made) for made in (tmp_path / "a", tmp_path / "b") if not made.mkdir()]
    assert json.loads(json.dumps(rows[0])) == rows[0]
    assert [len(stage["curve"]) for stage in rows[0]["stages"]] == [1, 2]
    assert rows[0]["macs"][1] < rows[0]["macs"][0]
    for key in ("test_accuracy", "start_test_accuracy", "macs", "learnable", "file_bytes"):
        assert rows[0][key] == rows[1][key]
    again = module.run(experiment, 1, tmp_path, tmp_path / "a")  # from its finished checkpoints
    assert again["test_accuracy"] == rows[0]["test_accuracy"]
