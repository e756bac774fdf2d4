"""Every kernel compiled for GPUs that are not there: no spills, the right instructions, the reviewed resources.

``compiled.json`` holds registers and shared memory by version of Triton; a change is a change to review. Write it with
``python -m tests.triton.test_ahead_of_time``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton

from basisconv_kernels.triton_kernels import configs
from tests.triton import ahead_of_time
from tests.triton.rows import ROWS, Row

FEWEST_OF_WGMMA = 64  # rows: with fewer pixels the second stage, 1/9 of the work at 3×3, runs on the older instruction
REVIEWED = Path(__file__).with_name("compiled.json")
# One of each path and device in the ordinary run: a compilation takes seconds.
SHORT = {
    ("descriptors half 64×64×64×64 4 warps 3 stages", 90),
    ("descriptors half 16×128×128×64 4 warps 5 stages", 90),
    ("descriptors2 half 128×64×64×64 4 warps 4 stages", 90),
    ("pointers half 64×64×64×64 4 warps 4 stages", 80),
    ("pointers tf32 64×16×32×32 4 warps 3 stages", 89),
}


def targets(row: Row) -> list[int]:
    """The devices that a row is compiled for: with and without a tensor memory unit."""
    if row.path == "pointers":
        return [80, 89, 90]
    return [90, 100] if row.path == "descriptors" and row.arithmetic == configs.HALF else [90]


EVERYTHING = [(row, capability) for row in ROWS for capability in targets(row)]
# Stride 2 differs in the addresses of a load alone: it has to compile and to hold the rules, its numbers are not kept.
KEPT = [(row, capability) for row, capability in EVERYTHING if row.path != "descriptors2"]


def parameters():
    return [
        pytest.param(row, at, id=f"{row} sm_{at}", marks=[] if (str(row), at) in SHORT else [pytest.mark.full])
        for row, at in EVERYTHING
    ]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compile here and now, into a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.mark.parametrize(("row", "capability"), parameters())
def test_compiled(row, capability):
    made = ahead_of_time.forward(row, capability)
    counts = made.instructions
    assert made.stack == 0
    assert "LDL" not in counts
    assert "STL" not in counts
    assert made.registers * 32 * row.tile.warps <= ahead_of_time.REGISTERS
    assert made.shared <= ahead_of_time.SHARED[capability]
    if row.arithmetic == configs.FLOAT32:
        assert counts["FFMA"] > 0
    elif capability == 90 and row.path != "pointers":
        assert counts["HGMMA"] > 0
        assert counts["UTMALDG"] > 0
        assert ("HMMA" in counts) == (row.tile.BM < FEWEST_OF_WGMMA)
    elif capability in (80, 89):
        assert counts["HMMA"] > 0
        assert counts["LDSM"] > 0
    reviewed = json.loads(REVIEWED.read_text("utf-8")).get(triton.__version__, {})
    if reviewed and (row, capability) in KEPT:
        assert reviewed[f"{row} sm_{capability}"] == {"registers": made.registers, "shared": made.shared}


TWO_SCALARS = 8  # bytes
WORST = ("multiples of 16", "odd sizes, nchw, 16 basis filters")


def short(name, names):
    return pytest.param(name, id=name, marks=[] if name in names else [pytest.mark.full])


@pytest.mark.parametrize("form", [short(form, ("compact",)) for form in ahead_of_time.FORMS])
def test_every_form_of_the_forward_kernel_compiles(form):
    tile = configs.Tile(64, 16, 32, 32, 4, 3)
    made = ahead_of_time.forward_pointers(configs.HALF, tile, 90, **ahead_of_time.FORMS[form])
    assert made.stack == 0


@pytest.mark.parametrize("arithmetic", [short(kind, (configs.HALF,)) for kind in configs.GRADIENTS])
@pytest.mark.parametrize("name", [short(name, ("coefficients", "basis")) for name in ahead_of_time.GRADIENTS])
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.full), 90])
@pytest.mark.parametrize("form", [short(form, WORST) for form in ahead_of_time.GRADIENT_FORMS])
def test_every_gradient_kernel_compiles(name, arithmetic, capability, form):
    """In no layout may registers spill: the one that spilled 2 kB a thread was wrong on an H200, and only there."""
    made = ahead_of_time.gradient(name, arithmetic, capability, form)
    assert made.stack <= TWO_SCALARS
    assert made.shared <= ahead_of_time.SHARED[89]
    if arithmetic != configs.FLOAT32:
        whole_warp_groups = capability == 90 and arithmetic == configs.HALF and form == "multiples of 16"
        wanted = {"HGMMA"} if whole_warp_groups else {"HGMMA", "HMMA"}
        assert wanted & made.instructions.keys()


def test_the_reviewed_file_names_every_row_and_no_other():
    for version, rows in json.loads(REVIEWED.read_text("utf-8")).items():
        assert set(rows) == {f"{row} sm_{capability}" for row, capability in KEPT}, version


def test_the_short_ones_exist():
    assert {(str(row), capability) for row, capability in EVERYTHING} >= SHORT


def write() -> None:
    """Compile everything with the Triton that is installed, and put its numbers into the reviewed file."""
    reviewed = json.loads(REVIEWED.read_text("utf-8")) if REVIEWED.exists() else {}
    found = {}
    for row, capability in KEPT:
        made = ahead_of_time.forward(row, capability)
        found[f"{row} sm_{capability}"] = {"registers": made.registers, "shared": made.shared}
        print(f"{row} sm_{capability}: {made}", flush=True)
    reviewed[triton.__version__] = found
    REVIEWED.write_text(json.dumps(reviewed, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write()
