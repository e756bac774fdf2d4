"""Faults planted into the kernel of ``ternary_conv2d``: the checks of the other file must find each of them."""

from __future__ import annotations

import re

import pytest

from basisconv_kernels.testing import ternary_conv2d as ternary
from tests.cuda_on_cpu import building
from tests.cuda_on_cpu.emulated import H200
from tests.cuda_on_cpu.emulated_ternary import EmulatedTernary
from tests.cuda_on_cpu.test_ternary_conv2d import case

pytestmark = pytest.mark.xdist_group("ternary_faults")

SOURCE = "ternary_conv2d_sm90a.cu"
HALO_WAIT = "if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);"
HALO_WAIT_9 = "bar_wait(halo.full + halo_at.stage, halo_at.phase);\n        const"
FILTERS_WAIT = "if (plan.resident) bar_wait(filters.full, 0);"
RING_WAIT = "if (!plan.resident) bar_wait(filters.full + filters_at.stage, filters_at.phase);"
HALO_EMPTY = "bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);"
RING_EMPTY = "bar_wait(filters.empty + filters_at.stage, filters_at.phase ^ 1);"
HALO_RELEASE_9 = "}\n        release(halo.empty + halo_at.stage);"
PREVIOUS = "wgmma_wait<1>();"
ALL_DONE = "wgmma_wait<0>();"
FACTORS = "__syncthreads();\n  if (threadIdx.x >= TernaryPlan::consumers)"
SWIZZLE = "swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2)"
FAULTS = {
    "no wait for the halo": (HALO_WAIT, f"if (planted != #) {HALO_WAIT}"),
    "no wait for the halo of nine taps": (HALO_WAIT_9, f"if (planted != #) {HALO_WAIT_9}"),
    "a fragment used too early again": ("[(tap + 1) % 3]", "[planted == # ? 2 : (tap + 1) % 3]"),
    "no wait for resident filters": (FILTERS_WAIT, f"if (planted != #) {FILTERS_WAIT}"),
    "no wait for a tile of the ring": (RING_WAIT, f"if (planted != #) {RING_WAIT}"),
    "the halo overwritten": (HALO_EMPTY, f"if (planted != #) {HALO_EMPTY}"),
    "a tile of the ring overwritten": (RING_EMPTY, f"if (planted != #) {RING_EMPTY}"),
    "the halo never released": (HALO_RELEASE_9, HALO_RELEASE_9.replace("release", "if (planted != #) release")),
    "a wgmma left running": (PREVIOUS, f"if (planted == #) wgmma_wait<2>(); else {PREVIOUS}"),
    "sums read too early": (ALL_DONE, f"if (planted != #) {ALL_DONE}"),
    "scales not waited for": (FACTORS, f"if (planted != #) {FACTORS}"),
    "fragments read without the swizzle": (SWIZZLE, f"(planted == # ? pixel * kSlab * 2 + lane / 16 * 16 : {SWIZZLE})"),
    "the filters of another part": ("const int64_t of_block = (static_cast<int64_t>(first) + i)",
                                    "const int64_t of_block = (static_cast<int64_t>(planted == # ? 0 : first) + i)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    folder = building.plant(root, [(SOURCE, *texts) for texts in FAULTS.values()])
    text = (folder / SOURCE).read_text(encoding="utf-8")  # one kind for bfloat16 is enough
    text = re.sub(r"ternary_conv2d_sm90a<T, 128,", "ternary_conv2d_sm90a<T, 64,", text)
    (folder / SOURCE).write_text(text.replace("launch_of<f16>", "launch_of<bf16>"), encoding="utf-8")
    sources = [*sorted(folder.glob("ternary_conv2d*.cu")), root / "tests" / "cuda_on_cpu" / "ternary_module.cpp"]
    return building.build("basisconv_ternary_planted", sources, "-DPLANTED", root=root)


# More slabs than buffers, parts, several tiles for a persistent block; and one tap alone.
CASES = (case("many", "1 264 10 17 136 3 3", bias=True), case("one_tap", "1 264 18 17 64 1 1"))


def findings(module):
    """What the checks say, case by case: both ways of sharing out, filters through a ring and, of one tap, resident."""
    for split_filters in (False, True):
        device = {**H200, "multiprocessors": 1}
        for one in CASES:
            try:
                ternary.check(one, EmulatedTernary(module, device, form=(split_filters, 64)))
            except (AssertionError, RuntimeError) as report:
                yield str(report).splitlines()[0]


def test_without_a_fault_nothing_is_found(planted):
    planted.plant(0)
    assert list(findings(planted)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    planted.plant(list(FAULTS).index(fault) + 1)
    assert next(findings(planted), None)
