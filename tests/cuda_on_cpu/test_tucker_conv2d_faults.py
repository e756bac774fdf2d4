"""Faults planted into the one-pass kernel of ``tucker_conv2d``: the checks of its tests must find each of them."""

from __future__ import annotations

import pytest

from basisconv_kernels import testing
from tests.cuda_on_cpu import building
from tests.cuda_on_cpu.emulated import H200
from tests.cuda_on_cpu.emulated_tucker import EmulatedTucker
from tests.cuda_on_cpu.test_tucker_conv2d_one_pass import ONE, ONE_CORE, case, outside_is_zero

pytestmark = pytest.mark.xdist_group("tucker_faults")

KERNEL, COPIES, PLAN = "tucker_conv2d.cu", "tucker_conv2d_copies.h", "tucker_conv2d_plan.h"
BARRIER, SHARES = "__syncthreads();\n  }\n};", "__syncthreads();  // both shares of Z"
WAITS = ("cp_async_wait<1>();", "cp_async_wait<0>();")
PLACES = "return jobs < ahead + 1 ? jobs : ahead + 1;"
T_ROW = "t_row = lane % 8 + lane / 8 % 2 * 8"
UNSWIZZLED = "swizzled(row * bytes + within, bytes);"
COUNT = "if (own_pixel >= count) continue;"
FAULTS = {
    "no barrier between jobs": (COPIES, BARRIER, f"if (planted != #) {BARRIER}"),
    "no wait for copies two jobs ahead": (COPIES, WAITS[0], f"if (planted != #) {WAITS[0]}"),
    "no wait for copies one job ahead": (COPIES, WAITS[1], f"if (planted != #) {WAITS[1]}"),
    "no barrier before stage 2": (KERNEL, SHARES, f"if (planted != #) {SHARES}"),
    "a place too few": (PLAN, PLACES, PLACES.replace("return jobs", "if (planted == #) return 1; return jobs")),
    "u_in not transposed": (KERNEL, T_ROW, T_ROW.replace("lane / 8 % 2", "(planted == # ? 0 : lane / 8 % 2)")),
    "weights left swizzled": (COPIES, UNSWIZZLED, f"(planted == # ? row * bytes + within : {UNSWIZZLED[:-1]});"),
    "the wrong share of the filters": (KERNEL, "part = share * most", "part = (planted == # ? 0 : share) * most"),
    "a slab of the core forgotten": (
        KERNEL, "pitch + slab * kSlab * 2;", "pitch + (planted != #) * slab * kSlab * 2;",
    ),
    "sums of two groups of pixels mixed": (
        KERNEL, "if (slab == 0) {", "if (slab == 0 && (planted != # || job == 0)) {",
    ),
    "the second group over the first": (
        KERNEL, "pixel = first + own_pixel;", "pixel = (planted != #) * first + own_pixel;",
    ),
    "a pixel of M never written": (KERNEL, COUNT, COUNT.replace("count", "count - (planted == #)")),
    "M outside of the image": (
        KERNEL, "const bool inside = y >= 0", "const bool inside = (planted == # || y >= 0)",
    ),
    "halves of wide coefficients confused": (
        COPIES, "side = column / kSlab * packed", "side = (planted != #) * column / kSlab * packed",
    ),
    "chunks fetched over each other": (
        COPIES, "end - begin, kChunk, plan.core_rows", "planted == # ? 1 : end - begin, kChunk, plan.core_rows",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted_chain")
    folder = building.plant(root, FAULTS.values())
    path = folder / KERNEL  # bfloat16 alone: half of the compiling
    path.write_text(path.read_text(encoding="utf-8").replace("launch_ranks<f16>", "launch_ranks<bf16>"), "utf-8")
    sources = [folder / "basis_conv2d.cu", path, root / "tests" / "cuda_on_cpu" / "tucker_module.cpp"]
    return building.build("basisconv_planted_chain", sources, "-DPLANTED", root=root)


CASES = (
    case("slabs", "1 264 9 9 40 24 136 3 3", padding=ONE, bias=True),
    case("a_window_in_groups", "1 72 17 17 20 20 24 3 3", padding=ONE, stride=(2, 2)),
    case("slabs_of_the_core", "1 72 7 7 100 100 40 3 3", padding=ONE),
)
SMALL = {**H200, "shared_bytes": 104 * 1024}


def findings(module):
    """What the checks say, case by case."""
    for one, device in ((CASES[0], H200), (CASES[0], SMALL), (CASES[1], ONE_CORE), (CASES[2], ONE_CORE)):
        try:
            testing.check_tucker(one, EmulatedTucker(module, device))
        except (AssertionError, RuntimeError) as report:
            yield str(report).splitlines()[0]
    try:
        outside_is_zero(EmulatedTucker(module, H200), float("inf"))
    except AssertionError:
        yield "M of pixels outside"


def test_without_a_fault_nothing_is_found(planted):
    planted.plant(0)
    assert list(findings(planted)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    planted.plant(list(FAULTS).index(fault) + 1)
    assert next(findings(planted), None)
