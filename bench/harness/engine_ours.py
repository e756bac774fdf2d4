"""Our op, eager and inside a compiled network, and a user's kernel with the same signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import basisconv_kernels
from basisconv_kernels.core import registry
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.testing import candidates
from bench.harness import engine_bits
from bench.harness.bits import BitLayer
from bench.harness.engine_torch import compile_network, freeze, inference, load, placed, training
from bench.harness.errors import UnsupportedError
from bench.harness.fused_layer import FusedLayer
from bench.harness.protocol import Files, Method


class _Kernel:
    """The fused form through a function with the signature of ``basis_conv2d``."""

    def forward(self, layer: FusedLayer, training: bool) -> tuple[Callable[[Tensor], Tensor], str]:
        """The layer as a function of its input, and who computes it."""
        raise NotImplementedError

    def network(self, module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
        """A converted network as a function of inputs like ``x``, and a word about it."""
        raise UnsupportedError("runs layers, not networks")

    def bits(self, layer: BitLayer, x: Tensor) -> Method:
        """A binary, stacked or ternary layer."""
        raise UnsupportedError("runs basis_conv2d, this case is of another op")

    def prepare(self, files: Files) -> list[Method]:
        """The fused form, channels_last."""
        about = files.about
        if "fused" not in about["forms"]:
            raise UnsupportedError("this case has no fused form")
        layout = "channels_last"
        x = placed(torch.load(files.folder / "input.pt"), layout)
        module = load(files.folder / "fused.pt", layout)
        if isinstance(module, BitLayer):
            return [self.bits(module, x)]
        if not isinstance(module, FusedLayer):
            run, detail = self.network(module, x)
            return [inference("fused", layout, functools.partial(run, x), detail)]
        in_training = about["kind"] == "training"
        forward, detail = self.forward(module, in_training)
        if in_training:
            grad = placed(torch.load(files.folder / "grad.pt"), layout)
            trained = [p for p in module.parameters() if p.requires_grad]
            return [training("fused", layout, forward, trained, x, grad, detail)]
        return [inference("fused", layout, functools.partial(forward, x), detail)]


class Ours(_Kernel):
    """Our op; weights are packed once in inference, and by the op itself in training, where they change each step."""

    def forward(self, layer: FusedLayer, training: bool) -> tuple[Callable[[Tensor], Tensor], str]:
        """``basis_conv2d`` with its packed weights."""
        p = layer.problem
        chosen = registry.select(op.OP, op.CANDIDATES, p, registry.wish()).name
        geometry: dict[str, Any] = {
            "stride": p.stride,
            "dilation": p.dilation,
            "groups": p.groups,
            "precise": p.precise,
        }
        weights = (layer.basis_weight, layer.coefficients)
        with torch.no_grad():
            packed = None if training else basisconv_kernels.basis_conv2d_pack(*weights, **geometry)
        call = functools.partial(
            basisconv_kernels.basis_conv2d, basis_weight=layer.basis_weight, coefficients=layer.coefficients,
            bias=layer.bias, padding=p.padding, activation=p.activation, packed=packed, **geometry,
        )  # fmt: skip
        return call, f"backend {chosen}{', packed' if packed is not None else ''}"

    def bits(self, layer: BitLayer, x: Tensor) -> Method:
        """Their own ops."""
        return engine_bits.ours(layer, x)

    def network(self, module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
        """The module; its layers keep their packed weights themselves."""
        return module, ""


def _direct_calls() -> None:
    """Let compiled networks call our kernels without the dispatcher, as docs/serving.md tells users to."""
    import torch._inductor.config

    key = "aot_inductor.custom_ops_to_c_shims"
    torch._inductor.config.aot_inductor.custom_ops_to_c_shims = basisconv_kernels.inductor_configs()[key]


class OursCompiled(_Kernel):
    """A network with our layers in one compiled and frozen graph."""

    def forward(self, layer: FusedLayer, training: bool) -> tuple[Callable[[Tensor], Tensor], str]:
        """Single layers are measured without a compiler around them."""
        raise UnsupportedError("runs networks, not layers")

    def network(self, module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
        """The compiled module."""
        torch._dynamo.reset()
        freeze(network=True)
        _direct_calls()
        return compile_network(module, x)


class Candidate(_Kernel):
    """A user's kernel, named as ``package.module:function``; see ``testing/candidates.py`` for its signature."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.kernel = candidates.load(target)

    def forward(self, layer: FusedLayer, training: bool) -> tuple[Callable[[Tensor], Tensor], str]:
        """The kernel with every argument in normal form."""
        p = layer.problem
        weights = (layer.basis_weight, layer.coefficients, layer.bias)
        arguments: dict[str, Any] = {
            "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups,
            "activation": p.activation, "residual": None, "precise": p.precise,
        }  # fmt: skip
        where = inspect.getsourcefile(self.kernel) if inspect.isfunction(self.kernel) else None
        return lambda x: self.kernel(x, *weights, **arguments), Path(where).name if where else ""
