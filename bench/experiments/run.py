"""One experiment with one seed: convert, train, judge, and the row that says so. A killed run goes on."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import basisconv_kernels as bk
from basisconv_kernels.compression.finetune_parts import EpochRecord
from basisconv_kernels.compression.model import network_parameters
from basisconv_kernels.compression.survey import survey
from basisconv_kernels.core.disk import write_atomically
from bench.experiments import setting
from bench.experiments.table import BY_NAME, Experiment, Stage
from bench.harness import machine

BATCH = 128


def run(
    experiment: Experiment, seed: int, weights: Path, folder: Path, shorten: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The row of an experiment.

    Args:
        experiment: of the table.
        seed: of data order, augmentation and random weights.
        weights: folder of the published weights.
        folder: where checkpoints and the networks found lie; a second call goes on from there.
        shorten: at most so many steps an epoch, for a look at whether everything runs.
        device: where to train and to judge.
    """
    start, began = time.monotonic(), machine.now()
    dense = _start(experiment, seed, weights, folder).to(device)
    example = torch.randn(setting.EXAMPLE, generator=torch.Generator().manual_seed(0)).to(device)
    context = folder / f"{experiment.name}-{seed}.json"
    known = json.loads(context.read_text(encoding="utf-8")) if context.exists() else {"seconds": 0.0}
    known.setdefault("start", {"test": setting.test_accuracy(dense)})
    write_atomically(context, json.dumps(known).encode())
    row: dict[str, Any] = {"experiment": experiment.name, "question": experiment.question, "seed": seed}
    row |= {"network": experiment.network, "start": experiment.start, "batch": BATCH, "began": began}
    row["start_test_accuracy"] = known["start"]["test"]
    if experiment.layerwise is None:
        model, found = _stages(experiment, dense, seed, folder, example, shorten)
    else:
        model, found = _layerwise(experiment, dense, seed, folder, shorten)
    row |= found
    row["test_accuracy"] = setting.test_accuracy(model)
    model = model.cpu()
    row |= _sizes(experiment, seed, model, example.cpu())
    data, validation = setting.cifar10()
    row["data"] = {"name": data.name, "training": len(data.train.labels), "validation": len(validation.labels)}
    row["data"]["test"] = len(data.test.labels)
    row["seconds"] = round(time.monotonic() - start, 1)  # of this process; a run that was resumed took longer
    row["shortened"] = shorten
    row |= {"threads": torch.get_num_threads(), "autocast": "bfloat16 in training", "finished": machine.now()}
    accelerator = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    row |= {
        "device": machine.device() | {"accelerator": accelerator},
        "versions": machine.versions(),
        "git": machine.commit(),
    }
    bk.save(model, _network_file(experiment.name, seed, folder))
    return row


def _network_file(name: str, seed: int, folder: Path) -> Path:
    """The finished network, for later experiments and for timing."""
    return folder / f"{name}-{seed}.safetensors"


def finished(name: str, seed: int, folder: Path) -> nn.Module:
    """The network that an experiment ended with."""
    path = _network_file(name, seed, folder)
    if not path.exists():
        raise FileNotFoundError(f"experiments: {path.name} is not there; run {name} with seed {seed} first")
    return bk.load(path, setting.network(BY_NAME[name].network, 0), pruned=True)


def _start(experiment: Experiment, seed: int, weights: Path, folder: Path) -> nn.Module:
    if experiment.start == "published":
        made = setting.published(experiment.network, weights)
    elif experiment.start == "random":
        made = setting.network(experiment.network, seed)
    else:
        made = finished(experiment.start, 0, folder)
    return made.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def _stages(
    experiment: Experiment, dense: nn.Module, seed: int, folder: Path, example: Any, shorten: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Convert and train, stage by stage."""
    model, described = dense, []
    for number, stage in enumerate(experiment.stages):
        torch.manual_seed(seed)
        report = None
        if callable(stage.config):
            model = stage.config(model)
        elif stage.config is not None:
            model, report = bk.compress(model, stage.config, example_inputs=example)
        before = setting.test_accuracy(model)
        history = _train(stage, model, seed, folder / f"{experiment.name}-{seed}-{number}.state", shorten)
        best = max(history, key=lambda record: record.validation or 0.0)
        described.append(
            {
                "config": stage.words,
                "epochs": stage.epochs,
                "steps_an_epoch": history[0].steps,
                "lr": stage.lr,
                "orthogonality": stage.orthogonality,
                "test_accuracy_before_training": before,
                "curve": [asdict(record) for record in history],
                "chosen_epoch": best.epoch,
                "validation_accuracy": best.validation,
                "report": None if report is None else report.totals(),
            }
        )
    return model, {"stages": described}


def _train(stage: Stage, model: nn.Module, seed: int, checkpoint: Path, shorten: int | None) -> list[EpochRecord]:
    loader = setting.training(BATCH)
    optimizer = torch.optim.SGD(
        bk.trainable_parameters(model), lr=stage.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    most = min(len(loader), *(count for count in (stage.steps, shorten) if count is not None), len(loader))
    steps = stage.epochs * most
    rising = max(1, round(stage.warm_up * steps)) if stage.warm_up else 0

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return bk.finetune(
        model,
        _Shortened(loader, most),
        epochs=stage.epochs,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        scheduler_step="step",
        orthogonality=stage.orthogonality,
        validate=setting.validation_accuracy,
        checkpoint=checkpoint,
        seed=seed,
        autocast=torch.bfloat16,
        progress=False,
    )


class _Shortened:
    """The first batches of each pass."""

    def __init__(self, loader: Any, most: int) -> None:
        self.loader, self.most, self.generator = loader, most, loader.generator

    def __len__(self) -> int:
        return min(self.most, len(self.loader))

    def __iter__(self) -> Any:
        return (batch for batch, _ in zip(self.loader, range(self.most), strict=False))


def _layerwise(
    experiment: Experiment, dense: nn.Module, seed: int, folder: Path, shorten: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """``train_layerwise`` on the training split, its bound held on the validation split."""
    arguments = dict(experiment.layerwise or {})
    if shorten:
        arguments["max_steps"] = shorten
    config = bk.TernaryConfig(
        loader=setting.training(BATCH),
        evaluate=setting.validation_accuracy,
        seed=seed,
        state=folder / f"{experiment.name}-{seed}.state",
        progress=lambda text: print(text, flush=True),
        **arguments,
    )
    model, report = bk.train_layerwise(dense, config)
    sparse = [row for row in report.constrained if row.ratio >= 16]
    return model, {
        "layerwise": arguments,
        "report": report.to_dict(),
        "layers_16_times_smaller": [len(sparse), len(report.layers)],
        "validation_accuracy": report.final,
    }


def _sizes(experiment: Experiment, seed: int, model: nn.Module, example: Any) -> dict[str, Any]:
    """MACs, parameters and bytes of the dense network and of the one found."""
    twin = setting.network(experiment.network, seed)
    with tempfile.TemporaryDirectory() as name:
        sizes = []
        for network in (twin, bk.freeze_bits(model)):
            bk.save(network, path := Path(name) / "network")
            sizes.append(path.stat().st_size)
    return {
        "macs": [_macs(twin, example), _macs(model, example)],
        "parameters": [network_parameters(twin), network_parameters(model)],
        "learnable": [sum(p.numel() for p in n.parameters() if p.requires_grad) for n in (twin, model)],
        "file_bytes": sizes,
    }


def _macs(network: nn.Module, example: Any) -> int:
    """Multiply-accumulates an image of all convolutions, counted on ordinary layers; of ±1 and ternary weights too."""
    copied = copy.deepcopy(network)
    for layer in copied.modules():
        if isinstance(layer, bk.StackedBinaryConv2d):
            layer.binarize_input = False  # signs or not, the filters are the same
    return sum(layer.dense_macs for layer in survey(bk.to_plain(copied, inplace=True), example))
