"""Accuracy and latency of whole networks: predictions over a test set, and times taken in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.core.timing import Series, interleave
from basisconv_kernels.demo.data import ImageSet, Split
from basisconv_kernels.demo.inference import channels_last

# --- latency ----------------------------------------------------------------------------------------------------------


def time_networks(
    networks: Mapping[str, nn.Module],
    images: Mapping[str, Tensor],
    seconds: float,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Series]:
    """Milliseconds an image of each network on its batch [N, C, H, W], taken in turn by ``interleave``."""
    with torch.inference_mode():
        calls = {name: _bound(network, images[name]) for name, network in networks.items()}
        taken = interleave(calls, seconds, progress=progress)
    return {name: series.scaled(1e3 / len(images[name])) for name, series in taken.items()}


def _bound(network: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: network(images)


def layer_inputs(network: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What the named modules read when the network runs on these images, in the layout in which they get it."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[name] = arguments[0].clone(memory_format=torch.preserve_format)

        return keep

    handles = [network.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


# --- accuracy ---------------------------------------------------------------------------------------------------------


def predict(
    network: nn.Module,
    data: ImageSet,
    split: Split,
    batch_size: int,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Logits [N, classes] of a network in eval mode over a split, in batches, channels_last.

    Args:
        progress: called after each batch with the share done, 0..1.
    """
    network.eval()
    collected = []
    with torch.inference_mode():
        for start in range(0, len(split.labels), batch_size):
            images = data.normalise(split.images[start : start + batch_size])
            collected.append(network(channels_last(images)))
            if progress is not None:
                progress(min(1.0, (start + batch_size) / len(split.labels)))
    return torch.cat(collected).clone()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())


def standard_error(share: float, count: int) -> float:
    """Standard deviation of a measured share of ``count`` independent images, √(p(1−p)/n)."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)
