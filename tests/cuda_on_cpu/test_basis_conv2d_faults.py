"""Faults planted into the kernels of ``basis_conv2d``: the checks of the other file must find each of them.

The sources are copied, all faults are planted at once, each behind a number, and compiled together.
"""

from __future__ import annotations

import re

import pytest

from basisconv_kernels import testing
from tests.cuda_on_cpu import building
from tests.cuda_on_cpu.emulated import A100, H200, Emulated
from tests.cuda_on_cpu.test_basis_conv2d import ONE, case

pytestmark = pytest.mark.xdist_group("basis_faults")

# What is planted: file, the right text, the wrong one. "#" in a text is the number of its fault.
SM80, SM90A = "basis_conv2d_sm80.cu", "basis_conv2d_sm90a.cu"
SHARED, EXCHANGE = "basis_conv2d_epilogue.h", "basis_conv2d_exchange.h"
TAP_BARRIER = "__syncthreads();  // this step's tiles"
CHUNK_BARRIER = "__syncthreads();  // the coefficients have landed"
TAP_WAIT = "cp_async_wait<stages - 2>();"
BUFFERS = "buffers = all < 1 + ahead ? all : 1 + ahead;"
B_LANE = "swizzled(b_row * kSlab * 2 + b_column, kSlab * 2)"
STAGED_ROW = "swizzled(lane / 4 * row_bytes, row_bytes) + lane % 4 * 4"
STORED = "if (y >= left_y || x >= left_x) continue;"
STAGED = "__syncwarp();\n  // As many"
HALO_WAIT = "if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);"
HALO_WAIT_9 = "bar_wait(halo.full + halo_at.stage, halo_at.phase);\n        const"
BASIS_WAIT = "if (plan.basis_resident && slabs.count() > 0) bar_wait(basis.full, 0);"
HALO_EMPTY = "bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);"
HALO_RELEASE = "r = 0;\n          release(halo.empty + halo_at.stage);"
HALO_RELEASE_9 = "}\n        release(halo.empty + halo_at.stage);"
PREVIOUS = "wgmma_wait<1>();"
ALL_DONE = "wgmma_wait<0>();\n    previous_is_done();"
BOX_BYTES = "bar_arrive_expect(halo.full + halo_at.stage, plan.halo_box_bytes);"
SUMMED, SHOWN = "meet(summed, plan.blocks);", "meet(shown, plan.blocks);"
MORE_SUMS, OF_NOTHING = "first_of < plan.blocks;", "two_images && pixels.n >= p.N"
NEXT, SLID = "load(fragments[(n + 1) % sets], tile_at", "a[k + i][0] = above[k + i][1]"
STREAMED, STAYING = "p.taps + nth_tap(nine, n)", "plan.basis_resident ? beyond : 0"
SECOND = "!shared_out && plan.images > 1;"
DRAINED, LENT = "bar_wait(drained, phase);", "if (at_once-- <= 0) return;"
RETURNED = "release(basis.empty + stage);"
OWN_TILES = "plan.basis_resident ? p.taps * slabs.count()"
A_SWIZZLE = "swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2)"
FAULTS = {
    "sm80: no barrier in the tap loop": (SM80, TAP_BARRIER, f"if (planted != #) {TAP_BARRIER}"),
    "sm80: no wait for copies": (SM80, TAP_WAIT, f"if (planted != #) {TAP_WAIT}"),
    "sm80: no barrier before stage 2": (SM80, CHUNK_BARRIER, f"if (planted != #) {CHUNK_BARRIER}"),
    "sm80: a buffer too few": (SM80, BUFFERS, f"{BUFFERS} if (planted == #) --buffers;"),
    "sm80: B read without the swizzle": (SM80, B_LANE, f"(planted == # ? b_row * kSlab * 2 + b_column : {B_LANE})"),
    "sm80: wrong lanes staged": (
        SHARED, STAGED_ROW, STAGED_ROW.replace("+ lane % 4", "+ (planted == # ? lane % 4 ^ 1 : lane % 4)"),
    ),
    "sm80: a column never written": (
        SHARED, STORED, STORED.replace("x >= left_x", "x >= left_x - (planted == #)"),
    ),
    "sm80: no barrier of the warp": (SHARED, STAGED, f"if (planted != #) {STAGED}"),
    "sm90a: no wait for the halo": (SM90A, HALO_WAIT, f"if (planted != #) {HALO_WAIT}"),
    "sm90a: no wait for the halo of nine taps": (SM90A, HALO_WAIT_9, f"if (planted != #) {HALO_WAIT_9}"),
    "sm90a: a fragment used too early again": (SM90A, NEXT, NEXT.replace("n + 1", "n + 1 + (planted == #)")),
    "sm90a: the row above not slid": (SM90A, SLID, SLID.replace("[1]", "[planted != #]")),
    "sm90a: the basis streamed in another order": (SM90A, STREAMED, STREAMED.replace("nine", "nine && planted != #")),
    "sm90a: the resident basis in another order": (SM90A, STAYING, f"planted != # && {STAYING}"),
    "sm90a: no wait for the basis": (SM90A, BASIS_WAIT, f"if (planted != #) {BASIS_WAIT}"),
    "sm90a: the halo overwritten": (SM90A, HALO_EMPTY, f"if (planted != #) {HALO_EMPTY}"),
    "sm90a: the halo never released": (SM90A, HALO_RELEASE, HALO_RELEASE.replace("rel", "if (planted != #) rel")),
    "sm90a: the halo of nine taps never released": (
        SM90A, HALO_RELEASE_9, HALO_RELEASE_9.replace("release", "if (planted != #) release"),
    ),
    "sm90a: a wgmma left running": (SM90A, PREVIOUS, f"if (planted == #) wgmma_wait<2>(); else {PREVIOUS}"),
    "sm90a: Z read too early": (SM90A, ALL_DONE, f"if (planted != #) {ALL_DONE}"),
    "sm90a: bytes counted with the padding": (
        SM90A, BOX_BYTES, BOX_BYTES.replace("plan.halo_box", "planted == # ? plan.halo_bytes : plan.halo_box"),
    ),
    "sm90a: sums not waited for": (EXCHANGE, SUMMED, f"if (planted != #) {SUMMED}"),
    "sm90a: Z not waited for": (EXCHANGE, SHOWN, f"if (planted != #) {SHOWN}"),
    "sm90a: a block's sums twice": (EXCHANGE, "(own, first_of + i)", "(own, planted == # ? 0 : first_of + i)"),
    "sm90a: sums of the fifth block left out": (
        EXCHANGE, MORE_SUMS, MORE_SUMS.replace("plan", "(planted == # ? 1 : plan").replace(";", ");"),
    ),
    "sm90a: the last image taken for one too many": (SM90A, OF_NOTHING, f"{OF_NOTHING} - (planted == #)"),
    "sm90a: both warpgroups with one image": (SM90A, SECOND, f"planted != # && {SECOND}"),
    "sm90a: the basis not drained": (EXCHANGE, DRAINED, f"if (planted != #) {DRAINED}"),
    "sm90a: what is lent given back at once": (SM90A, LENT, f"if (planted != #) {LENT}"),
    "sm90a: what is lent never given back": (SM90A, RETURNED, f"if (planted != #) {RETURNED}"),
    "sm90a: the tiles of another block's share": (SM90A, OWN_TILES, OWN_TILES.replace("pl", "planted != # && pl")),
    "sm90a: A read without the swizzle": (
        SM90A, A_SWIZZLE, f"(planted == # ? pixel * kSlab * 2 + lane / 16 * 16 : {A_SWIZZLE})",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    folder = building.plant(root, FAULTS.values())
    for name in (SM80, SM90A):  # one kernel each, for bfloat16, is enough and a quarter of the compiling
        text = (folder / name).read_text(encoding="utf-8")
        text = re.sub(r"(launch_(?:sm80|shape)<T), \d+", r"\1, 64", text)
        text = re.sub(r"basis_conv2d_sm80<T, Q16, true, stages>", "basis_conv2d_sm80<T, Q16, false, stages>", text)
        (folder / name).write_text(text.replace("launch_filters<f16>", "launch_filters<bf16>"), encoding="utf-8")
    sources = [*sorted(folder.glob("basis_conv2d*.cu")), root / "tests" / "cuda_on_cpu" / "module.cpp"]
    return building.build("basisconv_planted", sources, "-DPLANTED", root=root)


# More slabs than buffers, more than one tap and chunk, several tiles for a persistent block; and one tap alone.
CASES = (
    case("many", "2 136 9 9 40 104 3 3", padding=ONE, bias=True),
    case("small_maps", "3 136 7 9 40 104 3 3", padding=ONE, bias=True),
    case("small_map", "1 264 7 5 40 104 3 3", padding=ONE),
    case("one_tap", "1 264 9 9 40 64 1 1"),
)


def kernels(module, variant):
    """sm_90a's with the basis streamed, and resident where it fits; whole tiles, filters shared out, other forms."""
    if variant == "sm80":
        return [Emulated(module, "sm80", A100)]
    devices = [(1, 150, {}), (1, 227, {}), (2, 227, {})]
    devices += [(2, 110, {"form": (1, 2, 1, 1)})]  # two blocks of a tile, whose sums lie in the ring
    devices += [(5, 227, {"form": (0, 5, 1, 2)})]  # five of a tile of two images
    return [
        Emulated(module, "sm90a", {**H200, "multiprocessors": n, "shared_bytes": k * 1024, **form})
        for n, k, form in devices
    ]


def findings(module, variant):
    """What the checks say about a variant, case by case."""
    for kernel in kernels(module, variant):
        for one in CASES:
            if one.name == "one_tap" and kernel.device.get("form", (1,))[0] == 0:
                continue  # there are whole warps of a cluster for 3x3 alone
            try:
                testing.check(one, kernel)
            except (AssertionError, RuntimeError) as report:
                yield str(report).splitlines()[0]


@pytest.mark.parametrize("variant", ["sm80", "sm90a"])
def test_without_a_fault_nothing_is_found(planted, variant):
    planted.plant(0)
    assert list(findings(planted, variant)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    planted.plant(list(FAULTS).index(fault) + 1)
    assert next(findings(planted, fault.split(":")[0]), None)


def test_a_forgotten_pixel_shows_as_poison(planted):
    """The report says where."""
    planted.plant(list(FAULTS).index("sm80: a column never written") + 1)
    with pytest.raises(testing.Mismatch, match=r"x=8\]: got nan"):
        testing.check(CASES[0], kernels(planted, "sm80")[0])
