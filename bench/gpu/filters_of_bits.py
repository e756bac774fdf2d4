"""``make gpu-bench``, real numbers and filters of bits: ternary and stacked layers beside cuDNN's dense ones.

All compute convolution, scale, bias and ReLU on channels_last bfloat16. ``dense`` convolves with the filters that the
bits stand for, in bfloat16: what runs where such a layer is unpacked. ``cuda`` has its filters packed before. Stacked
layers have two splits and a bank of K/4 filters, ternary ones one scale. No time without a passed check of the same
call on three images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels import BackendUnavailable, bitpack, stacked_binary_conv2d
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_pack
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d, ternary_planes
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.reference.stacked_binary_conv2d import stacked_filters
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from bench.gpu import facts
from bench.gpu.journal import Step, Unavailable
from bench.gpu.layers import RESNET, SEED
from bench.gpu.timing import Call, Meter, bytes_of

ENGINES = ("dense", "cuda", "triton")
KINDS = ("ternary", "stacked")
SPLITS, SHARE = 2, 4  # of stacked layers: a bank of K / SHARE filters
ONE_ROUNDING = 2.0**-7  # relative error of a result rounded to bfloat16 once, of dense ones with a rounded weight too


@dataclass(frozen=True)
class BitsLayer:
    """A 3×3 layer at a batch."""

    kind: str
    C: int
    K: int
    side: int
    N: int = 32

    @property
    def name(self) -> str:
        """``ternary_64to64_at56_n32``."""
        return f"{self.kind}_{self.C}to{self.K}_at{self.side}_n{self.N}"

    def problem(self, device: str) -> Any:
        """The problem of the op."""
        sizes: dict[str, Any] = {
            "C": self.C, "K": self.K, "N": self.N, "H": self.side, "W": self.side, "padding": (1, 1, 1, 1),
            "dtype": torch.bfloat16, "device": device, "channels_last": True, "bias": True, "activation": "relu",
        }  # fmt: skip
        if self.kind == "ternary":
            return TernaryConv2dProblem(**sizes)
        return StackedBinaryConv2dProblem(**sizes, n=self.K // SHARE, splits=SPLITS, scale=True)


class Prepared:
    """Weights of a layer on the device, and inputs by number."""

    def __init__(self, layer: BitsLayer, device: str):
        self.layer, self.device = layer, device
        self.generator = torch.Generator(device).manual_seed(SEED)
        p = layer
        self.scale, self.bias = self._normal(p.K) * (9 * p.C) ** -0.5, self._normal(p.K)
        if p.kind == "ternary":
            self.weight = (2 * self._normal(p.K, p.C, 3, 3)).round().clamp(-1, 1)
            self.planes = ternary_planes(self.weight)
            self.packed = ternary_conv2d_pack(self.planes, p.C)
        else:
            bank = torch.where(self._normal(p.K // SHARE, p.C // SPLITS, 3, 3) >= 0, 1.0, -1.0)
            self.index = torch.randint(p.K // SHARE, (p.K, SPLITS), generator=self.generator, device=device)
            self.weight = stacked_filters(bank, self.index).to(torch.bfloat16)
            self.bank = bitpack(bank)
            self.packed = stacked_binary_conv2d_pack(self.bank, self.index)
        dense = self.weight.float() * self.scale.float()[:, None, None, None]
        self.dense = dense.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        self._inputs: dict[int, Tensor] = {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(torch.bfloat16)

    def input(self, i: int) -> Tensor:
        """The i-th input."""
        if i not in self._inputs:
            p = self.layer
            made = self._normal(p.N, p.C, p.side, p.side)
            self._inputs[i] = made.contiguous(memory_format=torch.channels_last)
        return self._inputs[i]

    def function(self, engine: str) -> Callable[[Tensor], Tensor]:
        """Input → result."""
        if engine == "dense":
            return lambda x: F.relu(F.conv2d(x, self.dense, self.bias, padding=1))
        backend = engine if self.device == "cuda" else "cpu"
        packed = self.packed if engine == "cuda" else None
        common: dict[str, Any] = {"padding": 1, "activation": "relu", "backend": backend, "packed": packed}
        if self.layer.kind == "ternary":
            return lambda x: ternary_conv2d(x, self.planes, self.scale, self.bias, **common)
        return lambda x: stacked_binary_conv2d(x, self.bank, self.index, self.scale, self.bias, **common)

    def call(self, engine: str, i: int) -> Call:
        """The engine on the i-th input."""
        return functools.partial(self.function(engine), self.input(i))

    def check(self, engine: str) -> None:
        """Compare three images with the definition in float64.

        Raises:
            AssertionError: the engine is wrong.
        """
        x, n = self.input(0), self.layer.N
        out = self.function(engine)(x)
        images = sorted({0, n // 2, n - 1})
        weight = self.dense if engine == "dense" else self.weight * self.scale.double()[:, None, None, None]
        expected = F.relu(F.conv2d(x[images].double(), weight.double(), self.bias.double(), padding=1))
        error = ((out[images].double() - expected).norm() / expected.norm()).item()
        if not error <= ONE_ROUNDING:
            raise AssertionError(f"{engine}: the relative error is {error:.3g}")


def measure(layer: BitsLayer, engine: str, device: str, meter: Meter) -> dict[str, Any]:
    """The data of one row."""
    torch.backends.cudnn.benchmark = True
    meter.forget()
    with torch.inference_mode():
        prepared = Prepared(layer, device)
        try:
            prepared.check(engine)
        except BackendUnavailable as reason:
            raise Unavailable(str(reason).replace("\n", " ")) from None
        x = prepared.input(0)
        moved = bytes_of(x) // layer.C * (layer.C + layer.K)
        found = meter.measure(lambda i: prepared.call(engine, i), moved)
    problem = layer.problem(device)
    macs = problem.macs() if layer.kind == "ternary" else problem.dense_macs()
    return {"layer": layer.name, "engine": engine, "problem": str(problem), "macs": macs, **found}


def steps(about: Mapping[str, Any], device: str, meter: Meter) -> list[Step]:
    """All rows; in a rehearsal small layers on the CPU's engine."""
    found = []
    for N, kinds in ((32, KINDS), (1, KINDS[:1])):
        for C, K, side in RESNET:
            for kind in kinds:
                small = {} if device == "cuda" else {"side": min(side, 7), "N": min(N, 2)}
                layer = BitsLayer(**{"kind": kind, "C": C, "K": K, "side": side, "N": N, **small})
                for engine in ENGINES:
                    stamp = facts.stamp(dict(about), ours=engine != "dense")
                    run = functools.partial(measure, layer, engine, device, meter)
                    found.append(Step(f"{layer.name} {engine}", run, 3.0, 90.0, stamp))
    return found
