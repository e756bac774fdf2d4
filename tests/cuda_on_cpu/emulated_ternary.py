"""The CUDA kernel of filters of −1, 0 and +1 on the CPU with the signature of ``ternary_conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.testing.inputs import bits
from tests.cuda_on_cpu.emulated import ACTIVATIONS, H200, ORDERS, Differs
from tests.cuda_on_cpu.emulated_binary import address, poison


class EmulatedTernary:
    """The kernel on a device. Every call runs in all orders of the threads, which must agree bit for bit.

    ``form`` is (split_filters, columns_each) of the plan, None for the quickest.
    """

    def __init__(
        self,
        module: ModuleType,
        device: dict[str, int] = H200,
        orders: Sequence[str] = ORDERS,
        form: tuple[bool, int] | None = None,
    ):
        self.module, self.device, self.orders, self.form = module, device, orders, form
        self.matrices = self.conflicts = 0

    def describe(self, channels: int, planes: Tensor) -> dict[str, Any]:
        """What the filters fix."""
        K, _, R, S, _ = planes.shape
        return {"C": channels, "K": K, "R": R, "S": S}

    def packed(self, channels: int, planes: Tensor) -> Tensor:
        """The filters as the pack kernel lays them out."""
        described = self.describe(channels, planes)
        memory = poison((self.module.packed_bytes(described),), torch.uint8)
        planes = planes.contiguous()
        words = {"words": address(planes), "planes": planes.shape[1], "packed": address(memory)}
        wrong = self.module.pack({**described, **words})
        assert wrong is None, wrong
        return memory

    def request(self, input: Tensor, planes: Tensor, **arguments: Any) -> dict[str, Any]:
        """The call without tensors but the input."""
        assert arguments["groups"] == 1
        padding = arguments["padding"]
        kernel = (planes.shape[2], planes.shape[3])
        size = (input.shape[2], input.shape[3])
        OH, OW = checks.output_size("emulated", size, kernel, arguments["stride"], padding, arguments["dilation"])
        stride = input.stride()
        return {
            **self.describe(input.shape[1], planes), **self.device, "N": input.shape[0], "H": size[0], "W": size[1],
            "OH": OH, "OW": OW, "stride": arguments["stride"], "dilation": arguments["dilation"],
            "pad_top": padding[0], "pad_left": padding[2], "dtype": str(input.dtype).removeprefix("torch."),
            "input": address(input), "input_stride": (stride[0], stride[2], stride[3]),
            "activation": ACTIVATIONS[arguments["activation"]], "packed": 0,
            "scale": (0, False, False), "bias": (0, False, False),
            "output": 0,
        }  # fmt: skip

    def __call__(
        self,
        input: Tensor,
        planes: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        negative_scale: Tensor | None = None,
        packed: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The op."""
        assert negative_scale is None
        request = self.request(input, planes, **arguments)
        packed = self.packed(input.shape[1], planes) if packed is None else packed
        kept = {name: None if t is None else t.contiguous() for name, t in (("scale", scale), ("bias", bias))}
        factors = {
            name: (address(t), t is not None and t.numel() == 1, t is not None and t.dtype == torch.float32)
            for name, t in kept.items()
        }
        results = []
        for order in self.orders:
            self.module.set_order(ORDERS.index(order))
            size = (input.shape[0], planes.shape[0], request["OH"], request["OW"])
            output = poison(size, input.dtype, torch.channels_last)
            full = {**request, **factors, "packed": address(packed), "output": address(output)}
            if self.form is None:
                wrong, self.matrices, self.conflicts = self.module.run(full)
            else:
                wrong = self.module.run_by(full, *self.form)
            assert wrong is None, wrong
            results.append(output)
        for order, other in zip(self.orders[1:], results[1:], strict=True):
            if not torch.equal(bits(results[0]), bits(other)):
                raise Differs(f"{self.orders[0]} and {order} differ")
        return results[0]
