"""The small parts of the demo: progress, weights, charts for many layers."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from basisconv_kernels.compression.named import load_weights
from basisconv_kernels.demo import models, plots, results
from basisconv_kernels.demo.page import count, milliseconds, points, size
from basisconv_kernels.demo.progress import Stages
from basisconv_kernels.demo.run import Settings, run_demo


def test_stages_off_a_terminal_are_lines(capsys):
    stream = io.StringIO()
    with Stages(2, Console(file=stream, highlight=False)) as stages:
        with stages.stage("first", "[thing]") as advance:
            advance(0.5)
        with stages.stage("second"):
            pass
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith(" 1/2 first [thing], ")
    assert lines[1].startswith(" 2/2 second, ")
    assert list(stages.seconds) == ["first", "second"]
    assert capsys.readouterr().out == ""


def test_stages_on_a_terminal_draw_a_bar():
    stream = io.StringIO()
    with (
        Stages(1, Console(file=stream, force_terminal=True, width=80)) as stages,
        stages.stage("work") as advance,
    ):
        advance(0.5)
    assert "work" in stream.getvalue()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(116_057_088), "116.1 M"), (count(999), "999"), (size(1_383_056), "1.38 MB"), (size(849_000), "849 kB"),
        (milliseconds(0.2999), "0.300"), (milliseconds(1.184), "1.18"), (points(-0.0069), "−0.69"),
        (points(0.001), "+0.10"),
    ],
)  # fmt: skip
def test_numbers_for_people(shown, expected):
    assert shown == expected


def test_networks_and_images_must_fit(tmp_path):
    with pytest.raises(ValueError, match="use cifar10"):
        run_demo(Settings(tmp_path, network="resnet20"))
    with pytest.raises(ValueError, match="carries weights for small-vgg on fashion-mnist only"):
        models.weights_file("cifar10", "resnet20", None)
    with pytest.raises(ValueError, match="network must be one of"):
        models.build("vgg19", 3)


def test_shipped_weights_fit():
    network = models.build("small-vgg", 1)
    load_weights(network, models.weights_file("fashion-mnist", "small-vgg", None))
    assert torch.isfinite(network.classifier.weight).all()


def test_charts_of_many_layers(quick_run):
    """ResNet-56 has 54 replaced layers: no legend of names, and the bars get room."""
    level = quick_run.results["levels"][0]
    spectrum = quick_run.results["spectra"][0]
    layers = [{**level["layers"][1], "name": f"layer{number}"} for number in range(54)]
    many = {
        **quick_run.results,
        "levels": [{**level, "layers": layers}],
        "spectra": [{**spectrum, "name": f"layer{number}"} for number in range(54)],
    }
    charts = plots.all_charts(many)
    assert "layer53" not in charts["spectra"]
    assert "layer53" in charts["layers"]


def test_remarks_follow_from_the_numbers(quick_run):
    found = {**quick_run.results, "quick": False}
    found["timing"] = {**found["timing"], "disturbed_samples": 0.5}
    assert "in 50 % of the samples" in results.remarks(found)[0]
    found["timing"] = {**found["timing"], "disturbed_samples": 0.0}
    assert not any("busy" in remark for remark in results.remarks(found))
    assert results.disturbance(found) == ""
    about = {**found["environment"], "native_library": "not built"}
    assert "ran as two convolutions too" in results.remarks({**found, "environment": about})[0]
    about = {**found["environment"], "native_library": {}, "variables": {"BASISCONV_BACKEND": "reference"}}
    assert "BASISCONV_BACKEND=reference was set" in results.remarks({**found, "environment": about})[0]
    level = found["levels"][0]
    slow = {**level["fused"]["speed_up"]["1"], "median": 0.9}
    found["levels"] = [{**level, "fused": {**level["fused"], "speed_up": {**level["fused"]["speed_up"], "1": slow}}}]
    assert any("One image at a time gains less: 0.90×" in remark for remark in results.remarks(found))
