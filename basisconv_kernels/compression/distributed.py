"""What training needs to know of several processes: whether there are any, which one this is, what they agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``; else the model itself."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of some parameter (``fully_shard``, ``FullyShardedDataParallel``)."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return flat or any(isinstance(p, DTensor) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Put the parameters of ``fully_shard`` back in parts; inference leaves some whole, and an optimiser made then
    would hold tensors that nobody reads again.
    """
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Group:
    """The processes that train one model together; one alone where the model is not wrapped for several."""

    def __init__(self, model: nn.Module) -> None:
        started = dist.is_available() and dist.is_initialized()
        together = started and (isinstance(model, nn.parallel.DistributedDataParallel) or sharded(model))
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self._device = next(model.parameters()).device

    def agreed(self, value: float) -> float:
        """The mean of what the processes have, the same number in all of them."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return float(tensor) / self.size

    def gathered(self, state: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank."""
        if self.size == 1:
            return [state]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, state)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a ``DistributedSampler`` the epoch, without which every epoch has the same order."""
    sampler: Any = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
