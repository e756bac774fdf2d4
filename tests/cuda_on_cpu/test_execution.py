"""The execution of CUDA sources on the CPU itself: primitives by definition, and every broken rule is noticed."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_on_cpu.emulated import ORDERS

pytestmark = pytest.mark.xdist_group("cuda_on_cpu")


def in_all_orders(module, run, *outputs):
    """What ``run`` gives in each order: the outputs, which begin as NaN or all ones, or the report."""
    found = []
    for order in range(len(ORDERS)):
        for output in outputs:
            output.view(torch.uint8).fill_(0xFF)
        module.set_order(order)
        try:
            assert run() is None
            found.append([output.clone() for output in outputs])
        except RuntimeError as report:
            found.append(str(report))
    return found


def words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def test_shuffles_ballots_matrices_and_bits(module):
    given, out = words(32, 4), torch.empty(352, dtype=torch.int32)
    for found in in_all_orders(module, lambda: module.primitives(given.data_ptr(), out.data_ptr()), out):
        flat, (got,) = given.flatten()[:32], found
        lanes = torch.arange(32)
        assert torch.equal(got[:32], flat[lanes ^ 5])
        assert torch.equal(got[32:64], flat[3].expand(32))
        ballot = sum(int(flat[lane] & 1) << lane for lane in range(32))
        assert all(int(word) & 0xFFFFFFFF == ballot for word in got[64:96])
        matrices = given.view(4, 8, 4)  # matrix, row, word; lane 4g + t holds word t of row g
        assert torch.equal(got[96:224].view(4, 8, 4), matrices)
        a = torch.cat([torch.cat([matrices[0], matrices[2]], 1), torch.cat([matrices[1], matrices[3]], 1)])
        b = torch.cat([matrices[0], matrices[2]], 1)
        both = a[:, None] & b[None]
        count = torch.tensor([bin(int(word) & 0xFFFFFFFF).count("1") for word in both.flatten()]).view(16, 8, 8).sum(2)
        registers = got[224:].view(2, 2, 8, 4) - torch.arange(1, 5).view(2, 2, 1, 1)  # half, parity, g, t
        assert torch.equal(registers.permute(0, 2, 3, 1).reshape(16, 8).long(), count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products(module, dtype):
    """On whole numbers: exact in every order of additions, and TF32 numbers as they are."""
    depth = 8 if dtype == torch.float32 else 16
    a, b = (torch.randint(-9, 10, (rows, depth), generator=torch.Generator().manual_seed(rows)) for rows in (16, 8))
    left, right, out = a.to(dtype), b.to(dtype), torch.empty(16, 8)
    name = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    run = lambda: module.product(name, left.data_ptr(), right.data_ptr(), out.data_ptr())  # noqa: E731
    for (found,) in in_all_orders(module, run, out):
        assert torch.equal(found.long(), a @ b.T)


def test_tf32_takes_tf32_only(module):
    a, b, out = torch.full((16, 8), 1 + 2**-20), torch.ones(8, 8), torch.empty(16, 8)
    with pytest.raises(RuntimeError, match="no TF32 number"):
        module.product("tf32", a.data_ptr(), b.data_ptr(), out.data_ptr())


# In the order of the enumeration in primitives.cu: what the report must say; None where the result must be wrong, or
# differ between the orders.
REVERSE = {
    "right": "right",
    "no barrier": None,
    "no wait": None,
    "not committed": None,
    "wrong lane": None,
    "one lane stays away": "deadlock: 62 threads live, 62 wait for __shfl_sync",
    "another operation": "other lanes are at another operation",
    "barrier not by all": "deadlock: 63 threads live, 63 wait for __syncthreads",
    "misaligned": "cp_async16: shared memory address is misaligned",
    "outside": "cp_async16: outside shared memory",
    "unwritten": None,
    "stale": None,
}
WGMMA = {
    "right": "right",
    "no fence of wgmma": "wgmma without wgmma_fence",
    "read before wait": None,
    "A changed": "A registers of a wgmma changed before wgmma_wait",
    "no wait for bytes": None,
    "wrong bytes": "wait for an mbarrier",
    "no barrier after init": "an mbarrier is used before bar_init",
    "arrived twice": "more arrivals at an mbarrier than its count",
    "no proxy fence": None,
    "wrong swizzle": None,
    "wrong phase": None,
    "not initialised": "an mbarrier is used before bar_init",
}


CLUSTER = {
    "right": "right",
    "no cluster sync": "an mbarrier is used before bar_init",
    "no wait for the other": None,
    "no such block": "beside: no such block",
    "ends early": "beside: the block has ended",
}


def notice(found, expected, report):
    """A run is right in all orders, or noticed in at least one, with the report that belongs to the fault."""
    wrong = [one for one in found if isinstance(one, str) or not torch.equal(one[0], expected)]
    if report == "right":
        assert wrong == []
    elif report is None:
        assert wrong
    else:
        assert any(isinstance(one, str) and report in one for one in wrong), wrong


@pytest.mark.parametrize("fault", REVERSE)
def test_threads_that_exchange_words(module, fault):
    given, out = words(64, 4), torch.empty(64, dtype=torch.int32)
    run = lambda: module.reverse(given.data_ptr(), out.data_ptr(), list(REVERSE).index(fault))  # noqa: E731
    notice(in_all_orders(module, run, out), given[:, 0].flip(0), REVERSE[fault])


@pytest.mark.parametrize("fault", CLUSTER)
def test_blocks_of_a_cluster(module, fault):
    """Two clusters of four."""
    given, out = words(2, 4, 32), torch.empty(2, 4, 32, dtype=torch.int32)
    arguments = (given.data_ptr(), out.data_ptr(), 8, 4, list(CLUSTER).index(fault))
    notice(in_all_orders(module, lambda: module.cluster(*arguments), out), given.roll(1, 1), CLUSTER[fault])


@pytest.mark.parametrize(("grid", "blocks"), [(6, 4), (16, 16)])
def test_a_grid_is_whole_clusters_of_at_most_eight_blocks(module, grid, blocks):
    assert "whole clusters of at most eight blocks" in module.cluster(0, 0, grid, blocks, 0)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "copied"])
@pytest.mark.parametrize("fault", WGMMA)
def test_a_product_on_hopper(module, fault, stored):
    if fault in ("no proxy fence", "wrong swizzle", "no barrier after init"):
        stored = fault != "no barrier after init"  # only stores can be wrong so, and they bring a barrier of their own
    a, b = (
        torch.randint(-3, 4, (rows, 64), generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (64, 32)
    )
    memory = torch.empty(64 * 64 + 64, dtype=torch.bfloat16)
    aligned = memory[-memory.data_ptr() // 2 % 8 :][: 64 * 64].view(64, 64).copy_(a)
    image = torch.empty(32 * 64 + 64, dtype=torch.bfloat16)
    image = image[-image.data_ptr() // 2 % 8 :][: 32 * 64]
    lies_at = torch.tensor([(i ^ (i // 64 % 8 * 8)) for i in range(32 * 64)])
    image[torch.arange(32 * 64) if stored else lies_at] = b.flatten()
    out = torch.empty(64, 32)
    arguments = (aligned.data_ptr(), image.data_ptr(), out.data_ptr(), stored, list(WGMMA).index(fault))
    found = in_all_orders(module, lambda: module.wgmma(*arguments), out)
    notice(found, a.float() @ b.float().T, WGMMA[fault])
