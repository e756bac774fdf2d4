"""What must hold of a compressed network; each check gives a row of numbers, or raises with what is wrong."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels import testing
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.report import CompressionReport
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.compare import plain

Row = dict[str, Any]
FULL = BasisConfig(fraction=1.0, keep_dense="never")
QUARTER = BasisConfig(fraction=0.25, keep_dense="never")
LEAST_DIFFERENCE = 0.01  # of the outputs of two images: below it, a network would hide what its layers do


def off(got: Tensor, exact: Tensor) -> float:
    """The largest difference as a share of the largest number, as ``testing.check_same_network`` counts it."""
    return ((got.double() - exact.double()).abs().max() / exact.abs().max()).item()


def verdicts(dense: nn.Module, small: nn.Module, report: CompressionReport) -> Row:
    """How many convolutions were changed, and why the others were not; every one must have its row, and be that."""
    convolutions = {name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)}
    if {row.name for row in report.layers} != convolutions:
        raise AssertionError("the report's layers are not the convolutions of the network")
    for row in report.layers:
        same = type(small.get_submodule(row.name)) is type(dense.get_submodule(row.name))
        if same == row.replaced or (row.verdict == "kept" and not row.reason):
            raise AssertionError(f"{row.name}: {row.verdict}, {row.reason!r}, is a {small.get_submodule(row.name)}")
    kept = [row.reason for row in report.layers if row.verdict == "kept"]
    return {"convolutions": len(convolutions), "changed": len(convolutions) - len(kept), "kept": dict(Counter(kept))}


@torch.no_grad()
def full_rank(dense: nn.Module, image: Tensor) -> Row:
    """At full rank the network gives what the dense one gives, and every layer keeps the contract of its op."""
    exact = copy.deepcopy(dense).double()(image.double())
    if off(exact[:1], exact[1:]) < LEAST_DIFFERENCE:
        raise AssertionError("the outputs of two images are the same: this says nothing of the layers")
    image, exact = image[:1], exact[:1]
    small, report = compress(dense, FULL, example_inputs=image)
    row = verdicts(dense, small, report)
    for dtype in (torch.float32, torch.bfloat16):
        net, beside = copy.deepcopy(small).to(dtype), copy.deepcopy(dense).to(dtype)
        shares: list[float] = []
        for name, layer in net.named_modules():
            if isinstance(layer, BasisConv2d):
                layer.register_forward_hook(_contract(name, shares))
        got = net(image.to(dtype))
        testing.check_same_network(got, exact)
        dense_off = off(beside(image.to(dtype)), exact)
        row[str(dtype)] = {"off": off(got, exact), "dense_off": dense_off, "layer": max(shares)}
    folded, folds = fold_batchnorm(small, image)
    testing.check_same_network(folded(image), exact)
    return {**row, "folded": len(folds.chains)}


def _contract(name: str, shares: list[float]) -> Callable[..., None]:
    """A hook that holds a layer's result to both rules of docs/correctness.md, on the input that it had."""

    def hook(layer: BasisConv2d, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, mixing, bias = arguments[0], layer.basis_weight, layer.coefficients, layer.bias
        (N, C, H, W), (Q, _, R, S) = x.shape, weight.shape
        problem = Conv2dProblem(
            C, Q, mixing.shape[0], R, S, N, H, W, layer.stride, layer.pad_amounts, layer.dilation, layer.groups,
            compact=layer.groups > 1 and mixing.shape[1] < Q, dtype=x.dtype,
        )  # fmt: skip
        bound = tolerances.forward_bound(problem, x, weight, mixing, bias, None)
        error = (output.double() - bound.expected).abs()
        beside = plain(testing.Case(name, "", problem), (x, weight, mixing, bias, None))
        worst, mean = tolerances.allowed_beside_plain((beside.double() - bound.expected).abs(), bound, x.dtype)
        share = (error / bound.allowed).max().item()
        if not (share <= 1 and error.max().item() <= worst and tolerances.mean_square(error) <= mean):
            raise testing.Mismatch(f"{name} [{problem}]: {share:.3g} of what rule 1 allows, worst {error.max():.3g}")
        shares.append(share)

    return hook


@torch.no_grad()
def quarter(dense: nn.Module, fresh: nn.Module, image: Tensor, path: Path) -> Row:
    """At Q = K/4 the file has the bytes of the formula, and gives the same outputs again."""
    small, report = compress(dense, QUARTER, example_inputs=image)
    replaced = {row.name for row in report.replaced}
    parameters = sum(p.numel() for p in dense.parameters())
    buffers = sum(b.numel() * b.element_size() for b in dense.buffers())
    expected = parameters
    for name, conv in dense.named_modules():
        if name in replaced:
            K, D = conv.weight.shape[0], conv.weight[0].numel()
            Q = min(math.ceil(math.ceil(K / 4) / conv.groups), K // conv.groups, D)  # of each group
            expected += Q * conv.groups * D + K * Q - K * D
    same_again(small, fresh, image, path)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    if size != header + 4 * expected + buffers:
        raise AssertionError(f"{size} bytes where the formula gives {header} + 4·{expected} + {buffers}")
    sizes = {"bytes": size, "header": header, "buffers": buffers, "formula": 4 * expected, "dense": 4 * parameters}
    return verdicts(dense, small, report) | sizes


def same_again(small: nn.Module, fresh: nn.Module, image: Tensor, path: Path, **how: Any) -> None:
    """Saved and loaded into a fresh dense network, the outputs have the same bits."""
    save(small, path)
    if not torch.equal(load(path, fresh, **how).eval()(image), small(image)):
        raise AssertionError("the outputs after saving and loading differ")


@torch.no_grad()
def without_what_went(dense: nn.Module, small: nn.Module) -> nn.Module:
    """The dense network with zeros where its layers read channels that ``small`` lacks.

    Which those are is read off the weights alone: they are random, so a column that stayed is found by its numbers.
    """
    zeroed = copy.deepcopy(dense)
    for name, module in zeroed.named_modules():
        after = small.get_submodule(name)
        if isinstance(module, nn.Linear):
            module.weight[:, ~_stayed(name, module.weight, after.weight)] = 0
        elif isinstance(module, nn.Conv2d) and module.groups < module.in_channels:
            for whole, part in zip(module.weight.chunk(module.groups), after.weight.chunk(module.groups), strict=True):
                whole[:, ~_stayed(name, whole, part)] = 0
    return zeroed


def _stayed(name: str, whole: Tensor, part: Tensor) -> Tensor:
    stayed, c = torch.zeros(whole.shape[1], dtype=torch.bool), 0
    for j in range(part.shape[1]):
        while c < whole.shape[1] and not torch.isin(part[:8, j], whole[:, c]).all():
            c += 1
        if c == whole.shape[1]:
            raise AssertionError(f"{name}: column {j} of the pruned weight is none of the dense one")
        stayed[c] = True
        c += 1
    return stayed


def contract_of_signs(dense: nn.Conv2d, weight: Tensor, shares: list[float]) -> Callable[..., None]:
    """A hook that compares a layer with a convolution of the signs of its input with ``weight`` in float64."""

    def hook(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        norm = getattr(layer, "input_norm", None)
        x = arguments[0] if norm is None else norm(arguments[0])
        ones = torch.ones((), dtype=torch.float64)
        x = F.pad(torch.where(x >= 0, ones, -ones), [p for p in reversed(dense.padding) for _ in range(2)])
        bias = None if dense.bias is None else dense.bias.double()
        expected = F.conv2d(x, weight.double(), bias, dense.stride, 0, dense.dilation, dense.groups)
        testing.check_same_layer(output, expected)
        shares.append(off(output, expected))

    return hook
