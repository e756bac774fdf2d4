"""The one-pass CUDA kernel of ``tucker_conv2d`` on the CPU with the signature of the op."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.layout import laid_out, memory_format
from basisconv_kernels.testing.inputs import bits
from tests.cuda_on_cpu.emulated import ORDERS, Differs, Emulated


class EmulatedTucker:
    """The kernel on a device. Every call runs in all orders of the threads, which must agree bit for bit."""

    def __init__(self, module: ModuleType, device: dict[str, int], orders: Sequence[str] = ORDERS):
        self.module, self.orders = module, orders
        self.rest = Emulated(module, "", device)  # describes and packs the last two stages
        self.matrices = self.conflicts = 0

    def request(
        self, input: Tensor, u_in: Tensor, core: Tensor, u_out: Tensor, *, activation: str | None = None, **rest: Any
    ) -> dict[str, Any]:
        """A call for the module, without the memory of weights and results."""
        arguments = {"precise": False, **rest, "groups": 1, "activation": activation}
        return {
            **self.rest.request(input, core, u_out, **arguments),
            "channels": input.shape[1], "u_in": u_in.data_ptr(), "u_in_stride": u_in.stride(),
        }  # fmt: skip

    def __call__(
        self,
        input: Tensor,
        u_in: Tensor,
        core: Tensor,
        u_out: Tensor,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        packed: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The op."""
        request = self.request(input, u_in, core, u_out, **arguments)
        packed = self.rest.packed(core, u_out, request) if packed is None else packed
        layout = memory_format(input)
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else laid_out(residual, layout)
        request |= {
            "packed": packed.data_ptr(),
            "bias": 0 if bias is None else bias.data_ptr(),
            "residual": 0 if residual is None else residual.data_ptr(),
        }
        size = (input.shape[0], u_out.shape[0], request["OH"], request["OW"])
        results = []
        for order in self.orders:
            output = torch.empty(size, dtype=input.dtype, memory_format=layout).fill_(torch.nan)
            self.module.set_order(ORDERS.index(order))
            wrong, self.matrices, self.conflicts = self.module.run({**request, "output": output.data_ptr()})
            assert wrong is None, wrong
            results.append(output)
        for order, other in zip(self.orders[1:], results[1:], strict=True):
            if not torch.equal(bits(results[0]), bits(other)):
                raise Differs(f"{self.orders[0]} and {order} differ")
        return results[0]
