"""The checkpoint of ``finetune``: a whole run at one moment, without pickle, written all at once.

A safetensors file with one JSON document in its metadata and a digest of the whole, as ``container`` writes models.
Its tensors: ``model.*`` and ``best.*`` (state_dicts: now, and of the best epoch), ``held.N`` (of optimiser, scheduler
and loss scaler, whose structure is in the document), ``random.N`` (of the generators of process N).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.compression import container
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError

KIND = "fine-tuning"
PARTS = ("model", "best", "held", "random")
FIELDS = {"kind", "configuration", "position", "held"}


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epoch, step: done; ``epoch`` counts whole epochs, ``step`` the steps of the one at work.
        tally: the sums of the epoch at work.
        history: the records of the epochs done, as mappings.
        best: (epoch, validation) of the best so far, or empty.
        done: whether nothing is left to do.
    """

    epoch: int = 0
    step: int = 0
    tally: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    done: bool = False


@dataclass
class State:
    """Everything of a run but its configuration.

    Attributes:
        position: where it is.
        model, best: state_dicts; ``best`` is empty where no epoch was chosen yet.
        held: {name: state_dict} of optimiser, scheduler and loss scaler.
        random: {process: state of its generator}.
    """

    position: Position
    model: dict[str, Tensor]
    best: dict[str, Tensor]
    held: dict[str, Any]
    random: dict[str, Tensor]


def write(path: str | os.PathLike[str], fixed: Mapping[str, Any], state: State) -> None:
    """Write the file; at every moment the path names the old state or the new one.

    Raises:
        TypeError: an optimiser or scheduler holds what no file can: something other than tensors, numbers and text.
    """
    found: list[Tensor] = []
    structure = flatten(state.held, found)
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": state.model,
        "best": state.best,
        "held": {str(i): tensor for i, tensor in enumerate(found)},
        "random": state.random,
    }
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for part, held in parts.items()
        for name, tensor in held.items()
    }
    document = {"kind": KIND, "configuration": dict(fixed), "position": asdict(state.position), "held": structure}
    write_atomically(path, container.encode(document, tensors))


def read(path: str | os.PathLike[str], fixed: Mapping[str, Any]) -> State | None:
    """The state in a file; None where there is no file.

    Raises:
        FileFormatError: the file is damaged or no checkpoint.
        ArchitectureError: it is of a run with another configuration; names what differs.
    """
    source = f"finetune: {os.fspath(path)}"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    document, tensors = container.decode(content, source)
    if document.get("kind") != KIND or set(document) != FIELDS:
        raise FileFormatError(f"{source}: holds no checkpoint of fine-tuning; name another file as checkpoint")
    stored = document["configuration"]
    if stored != dict(fixed):
        differing = sorted(k for k in {*stored, *fixed} if stored.get(k) != fixed.get(k))
        raise ArchitectureError(
            f"{source}: belongs to a run with another {', '.join(differing)}; go on with that configuration, or name "
            "another file to start anew"
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    try:
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        held = restore(document["held"], parts["held"])
        return State(Position(**document["position"]), parts["model"], parts["best"], held, parts["random"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{source}: edited: its position does not fit this version: {error}") from error


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """JSON for a tree of mappings, lists, tuples, numbers, text and tensors; these are put into ``tensors``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        return {"mapping": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return [flatten(v, tensors) for v in value]
    raise TypeError(
        f"finetune: a checkpoint cannot hold a {type(value).__name__}, which the optimiser or the scheduler keeps in "
        "its state; use another one, or none with a checkpoint"
    )


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree of which ``flatten`` made JSON."""
    if isinstance(value, list):
        return [restore(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(restore(v, tensors) for v in inner)
    if kind == "mapping":
        return {restore(k, tensors): restore(v, tensors) for k, v in inner}
    raise ValueError(f"unknown kind {kind!r}")
