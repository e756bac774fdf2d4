"""Golden values of what no execution on the CPU can see: descriptor bits, the request for a tensor map, swizzles, and
which kernel a device gets.
"""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import testing
from tests.cuda_on_cpu.emulated import A100, H200, Emulated
from tests.cuda_on_cpu.test_basis_conv2d import ONE, case

pytestmark = pytest.mark.xdist_group("cuda_on_cpu")


@pytest.mark.parametrize(
    ("address", "row_bytes", "bits"),
    [
        # 128-byte swizzle (1 << 62), 64 units of 16 bytes between groups of eight rows, leading offset 1.
        (0x400, 128, 0x4000_0040_0001_0040),
        (0x420, 128, 0x4000_0040_0001_0042),  # the next k16 step: two units on
        (0x400, 64, 0x8000_0020_0001_0040),
        (0x400, 32, 0xC000_0010_0001_0040),
        (0x38C00, 128, 0x4000_0040_0001_38C0),  # 227 KB fit the 14 bits of the address
        (0x40400, 128, 0x4000_0040_0001_0040),  # bits beyond them must not reach other fields
    ],
)
def test_wgmma_descriptor(module, address, row_bytes, bits):
    assert module.wgmma_descriptor(address, row_bytes) == bits


def test_wgmma_descriptor_of_columns(module):
    """No swizzle; 8 units of 16 bytes between groups of eight rows, 64 between two columns of 64 rows."""
    assert module.wgmma_descriptor_of_columns(0x400, 1024) == 0x0000_0008_0040_0040
    assert module.wgmma_descriptor_of_columns(0x410, 512) == 0x0000_0008_0020_0041
    assert module.wgmma_descriptor_of_columns(0x40400, 1024) == 0x0000_0008_0040_0040


def test_swizzles(module):
    """Eight rows of one 16-byte column lie in eight different ones of a 128-byte line."""
    assert [module.swizzled(row * 128, 128) - row * 128 for row in range(9)] == [0, 16, 32, 48, 64, 80, 96, 112, 0]
    assert [module.swizzled(row * 64, 64) - row * 64 for row in range(9)] == [0, 0, 16, 16, 32, 32, 48, 48, 0]
    assert [module.swizzled(row * 32, 32) - row * 32 for row in range(9)] == [0, 0, 0, 0, 16, 16, 16, 16, 0]
    for row_bytes in (32, 64, 128):
        everywhere = [module.swizzled(offset, row_bytes) for offset in range(0, 2048, 2)]
        assert sorted(everywhere) == list(range(0, 2048, 2))
        for first in range(0, 8 * row_bytes, 8 * row_bytes):
            lines = {module.swizzled(first + row * row_bytes, row_bytes) % 128 // 16 for row in range(8)}
            assert len(lines) == 8


BASE, SIZE, STRIDES, WINDOW = 0x1000, [2, 20, 30, 64], [38400, 1920, 64], (18, 10)  # N, H, W, C


def test_the_request_for_a_tensor_map(module):
    size, strides, box, reason = module.image_map(BASE, True, SIZE, STRIDES, *WINDOW)
    assert size == [64, 30, 20, 2]
    assert strides == [128, 3840, 76800]
    assert box == [64, 10, 18, 1]
    assert reason == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": 0x1008}, "does not start at a multiple of 16 bytes"),
        ({"size": [2, 0, 30, 64]}, "a side of the image is 0"),
        ({"size": [2**32 + 1, 20, 30, 64]}, "above 2^32"),
        ({"strides": [38400, 1920, 60]}, "multiples of 16 bytes apart"),
        ({"strides": [0, 1920, 64]}, "multiples of 16 bytes apart"),
        ({"strides": [2**39, 1920, 64]}, "2^40 bytes"),
        ({"window": (257, 10)}, "a side of the box is not 1..256"),
    ],
)
def test_what_the_copy_engine_cannot_serve(module, change, reason):
    of = {"base": BASE, "size": SIZE, "strides": STRIDES, "window": WINDOW, **change}
    assert reason in module.image_map(of["base"], True, of["size"], of["strides"], *of["window"])[-1]


def request(module, one, device):
    input, *weights = testing.make_inputs(one).tensors[:3]
    return Emulated(module, "", device).request(input, *weights, **one.arguments())


TURING = {"capability": 75, "shared_bytes": 64 * 1024, "multiprocessors": 72}
BLACKWELL = {**H200, "capability": 100}


@pytest.mark.parametrize(
    ("device", "changes", "variant", "reason"),
    [
        (H200, {}, "sm90a", ""),
        (A100, {}, "sm80", ""),
        (BLACKWELL, {}, "sm80", ""),  # sm_90a code runs nowhere else
        (H200, {"precise": True}, "sm80", ""),
        (H200, {"channels_last": False}, "sm80", ""),
        (H200, {"C": 60}, "sm80", ""),
        (H200, {"Q": 256}, "sm90a", ""),
        (H200, {"groups": 2, "compact": True}, "sm80", ""),
        (H200, {"groups": 2}, "none", "coefficients [K, Q/groups] only"),
        (H200, {"Q": 257}, "none", "at most 256 basis filters"),
        (H200, {"groups": 2, "compact": True, "Q": 512}, "sm80", ""),
        (TURING, {}, "none", "compute capability 8.0"),
    ],
)
def test_which_kernel_a_call_gets(module, device, changes, variant, reason):
    one = case("chosen", "1 64 9 9 16 64 3 3", padding=ONE).at(**changes)
    chosen, why = module.variant(request(module, one, device))
    assert chosen == variant
    assert reason in why
    assert bool(why) == (variant == "none")


def test_the_plan_of_the_layers_it_is_made_for(module):
    """3x3, stride 1, on an H200: two halo tiles or more; the basis resident for 64 channels, else in a deep ring."""

    def plan(channels, filters):
        one = case("layer", f"32 {channels} 28 28 {filters} {channels} 3 3", padding=ONE, dtype=torch.bfloat16)
        return module.hopper_plan(request(module, one, H200))

    plans = {(c, q): plan(c, q) for c, q in ((64, 16), (64, 32), (128, 32), (256, 64), (512, 128))}
    assert all(p["halo_stages"] >= 2 and 0 < p["bytes"] <= H200["shared_bytes"] for p in plans.values())
    assert [p["basis_resident"] for p in plans.values()] == [True, True, False, False, False]
    assert all(p["basis_resident"] or p["basis_stages"] >= 6 for p in plans.values())
    assert [p["per_sm"] for p in plans.values()] == [2, 2, 2, 1, 1]
