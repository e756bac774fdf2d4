"""The demo from end to end, in its quick form: files, results, page."""

from __future__ import annotations

import html.parser
import re

import pytest

from basisconv_kernels.demo import others, plots, results, summary
from basisconv_kernels.demo.timing import BATCHES

SPREAD = {"median", "q1", "q3", "least", "samples"}
VOID = {"meta", "img", "br"}


def test_it_leaves_page_results_and_networks(quick_run):
    assert quick_run.code == 0
    names = {path.name for path in quick_run.folder.iterdir()}
    files = {entry["file"] for key in ("levels", "others") for entry in quick_run.results[key]}
    assert names == {"index.html", "results.json", *files}


def test_results_follow_the_schema(quick_run):
    found = quick_run.results
    assert (found["schema"], found["version"], found["quick"]) == (results.SCHEMA, results.SCHEMA_VERSION, True)
    batches = {str(batch) for batch in BATCHES}
    assert set(found["dense"]["ms_per_image"]) == batches
    (level,) = found["levels"]
    for form in ("two_step", "fused"):
        assert 0 <= level[form]["accuracy"] <= 1
        for key in ("ms_per_image", "speed_up"):
            assert set(level[form][key]) == batches
            for spread in level[form][key].values():
                assert set(spread) == SPREAD
                assert 0 < spread["least"] <= spread["q1"] <= spread["median"] <= spread["q3"]
    assert level["macs"] < found["dense"]["macs"]
    assert level["theoretical_speed_up"] == pytest.approx(found["dense"]["macs"] / level["macs"])
    assert level["file_bytes"] == (quick_run.folder / level["file"]).stat().st_size < found["dense"]["file_bytes"]
    replaced = [layer for layer in level["layers"] if layer["replaced"]]
    assert len(replaced) == 5
    for layer in replaced:
        assert 1 <= layer["Q"] < layer["break_even"]
        assert set(layer["ms"]) == batches
        assert all(set(times) == {"dense", "two_step", "fused"} for times in layer["ms"].values())
    assert found["levels"][0]["layers"][0]["reason"] == results.FIRST_REASON
    assert {row["batch"] for row in found["gains"]} == set(BATCHES)
    assert len(found["spectra"]) == len(replaced)
    assert set(found["timing"]["memory_format"]) == batches
    for formats in found["timing"]["memory_format"].values():
        assert len(formats) == 3 + len(others.METHODS) + len(others.SHIPPED)
        assert set(formats.values()) <= {"nchw", "channels_last"}
    assert found["remarks"]
    assert found["seconds"]["total"] >= found["seconds"]["fine-tuning"]
    assert "/" not in found["network"]["weights"]


def test_the_two_forms_hold_the_same_network(quick_run):
    (level,) = quick_run.results["levels"]
    assert level["two_step"]["other_predictions_than_fused"] == 0
    assert level["two_step"]["largest_logit_difference"] < 1e-3


def test_a_new_process_verified_the_file(quick_run):
    assert quick_run.results["verification"]["passed"] is True
    (level,) = quick_run.results["levels"]
    assert level["verification"]["different"] == 0
    assert level["verification"]["images"] == quick_run.results["data"]["test_images"]


def test_other_methods_have_rows(quick_run, capsys):
    found = quick_run.results["others"]
    assert [row["name"] for row in found] == [*others.METHODS, *others.SHIPPED]
    summary.print_summary(quick_run.results)
    printed = capsys.readouterr().out
    for row in found:
        assert row["replaced"]
        assert quick_run.results["network"]["first_conv"] not in row["replaced"]
        assert row["verification"]["passed"]
        assert row["file_bytes"] == (quick_run.folder / row["file"]).stat().st_size
        assert row["name"] in quick_run.page
        assert row["name"] in printed
        assert set(row["speed_up"]) == {str(batch) for batch in BATCHES}
    tucker, ternary, stacked, xnor = found
    dense = quick_run.results["dense"]
    assert tucker["multiplies"]
    assert tucker["macs"] < dense["macs"]
    assert not ternary["multiplies"]
    assert ternary["file_bytes"] < dense["file_bytes"] / 10
    for row, share, least in ((stacked, 60, 0.85), (xnor, 25, 0.83)):
        assert row["file_bytes"] < dense["file_bytes"] / share
        assert row["accuracy"] > least  # of the first 200 test images
        assert (row["multiplies"], row["accuracy_before"], len(row["replaced"])) == (False, None, 5)


class _Outline(html.parser.HTMLParser):
    """Collects elements, ids and references, and refuses elements that are closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def outline(quick_run):
    parser = _Outline()
    parser.feed(quick_run.page)
    assert parser.open == []
    return parser


def test_page_fetches_nothing(quick_run, outline):
    assert "http:" not in quick_run.page
    assert "https:" not in quick_run.page
    assert "@import" not in quick_run.page
    assert not re.search(r"url\((?!#)", quick_run.page)
    for tag, attributes in outline.elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_page_holds_every_chart_with_a_title(quick_run, outline):
    charts = ["accuracy", "spectra", "layers", *(f"speed-{batch}" for batch in BATCHES)]
    labels = [attributes.get("aria-labelledby") for tag, attributes in outline.elements if tag == "svg"]
    assert sorted(labels) == sorted([*(f"{chart}-title" for chart in charts), "scheme-title"])
    assert [tag for tag, _ in outline.elements].count("title") == 1 + len(labels)


def test_page_ids_are_unique_and_references_resolve(outline):
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.elements:
        for name in ("aria-labelledby", "href"):
            if attributes.get(name):
                assert attributes[name].lstrip("#") in ids


def test_page_colours_follow_the_style_sheet(quick_run):
    for color, variable in plots.VARIABLES.items():
        assert color not in quick_run.page
        assert f"{variable}:" in quick_run.page
    assert quick_run.page.count("prefers-color-scheme: dark") == 1


def test_page_is_readable_without_seeing_it(outline):
    assert ("html", {"lang": "en"}) in outline.elements
    images = [attributes for tag, attributes in outline.elements if tag == "img"]
    assert len(images) >= results.FIRST_SHOWN
    assert all(attributes["alt"] for attributes in images)
    tables = [tag for tag, _ in outline.elements].count("table")
    assert tables >= 4
    regions = [attributes for _, attributes in outline.elements if attributes.get("role") == "region"]
    assert len(regions) == tables
    assert all(attributes["aria-label"] and attributes["tabindex"] == "0" for attributes in regions)


def test_page_says_that_it_was_quick(quick_run):
    assert "quick run" in quick_run.page


def test_page_and_results_name_no_folder_of_this_machine(quick_run):
    text = quick_run.page + (quick_run.folder / "results.json").read_text("utf-8")
    assert str(quick_run.folder.parent) not in text


def test_summary_names_the_layers_that_gained(quick_run, capsys):
    summary.print_summary(quick_run.results)
    printed = capsys.readouterr().out
    for layer in quick_run.results["levels"][0]["layers"]:
        assert layer["name"] in printed
    assert "Faster fused than dense at energy 0.85, batch 32" in printed
    assert "Verified: a new process" in printed
    assert "\x1b" not in printed
