"""Each wrapper of the CUDA kernels alone, by definition: the first thing to run on a device.

The same tests run here on the processor (``cpu``), where they show that they are right; what they are for is ``cuda``:
whether instructions, descriptors, swizzles and tensor maps mean on silicon what the kernels take them to mean.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import compiling

BF16, F16 = torch.bfloat16, torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
dtypes = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture(params=DEVICES, scope="module")
def wrappers(request):
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wrappers are compiled for compute capability 9.0")
    return compiling.compile_wrappers(request.param)


def words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def whole(*shape, seed=0, most=5):
    """Whole numbers: sums are exact in whatever order."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed))


def unwritten(wrappers, *shape, dtype=torch.int32):
    return torch.full(shape, -1, dtype=torch.int32, device=wrappers.device).view(dtype)


def aligned(wrappers, tensor):
    """A copy at a multiple of 128 bytes."""
    step = 128 // tensor.element_size()
    memory = torch.empty(tensor.numel() + step, dtype=tensor.dtype, device=wrappers.device)
    start = -memory.data_ptr() // tensor.element_size() % step
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def population(word):
    return bin(int(word) & 0xFFFFFFFF).count("1")


def test_lanes(wrappers):
    given, out = words(32), unwritten(wrappers, 5, 32)
    wrappers("lanes", given.to(wrappers.device), out)
    ballot = sum((int(word) & 1) << lane for lane, word in enumerate(given))
    out = out.cpu()
    assert torch.equal(out[0], given[torch.arange(32) ^ 5])
    assert torch.equal(out[1], given[3].expand(32))
    assert all(int(word) & 0xFFFFFFFF == ballot for word in out[2])
    assert out[3].tolist() == [population(word) for word in given]
    eight = torch.stack([given, given[torch.arange(32) ^ 1]], 1).view(torch.uint8)  # of a lane and of its neighbour
    digits = torch.tensor([0, 4, 2, 6]) ^ (torch.arange(32) % 8)[:, None]
    assert torch.equal(out[4].view(torch.uint8).view(32, 4), eight.gather(1, digits))


def test_cp_async_fills_with_zeros(wrappers):
    given, out = words(32, 4), unwritten(wrappers, 32, 4)
    wrappers("cp_async", aligned(wrappers, given), out)
    expected = given.view(torch.uint8).clone()
    for lane in range(32):
        expected[lane, lane % 17 :] = 0
    assert torch.equal(out.cpu().view(torch.uint8), expected)


@dtypes
def test_rounding_and_widening(wrappers, dtype):
    given = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 100
    given[:6] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1 + 2**-9, 1 + 3 * 2**-9])
    out, wide = unwritten(wrappers, 32), unwritten(wrappers, 64, dtype=torch.float32)
    wrappers("numbers", int(dtype == BF16), given.to(wrappers.device), out, wide)
    expected = given.to(dtype)
    got = out.cpu().view(dtype)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(wide.cpu().nan_to_num(7), expected.float().nan_to_num(7))


@dtypes
def test_the_larger_and_the_smaller_of_pairs(wrappers, dtype):
    some = torch.tensor([1.5, -2.0, 0.0, 6.0, float("inf"), float("-inf"), float("nan"), 2.0**-20])
    a, b = (t.flatten().to(dtype).contiguous() for t in torch.meshgrid(some, some, indexing="ij"))
    larger, smaller = unwritten(wrappers, 32), unwritten(wrappers, 32)
    wrappers("extremes", int(dtype == BF16), a.to(wrappers.device), b.to(wrappers.device), larger, smaller)
    for got, expected in ((larger, torch.maximum(a, b)), (smaller, torch.minimum(a, b))):
        assert torch.equal(got.cpu().view(dtype).nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_blocks_of_a_cluster_reach_each_other(wrappers, blocks):
    given, out = words(2, blocks, 128), unwritten(wrappers, 2, blocks, 128)
    wrappers("cluster", blocks, given.to(wrappers.device), out)
    assert torch.equal(out.cpu(), given.roll(1, 1))


def test_ldmatrix(wrappers):
    given, out = words(32, 4), unwritten(wrappers, 4, 8, 4)
    wrappers("matrices", given.to(wrappers.device), out)
    assert torch.equal(out.cpu(), given.view(4, 8, 4))


def test_ldmatrix_transposed(wrappers):
    """A register of lane 4g + t has rows 2t and 2t + 1 of column g."""
    given, out = words(32, 4), unwritten(wrappers, 4, 8, 4)
    wrappers("matrices_transposed", given.to(wrappers.device), out)
    matrices = given.view(torch.int16).view(4, 8, 8)
    assert torch.equal(out.cpu().view(torch.int16).view(4, 8, 8), matrices.transpose(1, 2))


@pytest.mark.parametrize(("name", "dtype"), [("mma_bf16", BF16), ("mma_f16", F16), ("mma_tf32", torch.float32)])
def test_products_of_a_warp(wrappers, name, dtype):
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = whole(16, depth), whole(8, depth, seed=1), whole(16, 8, seed=2).float()
    got = c.to(wrappers.device, copy=True)
    wrappers(name, *(t.to(dtype).to(wrappers.device) for t in (a, b)), got)
    assert torch.equal(got.cpu(), c + a.float() @ b.float().T)


def test_products_of_bits(wrappers):
    a, b, c = words(16, 8), words(8, 8, seed=1), whole(16, 8, seed=2).int()
    got = c.to(wrappers.device, copy=True)
    wrappers("mma_bits", a.to(wrappers.device), b.to(wrappers.device), got)
    both = a[:, None] & b[None]
    count = torch.tensor([population(word) for word in both.flatten()]).view(16, 8, 8).sum(2)
    assert torch.equal(got.cpu(), c + count.int())


def test_barriers_and_bulk_copies(wrappers):
    given, out = words(3, 512), unwritten(wrappers, 3, 512)
    wrappers("bulk", aligned(wrappers, given), out)
    assert torch.equal(out.cpu(), given)


def swizzled_rows(rows):
    """Rows of 32, 64 or 128 bytes as shared memory holds them: 16-byte columns XORed by the 128-byte line."""
    flat = rows.contiguous().view(torch.uint8).flatten()
    row_bytes = rows.shape[1] * rows.element_size()
    offset = torch.arange(flat.numel())
    lies_at = offset ^ ((offset >> 3) & (row_bytes - 16))
    out = torch.empty_like(flat)
    out[lies_at] = flat
    return out


@dtypes
@pytest.mark.parametrize(
    ("box", "at"),
    [((3, 4), (1, 0, 0, 0)), ((3, 4), (0, -1, -2, 64)), ((5, 2), (1, 3, 5, 0)), ((1, 7), (0, 4, -3, 0)),
     ((18, 10), (1, -1, -1, 0))],
    ids=str,
)  # fmt: skip
def test_boxes_of_tensor_maps(wrappers, dtype, box, at):
    """Inside, over each edge of the image, and over the last channel: zeros outside, rows swizzled by 128 bytes."""
    N, H, W, C = 2, 6, 7, 72
    image = (whole(N, H, W, C, most=100)).to(dtype)
    (rows, columns), (n, y, x, c) = box, at
    out = unwritten(wrappers, rows * columns * 32)
    wrappers("box", int(dtype == BF16), aligned(wrappers, image), N, H, W, C, rows, columns, n, y, x, c, out)
    around = torch.zeros(H + 64, W + 64, C + 64, dtype=dtype)
    around[32 : 32 + H, 32 : 32 + W, :C] = image[n]
    expected = around[32 + y : 32 + y + rows, 32 + x : 32 + x + columns, c : c + 64].reshape(-1, 64)
    assert torch.equal(out.cpu().view(torch.uint8), swizzled_rows(expected))


@dtypes
@pytest.mark.parametrize("stored", [False, True], ids=["copied", "stored"])
@pytest.mark.parametrize("row_bytes", [32, 64, 128])
@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_products_of_a_warpgroup(wrappers, n, row_bytes, stored, dtype):
    depth = row_bytes // 2
    a, b, d = whole(64, depth), whole(n, depth, seed=1), whole(64, n, seed=2).float()
    right = b.to(dtype)
    image = right if stored else swizzled_rows(right).view(dtype)
    got = d.to(wrappers.device, copy=True)
    arguments = (int(dtype == BF16), n, row_bytes, int(stored))
    wrappers("wgmma", *arguments, a.to(dtype).to(wrappers.device), aligned(wrappers, image), got)
    assert torch.equal(got.cpu(), d + a.float() @ b.float().T)


@pytest.mark.parametrize("columns", [False, True], ids=["swizzled", "columns"])
@pytest.mark.parametrize("n", [32, 64, 128])
def test_products_of_bits_of_a_warpgroup(wrappers, n, columns):
    a, b, d = words(64, 16), words(n, 16, seed=1), whole(64, n, seed=2).int()
    got = d.to(wrappers.device, copy=True)
    wrappers("wgmma_bits", n, int(columns), a.to(wrappers.device), b.to(wrappers.device), got)
    counts = torch.tensor([bin(byte).count("1") for byte in range(256)])
    both = (a[:, None] & b[None]).contiguous().view(torch.uint8)
    assert torch.equal(got.cpu(), d + counts[both.int()].sum(2).int())


def test_the_device_code_compiles():
    """Where there is an nvcc: what the GPU will be given, without serialised wgmma."""
    compiling.compile_wrappers("sm_90a")
