"""What a call of ``basis_conv2d`` should take on a GPU, fused and as two library kernels, where it was not measured.

The choice sees no batch and no map size, so this is the time an output pixel takes when there are many, in nanoseconds.
A kernel takes the longest of three: its products at the rate of the arithmetic, what it moves to and from memory, and
what it fetches from the second-level cache, where a convolution reads each input pixel once a tap for each tile::

    refill = (BM + filters of a tile) · R·S·C · bytes / BM

Our CUDA kernels keep the halo of a tile in shared memory and so fetch each of its pixels once; the basis again for each
tile, unless it stays there too. That of compute capability 9.0 feeds its matrix instructions through shared memory at
16 clocks a step, which few filters do not cover. The other kernel runs at half the rate there.

Two library kernels are the R×S convolution with tiles of 128 pixels × 256 filters and the 1×1 convolution, the maps
between them written and read. Ours pads Q to a power of two and C to a block, computes Z anew for each chunk of outputs
where it works in parts, and reaches a share of what the formulas say. Only the ratio of the two times matters; it
hardly depends on the device, so one row of rates serves all.

The formulas leave out what launches, latencies and a half-filled device cost, so their ratio is corrected by what was
measured of the nearest weights: by the least favourable of those entries. Where none are near, by the least favourable
of all. So a kernel is predicted to be faster only where it was measured to be, or is by more than the model was wrong.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from basisconv_kernels.core import tuning
from basisconv_kernels.core.problem import Conv2dProblem

OP = "basis_conv2d"

# Of one H200: operations and bytes a nanosecond. The 16-bit and memory rates were measured, the others are from data
# sheets, the cache from a public measurement.
OPERATIONS = {"half": 790e3, "tf32": 395e3, "float32": 60e3}
MEMORY = 4300.0
CACHE = 8000.0
# The share that our kernel reaches: 30 % of the floor where a refill-bound kernel stops at 33 %, and alike above.
# Products without matrix instructions are not what Triton is good at.
REACHED = {"half": 0.9, "tf32": 0.9, "float32": 0.5}
LIBRARY_TILE = (128, 256)  # pixels × filters
# The CUDA kernels: pixels of a tile, the share of the matrix rate of the device, and of what the formulas say.
HOPPER_TILE, HOPPER_RATE = (16, 8), 1.0
AMPERE_TILE, AMPERE_RATE = (8, 8), 0.5
CUDA_REACHED = 0.7
RESIDENT = 120 * 1024  # bytes of the basis that stay beside two halo tiles


def two_kernels(p: Conv2dProblem, arithmetic: str) -> float:
    """Nanoseconds an output pixel of the two convolutions of a library."""
    size = _bytes(p)
    pixels, filters = LIBRARY_TILE
    fetched = (pixels + min(p.Q // p.groups, filters)) * p.taps * p.groups * size / pixels
    moved = (p.C * p.stride[0] * p.stride[1] + p.Q) * size
    first = max(2 * p.Q * p.taps / OPERATIONS[arithmetic], moved / MEMORY, fetched / CACHE)
    second = max(2 * p.K * p.mixed / OPERATIONS[arithmetic], (p.Q + p.K) * size / MEMORY)
    return first + second


def triton(p: Conv2dProblem, arithmetic: str) -> float:
    """Nanoseconds an output pixel of our kernel, on the widest tile of the path that the weights allow."""
    from basisconv_kernels.triton_kernels import configs

    size = _bytes(p)
    Q, C, K = p.Q // p.groups, p.C // p.groups, p.K // p.groups if p.compact else p.K
    many = 2**24
    even = (2, 2)  # the sizes are open: the better case
    capability = configs.HOPPER.capability
    if configs.against_descriptors(arithmetic, C, Q, even, p.stride, p.groups, capability) is None:
        tile, split = configs.descriptor_tile(arithmetic, Q, C, K, many, p.stride[0], configs.HOPPER), False
    else:
        tile, split = configs.pointer_tile(arithmetic, Q, C, K, many, configs.HOPPER)
    split = split or p.groups > 1
    blocks = -(-Q // tile.BQ) * (1 if p.compact else p.groups)  # of basis filters that an output mixes
    again = -(-K // tile.BL) * (p.groups if p.compact else 1) if split else 1
    length = p.R * p.S * -(-C // tile.BK) * tile.BK
    mixing = 2 * (-(-K // tile.BL) * tile.BL) * tile.BQ * blocks * (p.groups if p.compact else 1)
    products = 2 * length * tile.BQ * blocks * again + mixing
    filters = min(Q, tile.BQ)  # rows past the last are zeros that nobody fetches
    fetched = (tile.BM + filters) * length * blocks * again * size / tile.BM
    moved = (p.C * p.stride[0] * p.stride[1] + p.K) * size
    return max(max(products / OPERATIONS[arithmetic], fetched / CACHE) / REACHED[arithmetic], moved / MEMORY)


def cuda(p: Conv2dProblem) -> float:
    """Nanoseconds an output pixel of our CUDA kernel; groups are problems of their own, one after the other."""
    Q, C, K = p.Q // p.groups, p.C // p.groups, p.K // p.groups
    hopper = p.channels_last and C % 8 == 0 and Q <= 128 and not p.precise and p.groups == 1
    (high, wide), rate = (HOPPER_TILE, HOPPER_RATE) if hopper else (AMPERE_TILE, AMPERE_RATE)
    Q16, depth, outputs = 1 << max(4, (Q - 1).bit_length()), -(-C // 64) * 64, -(-K // 64) * 64
    rows = (high - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1
    columns = (wide - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1
    basis = p.R * p.S * depth * Q16 * 2
    again = 0 if hopper and basis <= RESIDENT else basis
    fetched = (rows * columns * depth * 2 + again + Q16 * outputs * 2) / (high * wide)
    feed = max(1.0, (16 + Q16 / 4) / (Q16 / 2)) if hopper else 1.0
    products = 2 * (p.R * p.S * depth * feed + outputs) * Q16 / rate
    moved = (C * p.stride[0] * p.stride[1] + K) * 2
    longest = max(max(products / OPERATIONS["half"], fetched / CACHE) / CUDA_REACHED, moved / MEMORY)
    return longest * p.groups


# --- the model, corrected by measurements -----------------------------------------------------------------------------

NEAR = 2.0  # octaves of C, Q and K together, up to which weights are near enough to stand for others
STATED = ("C", "Q", "K", "R", "S", "groups", "compact", "channels_last", "precise")


def relative_times(p: Conv2dProblem) -> dict[str, float]:
    """{backend: its time over that of two library kernels} on a GPU by the formulas alone."""
    from basisconv_kernels.triton_kernels import configs

    if p.device != "cuda" or p.dtype == torch.float64:
        return {}
    ours_in, theirs_in = (configs.arithmetic_of(dtype, p.precise) for dtype in (p.dtype, _library_dtype(p)))
    theirs = two_kernels(p, theirs_in)
    ours = {"triton": triton(p, ours_in), **({"cuda": cuda(p)} if _bytes(p) == 2 else {})}
    return {name: ns / theirs for name, ns in ours.items()}


class Correction(NamedTuple):
    """What a predicted relative time is multiplied by, and of which measurement it is, in words."""

    factor: float
    of: str


def corrections(p: Conv2dProblem, op: str = OP) -> dict[str, Correction]:
    """{backend: the least favourable correction} by the nearest measured weights, or by all where none are near."""
    found: dict[str, list[tuple[float, Correction]]] = {}
    for entry in tuning.measured_on_gpus(op):
        measured = _of_entry(entry["problem"])
        plain = entry["ms"].get(tuning.PLAIN)
        if measured is None or not plain:
            continue
        predicted, distance = relative_times(measured), _distance(p, measured)
        for backend, spread in entry["ms"].items():
            if backend in predicted and plain["median"] and predicted[backend]:
                factor = spread["median"] / plain["median"] / predicted[backend]
                of = f"{measured.C}→{measured.Q}→{measured.K}, {tuning.circumstances(entry)}"
                found.setdefault(backend, []).append((distance, Correction(factor, of)))
    return {backend: _least_favourable(each) for backend, each in found.items()}


def _least_favourable(each: list[tuple[float, Correction]]) -> Correction:
    nearest = min(distance for distance, _ in each)
    if nearest <= NEAR:
        each = [(distance, correction) for distance, correction in each if distance == nearest]
    return max((correction for _, correction in each), key=lambda correction: correction.factor)


def _of_entry(stated: dict[str, Any]) -> Conv2dProblem | None:
    """The problem of an entry; None where a file states another kind."""
    try:
        known: dict[str, Any] = {name: stated[name] for name in STATED}
        pairs: dict[str, Any] = {name: tuple(stated[name]) for name in ("stride", "padding", "dilation")}
        problem = Conv2dProblem(**known, **pairs, dtype=getattr(torch, stated["dtype"]), device="cuda")
    except (KeyError, TypeError, AttributeError):
        return None
    return problem if min(problem.C, problem.Q, problem.K, problem.R, problem.S, problem.groups) > 0 else None


def _distance(p: Conv2dProblem, other: Conv2dProblem) -> float:
    """Octaves between the sizes of two weights; infinite where other code runs."""

    def kind(p: Conv2dProblem) -> tuple[Any, ...]:
        return p.R, p.S, p.stride, p.dilation, p.groups, p.compact, p.channels_last, p.precise, _bytes(p)

    if kind(p) != kind(other):
        return math.inf
    return sum(abs(math.log2(getattr(p, size) / getattr(other, size))) for size in ("C", "Q", "K"))


class Prediction(NamedTuple):
    """The time of a backend over that of two library kernels, and how that was found, in words."""

    relative: float
    how: str

    def __str__(self) -> str:
        return f"{self.relative:.2f} times theirs ({self.how})"


def predictions(p: Conv2dProblem) -> dict[str, Prediction]:
    """{backend: what it should take on a GPU}; empty elsewhere."""
    relative, found = relative_times(p), {}
    correcting = corrections(p) if relative else {}
    for backend, uncorrected in relative.items():
        factor, of = correcting.get(backend, (1.0, ""))
        how = f"a model, corrected by {factor:.2f} as measured of {of}" if of else "a model"
        found[backend] = Prediction(uncorrected * factor, how)
    return found


def predicted_slower(p: Conv2dProblem) -> dict[str, str]:
    """{backend: by how much, in words} of those that should be slower than two library kernels on a GPU."""
    slow = {backend: found for backend, found in predictions(p).items() if found.relative > 1}
    return {backend: f"predicted slower than two library kernels, {found}" for backend, found in slow.items()}


# --- the verdicts -----------------------------------------------------------------------------------------------------


def slower_than_plain(problem: Conv2dProblem) -> dict[str, str]:
    """{backend: by how much, in words} of those slower than plain PyTorch: as measured, else on a GPU as predicted."""
    known = {backend for entry in tuning.entries_for(OP, problem) for backend in entry["ms"]}
    if problem.device != "cuda":
        return tuning.slower(OP, problem)
    predicted = {name: words for name, words in predicted_slower(problem).items() if name not in known}
    return {**predicted, **tuning.slower(OP, problem)}


def slower_in_training(problem: Conv2dProblem, ways: tuple[str, ...] = tuning.WAYS) -> dict[str, str]:
    """{backend: why, in words} of those that a training step on a GPU passes over: measured slower, or not measured.

    A step's backward is the library's in any case, so there is little to win where nobody looked.
    """
    entries = tuning.entries_for(OP, problem, tuning.TRAINING)
    known = {backend for entry in entries if entry.get("way") in ways for backend in entry["ms"]}
    unknown = dict.fromkeys(("cuda", "triton"), "no training step with these weights was measured")
    measured = tuning.slower(OP, problem, tuning.TRAINING, ways)
    return {**{name: words for name, words in unknown.items() if name not in known}, **measured}


def _library_dtype(p: Conv2dProblem) -> torch.dtype:
    return torch.float32 if p.precise else p.dtype


def _bytes(p: Conv2dProblem) -> int:
    return 4 if p.dtype == torch.float32 else 2
