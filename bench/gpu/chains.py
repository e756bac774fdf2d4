"""``make gpu-bench``, Tucker chains: 1×1, 3×3 core, 1×1 in one pass of ours and in two, beside three convolutions.

The layers are those of ``layers`` with both ranks at a quarter of the channels; ``two_step`` is three convolutions of
cuDNN here. These rows decide whether automatic choice runs the chain in one pass (``ops/tucker_conv2d_model.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from basisconv_kernels.ops.tucker_conv2d_model import ONE_PASS
from bench.gpu import layers
from bench.gpu.journal import Step
from bench.gpu.layers import BASELINES, RESNET, Layer
from bench.gpu.timing import Meter

ENGINES = (*BASELINES, "cuda", ONE_PASS, "triton")
BATCHES = (32, 1)


def by_priority() -> Iterator[tuple[Layer, tuple[str, ...]]]:
    """Layers with their engines, the most telling first."""
    for N in BATCHES:
        for C, K, side in RESNET:
            yield Layer(C, K, side, N, 4, tucker=True), ENGINES


def steps(about: Mapping[str, Any], device: str, meter: Meter) -> list[Step]:
    """All rows; in a rehearsal small layers on the CPU's engines."""
    return layers.steps_of(by_priority(), about, device, meter)
