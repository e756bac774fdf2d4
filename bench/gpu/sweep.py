"""``make gpu-probe``, tiles of ``basis_conv2d`` in Triton: all that fit a layer, each checked, then timed in a graph.

The table in ``triton_kernels/configs.py`` is chosen from these rows. Processes compile all candidates of all layers
first, into Triton's cache; one that does not launch says why, a wrong one fails the step of its layer.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core.problem import Conv2dProblem
from bench.gpu import facts
from bench.gpu.journal import Step, Unavailable
from bench.gpu.layers import RESNET, SHARES, VGG, Layer, Prepared
from bench.gpu.timing import CudaMeter, Meter, bytes_of, eager_spread

# Where few filters meet many pixels, many filters few pixels, and one image.
LAYERS = (
    *(Layer(C, K, side, 32, share) for C, K, side in RESNET for share in SHARES),
    *(Layer(C, K, side, N, share) for N in (128, 1) for C, K, side in RESNET for share in SHARES),
    *(Layer(C, K, side, 32, share) for C, K, side in VGG[:2] for share in SHARES),
)
SAMPLES = 11
PARTS = 3  # processes that share a layer's candidates
# Of each path: pixels, channels a step, outputs a chunk, warps, stages; BQ comes from the layer.
POINTERS = (
    (256, 64, 32, 4, 3),
    (128, 64, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 32, 64, 4, 5),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 6),
    (64, 128, 64, 4, 3),
    (32, 64, 64, 4, 5),
    (16, 128, 64, 4, 4),
)
DESCRIPTORS = (
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 5),
    (64, 64, 32, 4, 4),
    (64, 128, 64, 4, 3),
    (32, 64, 64, 4, 4),
    (32, 64, 64, 4, 8),
    (32, 128, 64, 4, 4),
    (16, 64, 64, 4, 8),
    (16, 64, 128, 4, 6),
    (16, 128, 64, 4, 5),
)
SUMS_A_THREAD = 128  # registers for Zᵀ: half of what a thread has


def candidates(p: Conv2dProblem, device: Any) -> Iterator[tuple[str, Any]]:
    """(path, tile) of what a layer may run on: the table's own choice of each path first, then all forms that fit."""
    from basisconv_kernels.triton_kernels import configs

    arithmetic = configs.HALF
    pixels = p.N * p.output_size[0] * p.output_size[1]
    pointers, split = configs.pointer_tile(arithmetic, p.Q, p.C, p.K, pixels, device)
    sizes = (p.H, p.W)
    if configs.against_descriptors(arithmetic, p.C, p.Q, sizes, p.stride, p.groups, device.capability) is None:
        own = configs.descriptor_tile(arithmetic, p.Q, p.C, p.K, pixels, p.stride[0], device)
        yield "descriptors", own
        for BM, BK, BL, warps, stages in DESCRIPTORS:
            tile = configs.Tile(BM, own.BQ, BK, BL, warps, stages)
            fits = configs.fitted(tile, p.C, p.K, arithmetic, device) == tile
            if fits and tile != own and SUMS_A_THREAD * 32 * warps >= BM * own.BQ:
                yield "descriptors", tile
    if split:
        return
    yield "pointers", pointers
    for BM, BK, BL, warps, stages in POINTERS:
        tile = configs.fitted(configs.Tile(BM, pointers.BQ, BK, BL, warps, stages), p.C, p.K, arithmetic, device)
        if tile != pointers and SUMS_A_THREAD * 32 * warps >= BM * tile.BQ:
            yield "pointers", tile


def named(path: str, tile: Any) -> str:
    """As the rows of the table are named."""
    return f"{path} {tile.BM}×{tile.BQ}×{tile.BK}×{tile.BL} {tile.warps} warps {tile.stages} stages"


def tiles(layer: Layer, device: str, meter: Meter) -> dict[str, Any]:
    """Microseconds of each candidate, the fastest first; ``chosen`` is the table's own.

    Raises:
        AssertionError: some candidate is wrong; the message has the times of all.
        Unavailable: the layer has none.
    """
    from basisconv_kernels.triton_kernels import basis_conv2d as kernels

    meter.forget()
    with torch.inference_mode():
        prepared = Prepared(layer, device)
        p = prepared.p
        assert isinstance(p, Conv2dProblem)
        runs = {
            named(path, tile): functools.partial(_forward, prepared, path, tile)
            for path, tile in candidates(p, kernels.device_of(prepared.input(0).device.index))
        }
        if not runs:
            raise Unavailable("no row of the table takes this layer")
        prepared._functions.update(runs)
        found, wrong, refused = {}, {}, {}
        for name, run in runs.items():
            against = _first_call(prepared, run)
            if against is not None:
                refused[name] = against
                continue
            try:
                prepared.check(name)
            except AssertionError as error:
                wrong[name] = str(error)
            found[name] = _microseconds(prepared, name, meter)
    times = {name: round(us, 2) for name, us in sorted(found.items(), key=lambda pair: pair[1])}
    if wrong:
        raise AssertionError(f"wrong: {json.dumps(wrong)}; µs of all: {json.dumps(times)}")
    return {"layer": layer.name, "chosen": next(iter(runs)), "us": times, "refused": refused}


def _forward(prepared: Prepared, path: str, tile: Any, x: Tensor) -> Tensor:
    from basisconv_kernels.triton_kernels import basis_conv2d as kernels

    p = prepared.p
    weights = (prepared.basis, prepared.mixing, prepared.bias)
    return kernels.forward(
        x, *weights, None, p.stride, p.padding, p.dilation, p.groups, p.activation, False, path=path, tile=tile
    )


def _first_call(prepared: Prepared, run: Callable[[Tensor], Tensor]) -> str | None:
    """Compile and launch; why not, where it does not."""
    try:
        run(prepared.input(0))
    except Exception as error:  # whatever a compiler or a driver may raise costs this candidate, not the step
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _microseconds(prepared: Prepared, name: str, meter: Meter) -> float:
    x = prepared.input(0)
    p = prepared.p
    if not isinstance(meter, CudaMeter):
        return eager_spread([prepared.call(name, 0)], 1, lambda: None, 1).median
    moved = bytes_of(x) + x.element_size() * p.N * p.K * p.output_size[0] * p.output_size[1]
    return meter.replayed([prepared.call(name, i) for i in range(meter.copies(moved))]).median


def compiled(layers: Sequence[Layer], device: str, workers: int | None = None) -> dict[str, Any]:
    """Compile all candidates of all layers in processes of their own; how many there are."""
    jobs = [(layer, device, part) for layer in layers for part in range(PARTS)]
    workers = workers or max(1, (os.cpu_count() or 1) - 2)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return {"candidates": sum(pool.map(_compile, jobs)), "processes": workers}


def _compile(job: tuple[Layer, str, int]) -> int:
    from basisconv_kernels.triton_kernels import basis_conv2d as kernels

    layer, device, part = job
    with torch.inference_mode():
        prepared = Prepared(layer, device)
        assert isinstance(prepared.p, Conv2dProblem)
        own = list(candidates(prepared.p, kernels.device_of(prepared.input(0).device.index)))[part::PARTS]
        for path, tile in own:
            _first_call(prepared, functools.partial(_forward, prepared, path, tile))  # the layer's step says why not
    return len(own)


def steps(about: Mapping[str, Any]) -> list[Step]:
    """One for all compilations, then one a layer."""
    stamp = facts.stamp(dict(about), ours=True)
    meter = CudaMeter(SAMPLES)
    run = functools.partial(compiled, LAYERS, "cuda")
    found = [Step("tiles, compiled", run, 60, 240, stamp)]
    for layer in LAYERS:
        found.append(Step(f"tiles {layer.name}", functools.partial(tiles, layer, "cuda", meter), 4, 90, stamp))
    return found
