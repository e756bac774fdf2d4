"""The Triton kernels of bits compiled for GPUs that are not there: no spills, matrix instructions, ``popc``."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import bits_configs, configs
from tests.triton import ahead_of_time
from tests.triton import bits_ahead_of_time as bits

CAPABILITIES = (80, 90)
TWO_SCALARS = 8  # bytes


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compile here and now, into a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(ahead_of_time, "INSTRUCTIONS", (*ahead_of_time.INSTRUCTIONS, "POPC", "STS", "PRMT"))
        yield


def table(capability):
    return bits_configs.HOPPER_PRODUCTS if capability >= 90 else bits_configs.PRODUCTS


def no_spills(made, capability, warps):
    assert made.stack <= (0 if capability >= 90 else TWO_SCALARS)
    assert made.instructions.get("LDL", 0) <= made.stack // 4
    assert made.registers * 32 * warps <= ahead_of_time.REGISTERS
    assert made.shared <= ahead_of_time.SHARED[capability if capability >= 90 else 89]


def every(forms, capability, kind, short):
    """Each form on each row of a table; the ordinary run has some forms on the first row."""
    for form in forms:
        most = bits.MOST_SUMS.get(form, bits_configs.LARGE)
        for i, tile in enumerate(
            bits_configs.fitted(row, 64, most) for row in table(capability)[kind] if most >= row.BM * row.BL
        ):
            ordinary = form in short and i == 0
            yield pytest.param(
                form, tile, capability, id=f"{form} {'×'.join(map(str, tile))} sm_{capability}",
                marks=[] if ordinary else [pytest.mark.full],
            )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "tile", "capability"),
    [p for at in CAPABILITIES for p in every(bits.REAL, at, configs.HALF, ("ternary, two scales", "stacked"))],
)
def test_products_of_real_numbers(form, tile, capability):
    made = bits.product(configs.HALF, tile, capability, bits.REAL[form])
    no_spills(made, capability, tile.warps)
    if capability == 90:
        assert made.instructions["HGMMA"] > 0
        assert "HMMA" not in made.instructions
    else:
        assert made.instructions["HMMA"] > 0


@pytest.mark.parametrize("form", ["ternary", pytest.param("stacked", marks=pytest.mark.full)])
def test_filters_of_a_hopper_go_from_bits_into_the_registers_of_the_instruction(form):
    """Unpacked filters never pass shared memory: what is stored there are words, and the result on its way out."""
    tile = bits_configs.HOPPER_PRODUCTS[configs.HALF][0]
    made = bits.product(configs.HALF, tile, 90, bits.REAL[form])
    filters_of_a_thread = tile.BL * tile.BK * 2 // (32 * tile.warps * 16)  # stores of 16 bytes
    assert made.instructions.get("STS", 0) < filters_of_a_thread


@pytest.mark.parametrize(
    ("kind", "form", "tile", "capability"),
    [
        pytest.param(kind, *p.values, id=f"{kind}: {p.id}", marks=p.marks)
        for kind, forms, short in ((bits_configs.SIGNS, bits.OF_SIGNS, ("packed",)),
                                   (bits_configs.BITS, bits.OF_BITS, ("codes",)))
        for at in CAPABILITIES
        for p in every(forms, at, kind, short)
    ],
)  # fmt: skip
def test_products_of_signs_and_bits(kind, form, tile, capability):
    changes = (bits.OF_SIGNS if kind == bits_configs.SIGNS else bits.OF_BITS)[form]
    made = bits.product(configs.HALF, tile, capability, changes)
    no_spills(made, capability, tile.warps)
    assert {"HGMMA", "HMMA"} & set(made.instructions)


@pytest.mark.parametrize(
    ("arithmetic", "form", "tile", "capability"),
    [
        pytest.param(arithmetic, *p.values, id=f"{arithmetic}: {p.id}", marks=p.marks)
        for arithmetic in (configs.TF32, configs.FLOAT32)
        for at in CAPABILITIES
        for p in every(("ternary", "stacked"), at, arithmetic, ("ternary",) if at == 90 else ())
    ],
)
def test_products_of_float32(arithmetic, form, tile, capability):
    made = bits.product(arithmetic, tile, capability, bits.REAL[form])
    no_spills(made, capability, tile.warps)
    if arithmetic == configs.TF32:
        assert {"HGMMA", "HMMA"} & set(made.instructions)
    else:
        assert made.instructions["FFMA"] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tile", bits_configs.COUNTS, ids=lambda tile: f"{tile.BM}×{tile.BL}")
@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form in ("float", "codes") else [pytest.mark.full]) for form in bits.COUNTED],
)
def test_counts_use_the_instruction_for_them(form, tile, capability):
    """Shifts and masks become one ``popc``: as many as a step has pairs of words for each thread."""
    made = bits.counts(tile, capability, bits.COUNTED[form])
    no_spills(made, capability, tile.warps)
    assert made.instructions["POPC"] >= tile.BM * tile.BL // (32 * tile.warps) * (tile.BK // 32)


@pytest.mark.parametrize("of", ["bf16", "fp32", "i32"])
def test_packing(of):
    bound = "*i32" if of == "i32" else "*fp32"
    for changes in ({}, {"value": bound, "flip": "*i1"}, {"PLANES": 3, "CODES": True}, {"input_c": "i32"}):
        no_spills(bits.packing(90, of, **changes), 90, 4)
