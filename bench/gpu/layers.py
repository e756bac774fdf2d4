"""``make gpu-bench``, the layers: each engine on each layer, a row a pair, by priority.

All engines compute convolution, bias and ReLU on channels_last bfloat16, with ``cudnn.benchmark``. No time without a
passed check of the same call: first, middle and last image of the batch against float64, every element of the rest
against NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels import (
    BackendUnavailable,
    basis_conv2d,
    basis_conv2d_pack,
    tucker_conv2d,
    tucker_conv2d_pack,
)
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.ops.tucker_conv2d_model import ONE_PASS
from basisconv_kernels.testing import tolerances, tucker_conv2d_bounds
from bench.gpu import facts
from bench.gpu.journal import Step, Unavailable
from bench.gpu.timing import Call, Meter, bytes_of

# C, K, map of the 3×3 layers by which the kernels are judged.
RESNET = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))
VGG = ((128, 128, 112), (256, 256, 56), (512, 512, 28), (512, 512, 14), (64, 64, 224))
DENSENET = ((128, 32, 56), (128, 32, 14))
SHARES = (4, 2)  # Q = K / share
OURS = ("cuda", "triton")
BASELINES = ("two_step", "dense")
COMPILED = ("two_step_compiled", "dense_compiled")
# Automatic choice, and what it falls back to: a convolution and a product of the library.
CHOSEN = ("auto", "reference")
ROWS_COMPILED = 3  # layers whose baselines are compiled too: seconds each
FIRST = (len(BASELINES) + len(OURS)) * len(SHARES) * (3 * len(RESNET) + 3)  # rows at Q = K/4 and K/2
SEED = 20190412


@dataclass(frozen=True)
class Layer:
    """A layer at a batch; ``tucker`` puts a 1×1 before the basis, whose rank is Q too."""

    C: int
    K: int
    side: int
    N: int
    share: int
    tucker: bool = False

    @property
    def problem(self) -> Conv2dProblem:
        """With bias and ReLU, in bfloat16."""
        sizes: dict[str, Any] = {
            "N": self.N, "C": self.C, "H": self.side, "W": self.side, "Q": max(4, self.K // self.share), "K": self.K,
            "padding": (1, 1, 1, 1), "channels_last": True, "bias": True, "activation": "relu",
            "dtype": torch.bfloat16,
        }  # fmt: skip
        return (
            TuckerConv2dProblem(**sizes, rank_in=max(4, self.C // self.share))
            if self.tucker
            else Conv2dProblem(**sizes)
        )

    @property
    def name(self) -> str:
        """``64to64_at56_n32_q16``."""
        chain = f"_i{self.C // self.share}" if self.tucker else ""
        return f"{self.C}to{self.K}_at{self.side}_n{self.N}{chain}_q{max(4, self.K // self.share)}"


def by_priority() -> Iterator[tuple[Layer, tuple[str, ...]]]:
    """Layers with their engines, the most telling first."""
    engines = (*BASELINES, *OURS)
    for C, K, side in (*RESNET, *VGG[:3]):
        for share in SHARES:
            yield Layer(C, K, side, 32, share), engines
    for N in (1, 128):
        for C, K, side in RESNET:
            for share in SHARES:
                yield Layer(C, K, side, N, share), engines
    for C, K, side in RESNET:
        yield Layer(C, K, side, 32, 4), CHOSEN
    for C, K, side in RESNET[:ROWS_COMPILED]:
        yield Layer(C, K, side, 32, 4), COMPILED
    for C, K, side in (*VGG[3:], *DENSENET):
        yield Layer(C, K, side, 32, 4), engines
    for C, K, side in VGG[:3]:
        yield Layer(C, K, side, 1, 4), engines


# --- one layer --------------------------------------------------------------------------------------------------------


class Prepared:
    """Weights of a layer on the device, and inputs by number."""

    def __init__(self, layer: Layer, device: str):
        self.p = p = replace(layer.problem, device=device)
        self.generator = torch.Generator(device).manual_seed(SEED)
        chain = isinstance(p, TuckerConv2dProblem)
        inner = p.rank_in if isinstance(p, TuckerConv2dProblem) else p.C
        self.u_in = self._normal(p.C, inner, scale=p.C**-0.5) if chain else None
        self.basis = self._normal(p.Q, inner, 3, 3, scale=(9 * inner) ** -0.5)
        self.mixing = self._normal(p.K, p.Q, scale=p.Q**-0.5)
        self.bias = self._normal(p.K)
        self.dense = self._composed()
        self._inputs: dict[int, Tensor] = {}
        self._functions: dict[str, Callable[[Tensor], Tensor]] = {}

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.p.device) * scale
        made = made.to(self.p.dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    def _composed(self) -> Tensor:
        wide = torch.einsum("kq,qirs->kirs", self.mixing.float(), self.basis.float())
        if self.u_in is not None:
            wide = torch.einsum("kirs,ci->kcrs", wide, self.u_in.float())
        return wide.to(self.p.dtype).contiguous(memory_format=torch.channels_last)

    def input(self, i: int) -> Tensor:
        """The i-th input."""
        if i not in self._inputs:
            self._inputs[i] = self._normal(self.p.N, self.p.C, self.p.H, self.p.W)
        return self._inputs[i]

    def call(self, engine: str, i: int) -> Call:
        """The engine on the i-th input."""
        return functools.partial(self.function(engine), self.input(i))

    def function(self, engine: str) -> Callable[[Tensor], Tensor]:
        """Input → result; weights are packed, and graphs compiled, once."""
        if engine not in self._functions:
            self._functions[engine] = self._made(engine)
        return self._functions[engine]

    def _made(self, engine: str) -> Callable[[Tensor], Tensor]:
        if engine.endswith("_compiled"):
            return torch.compile(self.function(engine.removesuffix("_compiled")), fullgraph=True)
        if engine == "dense":
            return lambda x: F.relu(F.conv2d(x, self.dense, self.bias, padding=1))
        mixing = self.mixing[:, :, None, None]
        if engine == "two_step" and self.u_in is None:
            return lambda x: F.relu(F.conv2d(F.conv2d(x, self.basis, padding=1), mixing, self.bias))
        if engine == "two_step":
            first = self.u_in.t()[:, :, None, None].contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
            return lambda x: F.relu(F.conv2d(F.conv2d(F.conv2d(x, first), self.basis, padding=1), mixing, self.bias))
        backend = None if engine == "auto" else engine
        settings: dict[str, Any] = {"padding": 1, "activation": "relu", "backend": backend}
        if self.u_in is not None:
            weights = (self.u_in, self.basis, self.mixing, self.bias)
            packed = tucker_conv2d_pack(self.basis, self.mixing) if engine != "triton" else None
            return lambda x: tucker_conv2d(x, *weights, packed=packed, **settings)
        packed = basis_conv2d_pack(self.basis, self.mixing) if engine in ("cuda", "cpu", "auto") else None
        return lambda x: basis_conv2d(x, self.basis, self.mixing, self.bias, packed=packed, **settings)

    def check(self, engine: str) -> float:
        """Compare the engine with float64 on three images; the share of the allowed error that it needs, at most 1.

        Raises:
            AssertionError: it is wrong.
        """
        x = self.input(0)
        out = self.function(engine)(x)
        if not bool(torch.isfinite(out).all()):
            raise AssertionError(f"{engine}: not all results are finite")
        images = sorted({0, self.p.N // 2, self.p.N - 1})
        few = replace(self.p, N=len(images))
        some = x[images]
        if engine.startswith("dense"):
            few = replace(Conv2dProblem(**{f: getattr(few, f) for f in Conv2dProblem.__dataclass_fields__}), Q=few.K)
            eye = torch.eye(few.K, dtype=x.dtype, device=x.device)
            bound = tolerances.forward_bound(few, some, self.dense, eye, self.bias, None)
        elif self.u_in is not None:
            bound = tucker_conv2d_bounds.forward_bound(few, some, self.u_in, self.basis, self.mixing, self.bias, None)  # type: ignore[arg-type]
        else:
            bound = tolerances.forward_bound(few, some, self.basis, self.mixing, self.bias, None)
        share = ((out[images].double() - bound.expected).abs() / bound.allowed).max().item()
        if not share <= 1:
            raise AssertionError(f"{engine}: an error is {share:.3g} times what is allowed")
        return share


def measure(layer: Layer, engine: str, device: str, meter: Meter) -> dict[str, Any]:
    """The data of one row."""
    torch.backends.cudnn.benchmark = True
    meter.forget()
    with torch.inference_mode():
        prepared = Prepared(layer, device)
        try:
            share = prepared.check(engine)
        except BackendUnavailable as reason:
            raise Unavailable(str(reason).replace("\n", " ")) from None
        p = prepared.p
        x = prepared.input(0)
        moved = bytes_of(x) + x.element_size() * p.N * p.K * p.output_size[0] * p.output_size[1]
        found = meter.measure(lambda i: prepared.call(engine, i), moved)
    return {"layer": layer.name, "engine": engine, "problem": str(p), "macs": p.macs(), "dense_macs": p.dense_macs(),
            "error_share": share, **found}  # fmt: skip


def steps(about: Mapping[str, Any], device: str, meter: Meter) -> list[Step]:
    """All rows by priority; in a rehearsal small layers on the CPU's engines."""
    return steps_of(by_priority(), about, device, meter)


def steps_of(
    rows: Iterable[tuple[Layer, tuple[str, ...]]], about: Mapping[str, Any], device: str, meter: Meter
) -> list[Step]:
    """One a layer and engine, in this order."""
    found: dict[str, Step] = {}
    for layer, engines in rows:
        if device == "cpu":
            layer = replace(layer, N=min(layer.N, 2), side=min(layer.side, 9))
            engines = tuple("cpu" if e in (*OURS, ONE_PASS) else e for e in engines if not e.endswith("_compiled"))
        for engine in engines:
            key = f"{layer.name} {engine}"
            stamp = facts.stamp(dict(about), ours=engine not in (*BASELINES, *COMPILED))
            checked = engine == "auto"  # some seconds, the first time
            slow = engine.endswith("_compiled")
            seconds, patience = (25.0, 240.0) if slow else (10.0, 120.0) if checked else (3.0, 90.0)
            run = functools.partial(measure, layer, engine, device, meter)
            found.setdefault(key, Step(key, run, seconds, patience, stamp))
    return list(found.values())
