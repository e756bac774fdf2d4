"""Faults planted into the sm_90a kernel of ``binary_conv2d``: the checks of the other file must find each."""

from __future__ import annotations

import pytest

from basisconv_kernels import testing
from tests.cuda_on_cpu import building
from tests.cuda_on_cpu.emulated_binary import EmulatedBinary
from tests.cuda_on_cpu.test_binary_conv2d import case
from tests.cuda_on_cpu.test_binary_conv2d_sm90a import ONE_CORE

pytestmark = pytest.mark.xdist_group("binary_faults")

SM90A, SLABS = "binary_conv2d_sm90a.cu", "binary_conv2d_sm90a_slabs.cu"
STORE, PLAN, PACKING = "binary_conv2d_sm90a_store.h", "binary_conv2d_sm90a.h", "binary_conv2d_problem.h"
REUSED = "__syncthreads();  // nobody reads the band"
LANDED = "__syncthreads();  // the band"
FENCE = "fence_proxy_async();"
ROW = "wgmma_wait<1>();  // the row before"
UNIT = "wgmma_wait<0>();  // all of this unit"
LAST = "wgmma_wait<0>();  // the sums"
FILLED = "inside >> b & 1 ? complement(signs[b], ones) : filled;"
MADE = "__syncthreads();  // the barriers"
BAND = "__syncthreads();  // the band is"
FREE = "__syncthreads();  // nobody reads the band"
COPIES = "cp_async_wait<0>();"
FILTERS = "if (r == 0) bar_wait"
SLAB = "wgmma_wait<0>();  // all of the slab"
LINE = "wgmma_wait<1>();  // the row before"
SUMS = "wgmma_wait<0>();  // the sums"
SCALED = "if constexpr (scaled) values[e] *= factor[pixel];"
FAULTS = {
    "no barrier before the band is written again": (SM90A, REUSED, f"if (planted != #) {REUSED}"),
    "no barrier before the band is read": (SM90A, LANDED, f"if (planted != #) {LANDED}"),
    "filters not made visible": (SM90A, FENCE, f"if (planted != #) {FENCE}"),
    "fragments overwritten": (SM90A, ROW, f"if (planted != #) {ROW}"),
    "fragments of the unit before overwritten": (SM90A, UNIT, f"if (planted == #) wgmma_wait<1>(); else {UNIT}"),
    "sums read too early": (SM90A, LAST, f"if (planted != #) {LAST}"),
    "the complement of padding counts": (SM90A, FILLED, FILLED.replace("? com", "|| planted == # ? com")),
    "padding with one forgotten": (SM90A, "p.padding_value == 1 ?", "p.padding_value == 1 && planted != # ?"),
    "padding with minus one forgotten": (SM90A, "p.padding_value == -1 ?", "p.padding_value == -1 && planted != # ?"),
    "a tail of channels counts": (SM90A, "if (!whole) ones[b] =", "if (!whole && planted != #) ones[b] ="),
    "a tail of half a unit counts": (SM90A, "if (!whole) {", "if (!whole && planted != #) {"),
    "a tap too many": (SM90A, "|| tap >= taps) {", "|| (tap >= taps && planted != #)) {"),
    "the second tap of a step misplaced": (SM90A, "half ? high % 3", "half && planted != # ? high % 3"),
    "the complement taken for the signs": (
        SM90A, "a_lane += half * plan", "a_lane += (planted == # ? 0 : half) * plan",
    ),
    "the next image misplaced": (
        SM90A, "images * plan.image_rows.by + (y",
        "(planted != #) * images * plan.image_rows.by + (y",
    ),
    "rows of the next image misplaced": (PLAN, "n = start.n + images", "n = start.n + (planted == # ? 0 : images)"),
    "taps beyond the border count": (
        SM90A, "from + i * dilation < size", "from + i * dilation < size + (planted == #)",
    ),
    "pixels of the wrong lanes": (
        SM90A, "half_of_none, lane / 4 + pixel * 8",
        "half_of_none, lane / 4 + (planted == # ? 0 : pixel * 8)",
    ),
    "a row of the band too few": (
        PLAN, "const int64_t rows = (lines - 1)",
        "const int64_t rows = (lines - 1 - (planted == # && lines > 1))",
    ),
    "filters in another order": (
        PACKING, "n / 2 % 4 * 8 + n / 8 % 4 * 2",
        "(planted == # ? n / 8 % 4 * 8 + n / 2 % 4 * 2 : n / 2 % 4 * 8 + n / 8 % 4 * 2)",
    ),
    "bytes change places once only": (
        STORE, "lane & 1 ? 0x3715 : 0x6240", "planted == # ? 0x3210 : lane & 1 ? 0x3715 : 0x6240",
    ),
    "a flipped threshold off by one": (STORE, "flipped ? 1 : bound & 1", "flipped && planted != # ? 1 : bound & 1"),
    "an odd threshold rounded down": (STORE, "? 1 : bound & 1", "? 1 : planted == # ? 0 : bound & 1"),
    "a pixel's factor forgotten": (STORE, SCALED, SCALED.replace("(scaled) v", "(scaled) if (planted != #) v")),
    "filters beyond the last written": (
        STORE, "if (k + i * 4 < p.K) to[i]", "if (k + i * 4 < p.K - 8 * (planted == #)) to[i]",
    ),
    "slabs: no barrier before the barriers are used": (SLABS, MADE, f"if (planted != #) {MADE}"),
    "slabs: no barrier before the band is read": (SLABS, BAND, f"if (planted != #) {BAND}"),
    "slabs: no barrier before the band is written again": (SLABS, FREE, f"if (planted != #) {FREE}"),
    "slabs: the band's copies not waited for": (SLABS, COPIES, f"if (planted != #) {COPIES}"),
    "slabs: filters not waited for": (SLABS, FILTERS, FILTERS.replace("r == 0", "r == 0 && planted != #")),
    "slabs: the filters of a later slab not waited for": (
        SLABS, "bar_wait(landed + slab, 0)", "bar_wait(landed + (planted == # ? 0 : slab), 0)",
    ),
    "slabs: bytes that nobody announced": (
        SLABS, "plan.filter_bytes() / plan.slabs)", "plan.filter_bytes() / plan.slabs - 16 * (planted == #))",
    ),
    "slabs: fragments of the slab before overwritten": (SLABS, SLAB, f"if (planted != #) {SLAB}"),
    "slabs: fragments of the row before overwritten": (SLABS, LINE, f"if (planted != #) {LINE}"),
    "slabs: sums read too early": (SLABS, SUMS, f"if (planted != #) {SUMS}"),
    "slabs: the complement of padding counts": (
        SLABS, "& spread(inside[i % 2], r * rows + s)", "& (spread(inside[i % 2], r * rows + s) | -(planted == #))",
    ),
    "slabs: the taps of another pixel": (SLABS, "spread(inside[i % 2]", "spread(inside[planted == # ? 0 : i % 2]"),
    "slabs: a tail of channels counts": (SLABS, "& real[i / 2]", "& (real[i / 2] | -(planted == #))"),
    "slabs: both units taken for the first": (SLABS, "lines + lane / 16", "lines + (planted != #) * lane / 16"),
    "slabs: padding with one forgotten": (SLABS, "p.padding_value == 1;", "p.padding_value == 1 && planted != #;"),
    "slabs: padding that counts, taken for none": (
        SLABS, "p.padding_value == 0 ? all", "p.padding_value == 0 || planted == # ? all",
    ),
    "slabs: ones of four lanes not added up": (
        SLABS, "ones[pixel] += __shfl_xor_sync(~0u, ones[pixel], 2)",
        "ones[pixel] += planted == # ? 0 : __shfl_xor_sync(~0u, ones[pixel], 2)",
    ),
    "slabs: the next image misplaced": (
        SLABS, "images * plan.image_rows.by + (y", "(planted != #) * images * plan.image_rows.by + (y",
    ),
    "slabs: filters from the middle of a tile taken for its first": (
        SLABS, "first % 64 * kUnitBytes", "(planted == # ? 0 : first % 64) * kUnitBytes",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted_bits_of_hopper")
    folder = building.plant(root, FAULTS.values())
    sources = [folder / "bitpack.cu", *sorted(folder.glob("binary_conv2d*.cu"))]
    module = root / "tests" / "cuda_on_cpu" / "binary_module.cpp"
    return building.build("basisconv_planted_hopper_bits", [*sources, module], "-DPLANTED", root=root)


CASES = (
    case("units", "5 256 7 7 40 3 3"),
    case("pairs", "3 64 7 7 72 3 3"),
    case("tail", "2 100 5 6 40 3 3", padding_value=-1),
    case("half_a_tail", "2 50 5 6 40 3 3", padding_value=1),
    case("pointwise", "2 256 5 6 40 1 1", padding=(1, 0, 1, 0)),
)


SLABS_CASES = (
    case("two_slabs", "5 384 7 7 72 3 3"),
    case("tail", "2 500 5 6 40 3 3", padding_value=1),
    case("padding_with_minus_one", "2 256 5 6 40 3 3", padding_value=-1),
)


def findings(module, slabs):
    """What the checks say, case by case, in small blocks and in large ones that go on for several rounds."""
    for one in SLABS_CASES if slabs else CASES:
        for plan in ((32, 1, True), (64, 3, True)) if slabs else ((32, 1, False), (128, 3, False)):
            try:
                testing.check_binary(one, EmulatedBinary(module, ONE_CORE, plan=plan))
            except (AssertionError, RuntimeError) as report:
                yield str(report).splitlines()[0]


@pytest.mark.parametrize("slabs", [False, True], ids=["", "slabs"])
def test_without_a_fault_nothing_is_found(planted, slabs):
    planted.plant(0)
    assert list(findings(planted, slabs)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    planted.plant(list(FAULTS).index(fault) + 1)
    assert next(findings(planted, FAULTS[fault][0] == SLABS), None)
