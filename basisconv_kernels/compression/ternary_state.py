"""The state file of layer-wise training: a whole run at one moment, without pickle, written all at once.

A safetensors file with one JSON document in its metadata and a digest of the whole, as ``container`` writes models.
Its tensors: ``model.*`` and ``snapshot.*`` (state_dicts: now, and before the layer at work was constrained), ``mask.*``
by layer, ``momentum.*`` by parameter, ``random`` (of PyTorch's generator).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.compression import container
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError

KIND = "layerwise training"
PARTS = ("model", "snapshot", "mask", "momentum")


@dataclass
class Position:
    """Where a run is.

    Attributes:
        stage: −1 while pruned weights are fine-tuned, then the place in ``order`` of the layer at work.
        epoch, step: the next to do within the stage.
        baseline: accuracy of the dense network; ``pruned``: after pruning and its fine-tuning.
        order: names of layers, the first to constrain first.
        accepted: {name: accuracy} of the layers that stay constrained.
        rejected: {name: accuracy} of those taken back.
        history: (stage, epoch, steps, mean loss) of the epochs done; ``losses``: (steps, Σ loss) of the one at work.
        done: whether nothing is left to do; ``final``: the accuracy then; ``stopped``: why no further layer was tried.
    """

    stage: int = -1
    epoch: int = 0
    step: int = 0
    baseline: float = 0.0
    pruned: float = 0.0
    order: list[str] = field(default_factory=list)
    accepted: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, float] = field(default_factory=dict)
    history: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=lambda: [0, 0.0])
    done: bool = False
    final: float = 0.0
    stopped: str = ""


@dataclass
class State:
    """Everything of a run but its configuration: the position and the tensors by part."""

    position: Position
    tensors: dict[str, dict[str, Tensor]]
    random: Tensor


def write(path: str | os.PathLike[str], fixed: dict[str, Any], state: State) -> None:
    """Write the file; at every moment the path names the old state or the new one."""
    flat = {f"{part}.{name}": t for part, held in state.tensors.items() for name, t in held.items()}
    flat["random"] = state.random
    copies = {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in flat.items()}
    document = {"kind": KIND, "configuration": fixed, "position": asdict(state.position)}
    write_atomically(path, container.encode(document, copies))


def read(path: str | os.PathLike[str], fixed: dict[str, Any]) -> State | None:
    """The state in a file; None where there is no file.

    Raises:
        FileFormatError: the file is damaged or no state file.
        ArchitectureError: it is of a run with another configuration; names what differs.
    """
    source = f"layerwise: {os.fspath(path)}"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    document, tensors = container.decode(content, source)
    if document.get("kind") != KIND or set(document) != {"kind", "configuration", "position"}:
        raise FileFormatError(f"{source}: holds no state of layer-wise training; name another file as state")
    if document["configuration"] != fixed:
        stored = document["configuration"]
        differing = [k for k in {*stored, *fixed} if stored.get(k) != fixed.get(k)]
        raise ArchitectureError(
            f"{source}: belongs to a run with another {', '.join(sorted(differing))}; go on with that configuration, "
            "or name another file to start anew"
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
    try:
        return State(Position(**document["position"]), parts, tensors["random"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{source}: edited: its position does not fit this version: {error}") from error
