"""The CUDA kernels of ``binary_conv2d`` and ``bitpack`` on the CPU with the signatures of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import checks
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.packed import PackedTensor, Threshold, words_for
from basisconv_kernels.testing.inputs import bits
from tests.cuda_on_cpu.emulated import ACTIVATIONS, ORDERS, Differs

OUTPUTS = {torch.int32: 0, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
FACTORS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def poison(size: Sequence[int], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Memory that begins at a multiple of 16 bytes and holds ones."""
    made = torch.empty(tuple(size), dtype=dtype, memory_format=layout)
    place = torch.empty(made.numel() * made.element_size() + 16, dtype=torch.uint8).fill_(0xFF)
    place = place[-place.data_ptr() % 16 :][: made.numel() * made.element_size()]
    return place.view(dtype).as_strided(made.shape, made.stride())


class EmulatedBinary:
    """The kernels on a device. Every call runs in all orders of the threads, which must agree bit for bit.

    ``plan``: the filters and warpgroups of a block of sm_90a's kernel, and whether it is the one with slabs; without it
    the kernels choose. ``chosen`` holds what they chose for the last call.
    """

    def __init__(
        self,
        module: ModuleType,
        device: dict[str, int],
        orders: Sequence[str] = ORDERS,
        plan: tuple[int, int, bool] | None = None,
    ):
        self.module, self.device, self.orders, self.plan = module, device, orders, plan
        self.chosen: tuple[int, ...] | None = None
        self.matrices = self.conflicts = 0

    def _in_all_orders(self, run: Any) -> Tensor:
        results = []
        for order in self.orders:
            self.module.set_order(ORDERS.index(order))
            results.append(run())
        for order, other in zip(self.orders[1:], results[1:], strict=True):
            if not torch.equal(bits(results[0]), bits(other)):
                raise Differs(f"{self.orders[0]} and {order} differ")
        return results[0]

    def bitpack(
        self, input: Tensor, *, threshold: Threshold | None = None, bits: int = 1, unsigned: bool | None = None
    ) -> PackedTensor:
        """The op of that name."""
        encoding = "unsigned" if unsigned or bits > 1 else "sign"
        N, C, H, W = input.shape
        value, flip = (None, None) if threshold is None else (threshold.value.contiguous(), threshold.flip.contiguous())

        def run() -> Tensor:
            words = poison((N, bits, H, W, words_for(C)), torch.int32)
            wrong = self.module.bitpack({
                "size": input.shape, "stride": input.stride(), "planes": bits, "codes": encoding == "unsigned",
                "type": NUMBERS[input.dtype], "input": address(input), "threshold": address(value),
                "flip": address(flip), "output": address(words),
            })  # fmt: skip
            assert wrong is None, wrong
            return words

        return PackedTensor(self._in_all_orders(run), C, bits, encoding)

    def packed(self, weight: Tensor | PackedTensor, described: dict[str, Any]) -> Tensor:
        """The weights as the pack kernels lay them out."""
        words = (weight if isinstance(weight, PackedTensor) else self.bitpack(weight)).words
        memory = poison((self.module.packed_bytes(described),), torch.uint8)
        wrong = self.module.pack({**described, "words": address(words), "packed": address(memory)})
        assert wrong is None, wrong
        return memory

    def describe(self, input: Tensor | PackedTensor, weight: Tensor | PackedTensor, groups: int) -> dict[str, Any]:
        """What the weights fix."""
        K, _, R, S = weight.shape
        return {"C": input.shape[1], "K": K, "R": R, "S": S, "groups": groups}

    def __call__(
        self,
        input: Tensor | PackedTensor,
        weight: Tensor | PackedTensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        pixel_scale: Tensor | None = None,
        activation: str | None = None,
        threshold: Threshold | None = None,
        output: str = "float",
        packed: Tensor | None = None,
        **geometry: Any,
    ) -> Any:
        """The op."""
        described = self.describe(input, weight, geometry["groups"])
        if output == "packed" and not self.module.packs_output(described):
            return self.bitpack(self(input, weight, output="int32", packed=packed, **geometry), threshold=threshold)
        given = [t for t in (scale, bias, pixel_scale) if t is not None]
        real = isinstance(input, Tensor)
        dtype = input.dtype if real else given[0].dtype if given else torch.float32
        layout = memory_format(input) if real else torch.channels_last
        operand = self.bitpack(input) if real else input
        packed = self.packed(weight, described) if packed is None else packed
        N, _, H, W = input.shape
        padding = geometry["padding"]
        OH, OW = checks.output_size(
            "emulated", (H, W), weight.shape[2:], geometry["stride"], padding, geometry["dilation"]
        )  # fmt: skip
        value, flip = (None, None) if threshold is None else (threshold.value.contiguous(), threshold.flip.contiguous())
        request = {
            **described, **self.device, "N": N, "H": H, "W": W, "OH": OH, "OW": OW,
            "stride": geometry["stride"], "dilation": geometry["dilation"], "pad_top": padding[0],
            "pad_left": padding[2], "padding_value": geometry["padding_value"], "planes": operand.planes,
            "codes": operand.encoding == "unsigned", "input": address(operand.words), "packed": address(packed),
            "activation": ACTIVATIONS[activation], "channels_last": layout == torch.channels_last,
            "threshold": address(value), "flip": address(flip),
        }  # fmt: skip
        kept = []
        for name, factor in (("scale", scale), ("bias", bias), ("pixel_scale", pixel_scale)):
            kept.append(None if factor is None else factor.contiguous())
            request[name] = (address(kept[-1]), 0 if factor is None else FACTORS[factor.dtype])

        def run() -> Tensor:
            if output == "packed":
                result, kind = poison((N, 1, OH, OW, words_for(weight.shape[0])), torch.int32), 1
            else:
                wanted = torch.int32 if output == "int32" else dtype
                result, kind = poison((N, weight.shape[0], OH, OW), wanted, layout), OUTPUTS[wanted]
            asked = {**request, "output": address(result), "output_type": kind}
            self.chosen = self.module.hopper_plan(asked)
            if self.plan is not None:
                asked["plan"] = self.plan
            wrong, self.matrices, self.conflicts = self.module.run(asked)
            assert wrong is None, wrong
            return result

        found = self._in_all_orders(run)
        return PackedTensor(found, weight.shape[0]) if output == "packed" else found
