"""``make gpu-bench``, binary layers: packed or real input, bits or bfloat16 out, beside cuDNN's dense bfloat16.

Engines are ways through a layer: ``packed_to_packed`` compares with a threshold, the others scale, add a bias and apply
ReLU; ``bf16_to_bf16`` packs its input first. ``dense`` has real filters, so it does more: it is what a binary layer
replaces. No time without a passed check of the same call on the first, middle and last image: bits against whole
numbers in float64, floats within the tolerance of the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels import (
    BackendUnavailable,
    PackedTensor,
    Threshold,
    binary_conv2d,
    binary_conv2d_pack,
    bitpack,
    unpack,
)
from basisconv_kernels.core.packed import pack_planes
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing import tolerances
from bench.gpu import facts
from bench.gpu.journal import Step, Unavailable
from bench.gpu.layers import SEED
from bench.gpu.timing import Call, Meter

ENGINES = ("dense", "packed_to_packed", "packed_to_bf16", "bf16_to_bf16")
# C, K, side, N: the layers of a ResNet, the one that says most first; a larger batch; the layers of a VGG.
LAYERS = (
    (128, 128, 28, 32), (256, 256, 14, 32), (64, 64, 56, 32), (512, 512, 7, 32), (128, 128, 28, 128),
    (256, 256, 56, 32), (128, 128, 112, 32),
)  # fmt: skip
BITS_IN_BF16 = 16


@dataclass(frozen=True)
class BinaryLayer:
    """A 3×3 layer at a batch."""

    C: int
    K: int
    side: int
    N: int = 32

    @property
    def name(self) -> str:
        """``binary_64to64_at56_n32``."""
        return f"binary_{self.C}to{self.K}_at{self.side}_n{self.N}"


class Prepared:
    """Weights of a layer on the device, and inputs by number."""

    def __init__(self, layer: BinaryLayer, device: str):
        self.layer, self.device = layer, device
        self.backend = "cuda" if device == "cuda" else "cpu"
        self.generator = torch.Generator(device).manual_seed(SEED)
        self.weight = self._normal(layer.K, layer.C, 3, 3).contiguous(memory_format=torch.channels_last)
        self.scale, self.bias = self._normal(layer.K), self._normal(layer.K)
        value = torch.randint(-40, 40, (layer.K,), generator=self.generator, device=device, dtype=torch.int32)
        self.threshold = Threshold(value, self.scale < 0)
        self.filters = bitpack(self.weight)
        self.packed = binary_conv2d_pack(self.filters)
        self._inputs: dict[tuple[bool, int], Any] = {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(torch.bfloat16)

    def input(self, real: bool, i: int) -> Any:
        """The i-th input, of either kind."""
        if (real, i) not in self._inputs:
            p = self.layer
            if real:
                made: Any = self._normal(p.N, p.C, p.side, p.side).contiguous(memory_format=torch.channels_last)
            else:
                shape = (p.N, 1, p.side, p.side, p.C // 32)
                bounds = (-(2**31), 2**31)
                words = torch.randint(*bounds, shape, generator=self.generator, device=self.device, dtype=torch.int32)
                made = PackedTensor(words, p.C)
            self._inputs[real, i] = made
        return self._inputs[real, i]

    def function(self, engine: str) -> Callable[[Any], Any]:
        """Input → result."""
        if engine == "dense":
            return lambda x: F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        common = {"padding": 1, "packed": self.packed, "backend": self.backend}
        if engine == "packed_to_packed":
            return lambda x: binary_conv2d(x, self.filters, output="packed", threshold=self.threshold, **common)
        return lambda x: binary_conv2d(x, self.filters, self.scale, self.bias, activation="relu", **common)

    def call(self, engine: str, i: int) -> Call:
        """The engine on the i-th input."""
        return functools.partial(self.function(engine), self.input(_takes_real(engine), i))

    def check(self, engine: str) -> None:
        """Compare three images with the definition.

        Raises:
            AssertionError: the engine is wrong.
        """
        x, p = self.input(_takes_real(engine), 0), self.layer
        out = self.function(engine)(x)
        images = sorted({0, p.N // 2, p.N - 1})
        if engine == "dense":
            expected = F.relu(F.conv2d(x[images].double(), self.weight.double(), self.bias.double(), padding=1))
            error = ((out[images].double() - expected).norm() / expected.norm()).item()
            if not error <= 2.0**-7:  # one rounding to bfloat16
                raise AssertionError(f"dense: the relative error is {error:.3g}")
            return
        some = x[images] if isinstance(x, Tensor) else PackedTensor(x.words[images], p.C)
        values = torch.where(some >= 0, 1.0, -1.0) if isinstance(some, Tensor) else unpack(some)
        sums = F.conv2d(values.double(), torch.where(self.weight >= 0, 1.0, -1.0).double(), padding=1)
        whole = sums.round().to(torch.int32)
        if engine == "packed_to_packed":
            if not torch.equal(out.words[images], pack_planes(self.threshold.bits(whole)[:, None])):
                raise AssertionError(f"{engine}: wrong bits")
            return
        bound = tolerances.binary_bound(whole, torch.bfloat16, scale=self.scale, bias=self.bias, activation="relu")
        if not bool(((out[images].double() - bound.expected).abs() <= bound.allowed).all()):
            raise AssertionError(f"{engine}: a number is off by more than its tolerance")


def _takes_real(engine: str) -> bool:
    return engine in ("dense", "bf16_to_bf16")


def moved_bytes(layer: BinaryLayer, engine: str) -> int:
    """Of input and result."""
    pixels = layer.N * layer.side**2
    bits_in = BITS_IN_BF16 if _takes_real(engine) else 1
    bits_out = 1 if engine == "packed_to_packed" else BITS_IN_BF16
    return pixels * (layer.C * bits_in + layer.K * bits_out) // 8


def measure(layer: BinaryLayer, engine: str, device: str, meter: Meter) -> dict[str, Any]:
    """The data of one row."""
    torch.backends.cudnn.benchmark = True
    meter.forget()
    with torch.inference_mode():
        prepared = Prepared(layer, device)
        try:
            prepared.check(engine)
        except BackendUnavailable as reason:
            raise Unavailable(str(reason).replace("\n", " ")) from None
        found = meter.measure(lambda i: prepared.call(engine, i), moved_bytes(layer, engine))
    p = layer
    problem = BinaryConv2dProblem(
        C=p.C, K=p.K, N=p.N, H=p.side, W=p.side, padding=(1, 1, 1, 1), planes=int(not _takes_real(engine)),
        dtype=torch.bfloat16, device=device, channels_last=True, activation="relu",
        output="packed" if engine == "packed_to_packed" else "float",
    )  # fmt: skip
    return {"layer": layer.name, "engine": engine, "problem": str(problem), "macs": problem.macs(), **found}


def steps(about: Mapping[str, Any], device: str, meter: Meter) -> list[Step]:
    """All rows; in a rehearsal small layers on the CPU's engine."""
    found = []
    for C, K, side, N in LAYERS if device == "cuda" else LAYERS[:4]:
        layer = BinaryLayer(C, K, side, N) if device == "cuda" else BinaryLayer(C, K, min(side, 7), 2)
        for engine in ENGINES:
            stamp = facts.stamp(dict(about), ours=engine != "dense")
            run = functools.partial(measure, layer, engine, device, meter)
            found.append(Step(f"{layer.name} {engine}", run, 3.0, 90.0, stamp))
    return found
