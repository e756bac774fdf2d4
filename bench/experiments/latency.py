"""Milliseconds of the networks that the experiments ended with, beside the dense one, call by call in turn."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import basisconv_kernels as bk
from basisconv_kernels.core import timing
from bench.experiments import setting
from bench.experiments.run import finished, untrained
from bench.experiments.table import TABLE, Experiment
from bench.harness import machine

BATCHES = (1, 16)


def measure(folder: Path, weights: Path, seconds: float) -> list[dict[str, Any]]:
    """One row for each network kind and batch size: {experiment: ms a call}, the dense network under ``dense``.

    An experiment is timed with the network of the first seed that is at hand; without one, with what conversion alone
    makes of its start, if that is at hand and a network with weights: layer by layer and from random weights nothing is
    converted without training.

    Args:
        folder: where ``run`` put its networks.
        weights: folder of the published weights.
        seconds: for each network.
    """
    rows = []
    for kind in dict.fromkeys(experiment.network for experiment in TABLE):
        example = torch.randn(setting.EXAMPLE, generator=torch.Generator().manual_seed(0))
        networks: dict[str, nn.Module] = {}
        origins: dict[str, str] = {}
        for experiment in TABLE:
            if experiment.network != kind or experiment.dense:
                continue
            if (found := _network(experiment, folder, weights)) is not None:
                networks[experiment.name], origins[experiment.name] = found
        if not networks:
            continue
        networks = {"dense": setting.network(kind, 0), **networks}
        forms = [_inference(network, example) for network in networks.values()]
        for batch in BATCHES:
            images = torch.randn(batch, *setting.EXAMPLE[1:]).contiguous(memory_format=torch.channels_last)
            calls = {name: functools.partial(form, images) for name, form in zip(networks, forms, strict=True)}
            with torch.inference_mode():
                taken = timing.interleave(calls, seconds * len(calls))
            rows.append(
                {
                    "network": kind,
                    "batch": batch,
                    "networks": origins,
                    "ms": {name: round(series.scaled(1e3).spread().median, 4) for name, series in taken.items()},
                    "disturbed": round(timing.disturbed(taken.values()), 3),
                    "threads": torch.get_num_threads(),
                    "dtype": "float32",
                    "form": "channels_last, BatchNorm and ReLU folded",
                    "device": machine.device(),
                    "versions": machine.versions(),
                    "git": machine.commit(),
                    "finished": machine.now(),
                }
            )
    return rows


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, after what older ones tell of networks that the new ones lack, each beside its own dense one."""
    known = {name for row in new for name in row["ms"]} - {"dense"}
    kept = []
    for row in old:
        row = row | {"ms": {name: ms for name, ms in row["ms"].items() if name not in known}}
        if "networks" in row:
            row["networks"] = {name: origin for name, origin in row["networks"].items() if name not in known}
        kept.append(row)
    return [*(row for row in kept if row["ms"].keys() - {"dense"}), *new]


def _network(experiment: Experiment, folder: Path, weights: Path) -> tuple[nn.Module, str] | None:
    """A network of an experiment's sizes, and which."""
    for seed in experiment.seeds:
        with contextlib.suppress(FileNotFoundError):
            return finished(experiment.name, seed, folder), f"seed {seed}"
    if experiment.layerwise is None and experiment.start != "random":
        with contextlib.suppress(FileNotFoundError):
            return untrained(experiment.name, weights, folder), "untrained"
    return None


def _inference(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """As it would be served: eval mode, channels_last, bits frozen, what follows a convolution inside it."""
    network = bk.freeze_bits(network.eval()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return bk.fold_batchnorm(network, example)[0]
