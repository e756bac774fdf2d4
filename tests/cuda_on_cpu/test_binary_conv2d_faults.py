"""Faults planted into the kernels of ``binary_conv2d`` and ``bitpack``: the checks of the other file must find each."""

from __future__ import annotations

import pytest

from basisconv_kernels import testing
from tests.cuda_on_cpu import building
from tests.cuda_on_cpu.emulated_binary import EmulatedBinary
from tests.cuda_on_cpu.test_binary_conv2d import BF16, ONE_CORE, case

pytestmark = pytest.mark.xdist_group("binary_faults")

SM80, STORE, PACK, BITS = "binary_conv2d_sm80.cu", "binary_conv2d_store.h", "binary_conv2d.cu", "bitpack.cu"
BARRIER = "__syncthreads();  // this chunk has landed"
WAIT = "cp_async_wait<kStages - 2>();"
BUFFERS = "buffers = static_cast<int>(all < most ? all : most);"
LAST = "__syncthreads();  // nobody reads"
TAIL = "value = left < kWordBits ? (1u << left) - 1u : ~0u;"
STAGED = "__syncwarp();\n  }\n  // Eight neighbouring"
INSIDE = "if (y + row >= p.OH || x + column >= p.OW) continue;"
OUTSIDE = "every_factor = !good ? 1 : -p.padding_value;"
LAST_GROUP = "const bool last = lane.group == p.groups - 1;"
BYTE = "if (lane.k < p.K || (last && at < all))"
FAULTS = {
    "no barrier in the loop": (SM80, BARRIER, f"if (planted != #) {BARRIER}"),
    "no wait for copies": (SM80, WAIT, f"if (planted != #) {WAIT}"),
    "a buffer too few": (SM80, BUFFERS, f"{BUFFERS} if (planted == #) --buffers;"),
    "no barrier before the epilogue": (SM80, LAST, f"if (planted != #) {LAST}"),
    "ones of a plane not doubled": (SM80, "ones[m][i] *= 2;", "if (planted != #) ones[m][i] *= 2;"),
    "the second unit of a step misplaced": (
        SM80, "p.slab_units == 2 || layout.tap_by_tap ? half * pixels",
        "(p.slab_units == 2 || layout.tap_by_tap) && planted != # ? half * pixels",
    ),
    "neighbours of a merged pixel ignored": (
        SM80, "j / slot_words * p.dilation_w, of_group", "(planted == # ? 0 : j / slot_words * p.dilation_w), of_group",
    ),
    "bits of a group's second word ignored": (
        SM80, "return shift != 0 && at + 1", "return shift != 0 && planted != # && at + 1",
    ),
    "taps beyond the lower border": (STORE, "(size - 1 - first)", "(size - (planted != #) - first)"),
    "taps before the upper border": (
        STORE, "(-first + dilation - 1) / dilation", "(-first + dilation - 1) / dilation - (planted == #)",
    ),
    "the padding's value forgotten": (STORE, OUTSIDE, OUTSIDE.replace("-p.", "(planted != #) * -p.")),
    "a corner of the totals missing": (
        STORE, "add_totals(found, -1, totals + down.to", "if (planted != #) add_totals(found, -1, totals + down.to",
    ),
    "no barrier of the warp": (STORE, STAGED, f"if (planted != #) {STAGED}"),
    "the exchange in the staging forgotten": (
        STORE, "(from + place(first + i * next))",
        "(from + (planted == # ? (first + i * next) * 4 : place(first + i * next)))",
    ),
    "filters in the order of columns": (STORE, "N8 == 8 ? filter / 32", "N8 == 8 && planted != # ? filter / 32"),
    "ones of the wrong rows": (STORE, "all_ones[m][half * 2]", "all_ones[m][planted == # ? 0 : half * 2]"),
    "a column never written": (STORE, INSIDE, INSIDE.replace(">= p.OW", ">= p.OW - (planted == #)")),
    "words not filled up": (STORE, BYTE, "if (lane.k < p.K || (last && at < all && planted != #))"),
    "another group's bits overwritten": (STORE, LAST_GROUP, LAST_GROUP.replace("= lane", "= planted == # || lane")),
    "a flipped threshold off by one": (STORE, "bound ^ flipped", "bound ^ (planted == # ? 0 : flipped)"),
    "bits behind the last channel counted": (PACK, TAIL, TAIL.replace("left <", "planted != # && left <")),
    "totals of a filter's last column missing": (
        PACK, "s < to.S; ++s) {\n      if (k", "s < to.S - (planted == #); ++s) {\n      if (k",
    ),
    "a byte of the wrong channel": (BITS, "i % bytes * 8;", "i % bytes * 8 ^ (planted == # ? 8 : 0);"),
    "minus zero is negative": (BITS, "return x >= Value{0};", "return planted == # ? x > Value{0} : x >= Value{0};"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted_bits")
    folder = building.plant(root, FAULTS.values())
    sources = [folder / BITS, *sorted(folder.glob("binary_conv2d*.cu"))]
    module = root / "tests" / "cuda_on_cpu" / "binary_module.cpp"
    return building.build("basisconv_planted_bits", [*sources, module], "-DPLANTED", root=root)


CASES = (
    case("slabs", "1 512 17 9 64 3 3"),
    case("pairs", "1 128 9 9 72 3 3", padding_value=1),
    case("merged", "1 60 9 9 64 3 3", padding=(2, 1, 1, 2)),
    case("codes", "1 160 9 9 40 3 3", planes=2, unsigned=True),
    case("groups", "1 60 9 9 72 3 3", groups=3),
    case("real", "1 72 9 19 64 3 3", planes=0, channels_last=True),
    case("one_tap", "1 1100 9 10 40 1 1"),
)


def findings(module):
    """What the checks say, case by case."""
    kernel = EmulatedBinary(module, ONE_CORE)
    for one in CASES:
        try:
            testing.check_binary(one, kernel)
            testing.check_pack(one.at(dtype=BF16), kernel.bitpack)
        except (AssertionError, RuntimeError) as report:
            yield str(report).splitlines()[0]


def test_without_a_fault_nothing_is_found(planted):
    planted.plant(0)
    assert list(findings(planted)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    planted.plant(list(FAULTS).index(fault) + 1)
    assert next(findings(planted), None)
