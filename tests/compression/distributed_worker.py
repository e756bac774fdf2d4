"""What each process of ``test_distributed`` does; run by torchrun, writes ``result.pt`` into the folder it is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.finetune import finetune
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.tucker_config import TuckerConfig

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(32, 2, 8, 8, generator=GENERATOR)
LABELS = torch.randint(3, (32,), generator=GENERATOR)
BATCH = 8


def network() -> nn.Module:
    """A basis layer and a Tucker layer; no BatchNorm, so that two half batches are one whole batch."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    steps = {
        "0": BasisConfig(fraction=0.25, train_basis=True, keep_dense="never"),
        "2": TuckerConfig(fraction=0.5, keep_dense="never"),
    }
    return compress(dense, steps, example_inputs=IMAGES[:2])[0]


class Part:
    """The batches of one process of several: each batch of all, cut into equal parts."""

    def __init__(self, rank: int = 0, size: int = 1, fails_in_pass: int = 0) -> None:
        self.rank, self.size, self.passes, self.fails = rank, size, 0, fails_in_pass

    def __len__(self) -> int:
        return len(IMAGES) // BATCH

    def __iter__(self):
        self.passes += 1
        for start in range(0, len(IMAGES), BATCH):
            if self.passes == self.fails and start:
                raise InterruptedError
            mine = slice(start + self.rank * BATCH // self.size, start + (self.rank + 1) * BATCH // self.size)
            yield IMAGES[mine], LABELS[mine]


def train(model: nn.Module, loader: Part, **settings):
    return finetune(model, loader, lr=0.05, orthogonality=0.1, progress=False, **settings)


def main(folder: Path) -> None:
    """Train with DDP, again with an interruption, and with sharded parameters."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {"size": size}

    def ddp() -> nn.Module:
        return nn.parallel.DistributedDataParallel(network())

    def judge(model: nn.Module) -> float:
        return -float(rank) - float(model(IMAGES).square().mean())

    model = ddp()
    records = train(model, Part(rank, size), epochs=2, validate=judge, checkpoint=folder / "whole.state")
    found["ddp"] = model.module.state_dict()
    found["validation"] = [record.validation for record in records]

    broken = ddp()
    try:
        train(broken, Part(rank, size, fails_in_pass=2), epochs=2, validate=judge, checkpoint=folder / "cut.state")
    except InterruptedError:
        found["interrupted"] = True
    resumed = ddp()
    train(resumed, Part(rank, size), epochs=2, validate=judge, checkpoint=folder / "cut.state")
    found["resumed"] = resumed.module.state_dict()

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    sharded = network()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with torch.no_grad():
        found["sharded output"] = sharded(IMAGES)
    try:
        train(sharded, Part(rank, size), checkpoint=folder / "sharded.state")
    except ValueError as error:
        found["refused"] = str(error)
    finetune(sharded, Part(rank, size), epochs=2, lr=0.05, progress=False)
    found["sharded"] = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
                        for name, value in sharded.state_dict().items()}  # fmt: skip
    if rank == 0:
        torch.save(found, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is written and both have arrived. What follows in an ordinary exit, threads of the process group that end
    # beside the interpreter, has been seen to abort ("terminate called without an active exception").
    os._exit(0)
