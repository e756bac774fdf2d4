"""The CUDA kernels of ``basis_conv2d`` on the CPU with the signature of the op, for ``testing.check``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.testing.inputs import bits

ORDERS = ("forward", "reversed", "shuffled")
A100 = {"capability": 80, "shared_bytes": 163 * 1024, "multiprocessors": 108}
ADA = {"capability": 89, "shared_bytes": 99 * 1024, "multiprocessors": 128}
H200 = {"capability": 90, "shared_bytes": 227 * 1024, "multiprocessors": 132}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


class Differs(AssertionError):
    """Two orders of the threads gave different bits: they race."""


class Emulated:
    """A variant on a device. Every call runs in all orders of the threads, which must agree bit for bit."""

    def __init__(self, module: ModuleType, variant: str, device: dict[str, int], orders: Sequence[str] = ORDERS):
        self.module, self.variant, self.device, self.orders = module, variant, device, orders
        self.matrices = self.conflicts = 0
        self.maps: Tensor | None = None

    def describe(self, basis_weight: Tensor, coefficients: Tensor, **arguments: Any) -> dict[str, Any]:
        """What the weights and the geometry fix."""
        groups, Q = arguments["groups"], basis_weight.shape[0]
        return {
            "C": basis_weight.shape[1] * groups,
            "Q": Q,
            "K": coefficients.shape[0],
            "R": basis_weight.shape[2],
            "S": basis_weight.shape[3],
            "stride": arguments["stride"],
            "dilation": arguments["dilation"],
            "groups": groups,
            "mixing_groups": reference.coefficient_groups(coefficients, Q, groups),
            "dtype": str(basis_weight.dtype).removeprefix("torch."),
            "precise": arguments["precise"],
        }

    def packed(self, basis_weight: Tensor, coefficients: Tensor, described: dict[str, Any]) -> Tensor:
        """The weights as the pack kernel lays them out."""
        memory = torch.empty(self.module.packed_bytes(described) + 16, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 16 :][: self.module.packed_bytes(described)]
        memory.fill_(0xFF)
        wrong = self.module.pack({
            **described,
            "basis_weight": basis_weight.data_ptr(),
            "basis_stride": basis_weight.stride(),
            "coefficients": coefficients.data_ptr(),
            "coefficients_stride": coefficients.stride(),
            "packed": memory.data_ptr(),
        })  # fmt: skip
        assert wrong is None, wrong
        return memory

    def __call__(
        self,
        input: Tensor,
        basis_weight: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        packed: Tensor | None = None,
        keep_maps: bool = False,
        **arguments: Any,
    ) -> Tensor:
        """The op."""
        described = self.describe(basis_weight, coefficients, **arguments)
        packed = self.packed(basis_weight, coefficients, described) if packed is None else packed
        layout = reference.memory_format(input)
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else reference.laid_out(residual, layout)
        request = {
            **self.request(input, basis_weight, coefficients, **arguments),
            "packed": packed.data_ptr(),
            "bias": 0 if bias is None else bias.data_ptr(),
            "residual": 0 if residual is None else residual.data_ptr(),
        }

        def fresh(channels: int) -> Tensor:
            size = (input.shape[0], channels, request["OH"], request["OW"])
            return torch.empty(size, dtype=input.dtype, memory_format=layout).fill_(torch.nan)

        results = []
        for order in self.orders:
            output, maps = fresh(described["K"]), fresh(described["Q"])
            self.module.set_order(ORDERS.index(order))
            addresses = {"output": output.data_ptr(), "maps": maps.data_ptr() if keep_maps else 0}
            wrong, self.matrices, self.conflicts = self.module.run(self.variant, {**request, **addresses})
            assert wrong is None, wrong
            results.append((output, maps))
        for order, both in zip(self.orders[1:], results[1:], strict=True):
            for first, second in zip(results[0], both, strict=True):
                if not torch.equal(bits(first), bits(second)):
                    raise Differs(f"{self.orders[0]} and {order} differ")
        self.maps = results[0][1] if keep_maps else None
        return results[0][0]

    def request(self, input: Tensor, basis_weight: Tensor, coefficients: Tensor, **arguments: Any) -> dict[str, Any]:
        """A call for the module, without the memory of weights and results."""
        padding = arguments["padding"]
        OH, OW = checks.output_size(
            "emulated", input.shape[2:], basis_weight.shape[2:], arguments["stride"], padding, arguments["dilation"]
        )
        return {
            **self.describe(basis_weight, coefficients, **arguments), **self.device,
            "N": input.shape[0], "H": input.shape[2], "W": input.shape[3], "OH": OH, "OW": OW,
            "pad_top": padding[0], "pad_left": padding[2],
            "input": input.data_ptr(), "input_stride": input.stride(),
            "packed": 0, "bias": 0, "residual": 0, "output": 0, "maps": 0,
            "channels_last": reference.memory_format(input) == torch.channels_last,
            "activation": ACTIVATIONS[arguments["activation"]],
        }  # fmt: skip
