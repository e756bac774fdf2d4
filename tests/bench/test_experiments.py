"""The results page says what the rows say; the experiments run, resume and agree with themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("matplotlib")

import basisconv_kernels as bk
from basisconv_kernels import BinaryConfig, StackedBinaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.demo import data
from bench.experiments import latency, report, setting
from bench.experiments import run as module
from bench.experiments.__main__ import _jobs
from bench.experiments.long import LONG
from bench.experiments.table import BY_NAME, TABLE, Experiment, Stage


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
    assert all(experiment.twin in (names | {None}) - {experiment.name} for experiment in TABLE)
    assert all(0 in BY_NAME[e.start].seeds for e in TABLE if e.start not in ("published", "random"))


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


@pytest.mark.parametrize("config", [BinaryConfig(), StackedBinaryConfig(splits=2, bank=0.5)], ids=["xnor", "stacked"])
def test_binary_filters_train_on_the_device_and_their_bytes_are_told(few_images, tmp_path, config):
    stage = Stage(config, 2, 0.01, optimizer="adam")
    experiment = Experiment("trial", "none", "small-vgg", "random", (stage,))
    row = module.run(experiment, 0, tmp_path, tmp_path, resident=True)
    assert row["resident"] is True
    assert row["macs"][0] == row["macs"][1]
    assert row["binary_layer_bytes"][0] == 4 * 4 * 8 * 9  # the first convolution stays dense
    assert 0 < row["binary_layer_bytes"][1] < row["binary_layer_bytes"][0] / 3
    assert row["learnable"][1] > row["parameters"][1]  # latents are learned, bits are kept
    again = module.run(experiment, 0, tmp_path, tmp_path, resident=True)
    for key in ("test_accuracy", "stages"):
        assert _timeless(again[key]) == _timeless(row[key])


def test_an_experiment_has_a_batch_of_its_own_and_its_start_as_a_teacher(few_images, tmp_path):
    stage = Stage(TuckerConfig(fraction=0.5), 1, 0.01, distill=0.5)
    taught = Experiment("trial", "none", "small-vgg", "random", (stage,), batch=6)
    row = module.run(taught, 0, tmp_path, tmp_path, resident=True)
    assert (row["batch"], row["stages"][0]["steps_an_epoch"], row["stages"][0]["distill"]) == (6, 4, 0.5)
    alone = replace(taught, name="alone", stages=(replace(stage, distill=0.0),))
    other = module.run(alone, 0, tmp_path, tmp_path, resident=True)
    assert other["stages"][0]["curve"][0]["loss"] != row["stages"][0]["curve"][0]["loss"]
    with pytest.raises(ValueError, match="resident"):
        module.run(replace(taught, name="loader"), 0, tmp_path, tmp_path, resident=False)


def test_jobs_begin_in_the_order_of_their_names_or_with_what_others_wait_for():
    named = _jobs(["vgg-quarter:1,0", "vgg-cycle", "vgg-quarter:0,2"], "5")
    assert [job.key for job in named] == [
        ("vgg-quarter", 1), ("vgg-quarter", 0), ("vgg-cycle", 5), ("vgg-quarter", 2)
    ]  # fmt: skip
    assert (named[0].after, named[2].after) == (("vgg-cycle", 0), None)
    every = [job.key for job in _jobs(None, "")]
    assert set(every) == {(e.name, seed) for e in LONG for seed in e.seeds}
    first = every[: every.index(("resnet20-quarter", 0))]
    assert {("vgg-cycle", 0), ("wide-cycle", 0), ("resnet56-spectral", 2), ("vgg-ternary", 2)} <= set(first)
    assert every.index(("wide-xnor", 0)) < every.index(("vgg-cycle", 1))
    with pytest.raises(typer.BadParameter, match="no-such"):
        _jobs(["no-such:0"], "")


def test_a_batch_and_a_teacher_of_its_own_are_told():
    row = next(row for row in report.read(report.ROWS) if row["experiment"] == "vgg-quarter")
    assert "images a step" not in report.text([row], [])
    taught = row | {"batch": 256, "stages": [row["stages"][0] | {"distill": 0.9}]}
    assert "at 0.05, 90 % of the loss by the start's answers, from vgg-cycle. 256 images a step." in report.text(
        [taught], []
    )


def test_the_page_names_the_starts_of_seeds_that_began_differently():
    row = next(row for row in report.read(report.ROWS) if row["experiment"] == "vgg-quarter")
    other = row | {"seed": 7, "start_test_accuracy": 0.5}
    assert "begin with networks" not in report.text([row, row | {"seed": 7}], [])
    assert f"begin with networks of 50.00 and {100 * row['start_test_accuracy']:.2f} %." in report.text(
        [row, other], []
    )


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key != "seconds"}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def test_the_page_tells_where_a_network_was_trained_and_what_it_is_held_against():
    rows = report.read(report.ROWS)
    twin = next(row for row in rows if row["experiment"] == "vgg-cycle-more")
    own = next(row for row in rows if row["experiment"] == "vgg-tucker-25")
    on_gpu = own | {"device": own["device"] | {"accelerator": "Some GPU"}}
    (line,) = (part for part in report.text([twin, on_gpu], []).splitlines() if part.startswith("| vgg-tucker-25 "))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[6] == "Some GPU"
    assert cells[5] == f"{100 * (own['test_accuracy'] - twin['test_accuracy']):+.2f} to vgg-cycle-more"


def test_every_seed_without_a_row_is_told():
    rows = report.read(report.ROWS)
    own = [row for row in rows if row["experiment"] == "vgg-tucker-25" and row["seed"] == 0]
    left = report.text(own, []).partition("### Not run")[2]
    assert "- vgg-tucker-25, seeds 1, 2\n" in left
    assert "- **vgg-quarter**, seeds 0, 1, 2: BasisConv" in left
    three = [own[0] | {"seed": seed} for seed in BY_NAME["vgg-tucker-25"].seeds]
    assert "vgg-tucker-25" not in report.text(three, []).partition("### Not run")[2]


def test_bytes_of_binary_layers_are_told():
    row = next(row for row in report.read(report.ROWS) if row["experiment"] == "wide-stacked")
    made = report.text([row | {"binary_layer_bytes": [1000, 8]}], [])
    assert "Its binary layers take 8 bytes in place of 1,000: ÷ 125." in made


def test_new_times_take_the_place_of_older_ones_and_leave_the_others():
    def row(batch, **ms):
        return {"network": "small-vgg", "batch": batch, "ms": {"dense": 1.0, **ms}}

    old, new = [row(1, a=2.0, b=3.0), row(16, a=4.0)], [row(1, a=5.0), row(16, a=6.0)]
    assert latency.merged(old, new) == [row(1, b=3.0), *new]
    assert latency.merged([], new) == new


def test_times_are_of_a_network_at_hand_or_of_the_conversion_alone(tmp_path):
    experiment = BY_NAME["vgg-tucker-40"]
    assert latency._network(experiment, tmp_path, tmp_path) is None
    assert latency._network(BY_NAME["resnet20-quarter"], tmp_path, tmp_path) is None
    bk.save(setting.network("small-vgg", 0), tmp_path / "vgg-cycle-0.safetensors")
    made, origin = latency._network(experiment, tmp_path, tmp_path)
    assert origin == "untrained"
    size = sum(parameter.numel() for parameter in made.parameters())
    assert size < 0.5 * sum(parameter.numel() for parameter in setting.network("small-vgg", 0).parameters())
    bk.save(made, tmp_path / "vgg-tucker-40-2.safetensors")
    found, origin = latency._network(experiment, tmp_path, tmp_path)
    assert origin == "seed 2"
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), made.parameters(), strict=True))
    assert report._timed("a", {"networks": {"a": "seed 2"}}) == "a (seed 2)"
    assert report._timed("a", {"networks": {"a": "seed 0"}}) == report._timed("a", {}) == "a"


def test_the_larger_networks_have_their_sizes_and_are_converted(tmp_path):
    for kind, macs, parameters in (("vgg16", 313.2e6, 14.72e6), ("googlenet", 1_447e6, 5.87e6)):
        made = setting.network(kind, 0).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert made(torch.randn(1, *setting.EXAMPLE[1:])).shape == (1, 10)
        assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-3)
        assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(parameters, rel=1e-3)
    bk.save(made, tmp_path / "googlenet-cycle-0.safetensors")
    pruned = module.untrained("googlenet-prune-40", tmp_path, tmp_path).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(torch.randn(1, *setting.EXAMPLE[1:]))
    assert counter.get_total_flops() / 2 == pytest.approx(0.4 * macs, rel=1e-2)


def test_the_plot_times_a_dense_network_beside_those_that_start_from_it_or_are_held_against_it():
    rows = [row for row in report.read(report.ROWS) if row["experiment"].startswith("vgg-")]
    latency_rows = [{"network": "small-vgg", "batch": 1, "ms": {"dense": 2.0, "vgg-tucker-25": 1.0}}]
    known = report.summaries(rows, latency_rows)
    found = {summary.experiment.name: report._share_of_time(summary, known) for summary in known}
    told = {name: share for name, share in found.items() if share is not None}
    assert told == {"vgg-tucker-25": 0.5, "vgg-cycle": 1.0, "vgg-cycle-more": 1.0}
