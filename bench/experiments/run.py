"""One experiment with one seed: convert, train, judge, and the row that says so. A killed run goes on."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import basisconv_kernels as bk
from basisconv_kernels.compression import epochs
from basisconv_kernels.compression.finetune_parts import EpochRecord
from basisconv_kernels.compression.model import network_parameters
from basisconv_kernels.compression.survey import substitute, survey
from basisconv_kernels.core.disk import write_atomically
from basisconv_kernels.core.registry import use_backend
from bench.experiments import graphed, setting
from bench.experiments.table import BY_NAME, Experiment, Stage
from bench.harness import machine

BATCH = 128


def run(
    experiment: Experiment,
    seed: int,
    weights: Path,
    folder: Path,
    shorten: int | None = None,
    device: str = "cpu",
    resident: bool | None = None,
) -> dict[str, Any]:
    """The row of an experiment.

    Args:
        experiment: of the table.
        seed: of data order, augmentation and random weights.
        weights: folder of the published weights.
        folder: where checkpoints and the networks found lie; a second call goes on from there.
        shorten: at most so many steps an epoch, for a look at whether everything runs.
        device: where to train and to judge.
        resident: train by ``graphed.Trainer``, images and step on the device; such a training starts anew when it was
            killed. Default: on a GPU.
    """
    start, began = time.monotonic(), machine.now()
    on_gpu = torch.device(device).type == "cuda"
    resident = on_gpu if resident is None else resident
    dense = _start(experiment, seed, weights, folder).to(device)
    context = folder / f"{experiment.name}-{seed}.json"
    known = json.loads(context.read_text(encoding="utf-8")) if context.exists() else {"seconds": 0.0}
    known.setdefault("start", {"test": setting.test_accuracy(dense)})
    write_atomically(context, json.dumps(known).encode())
    row: dict[str, Any] = {"experiment": experiment.name, "question": experiment.question, "seed": seed}
    row |= {"network": experiment.network, "start": experiment.start, "batch": _batch(experiment), "began": began}
    row["start_test_accuracy"] = known["start"]["test"]
    if experiment.layerwise is None:
        model, found = _stages(experiment, dense, seed, folder, shorten, resident)
    else:
        model, found = _layerwise(experiment, dense, seed, folder, shorten)
    row |= found
    row["test_accuracy"] = setting.test_accuracy(model)
    model = model.cpu()
    row |= _sizes(experiment, seed, model, _example())
    data, validation = setting.cifar10()
    row["data"] = {"name": data.name, "training": len(data.train.labels), "validation": len(validation.labels)}
    row["data"]["test"] = len(data.test.labels)
    row["seconds"] = round(time.monotonic() - start, 1)  # of this process; a run that was resumed took longer
    row["shortened"] = shorten
    autocast = "bfloat16 in training" if experiment.layerwise is None else None
    row |= {"threads": torch.get_num_threads(), "autocast": autocast, "finished": machine.now()}
    row["resident"] = resident and experiment.layerwise is None
    accelerator = torch.cuda.get_device_name(device) if on_gpu else None
    row |= {
        "device": machine.device() | {"accelerator": accelerator},
        "versions": machine.versions(),
        "git": machine.commit(),
    }
    bk.save(model, _network_file(experiment.name, seed, folder))
    return row


def run_resident(weights: Path, folder: Path, shorten: int | None, device: str, name: str, seed: int) -> dict[str, Any]:
    """The row of an experiment of the table, trained by one thread that feeds a device which others use as well."""
    torch.set_num_threads(1)
    return run(BY_NAME[name], seed, weights, folder, shorten, device, resident=True)


def _batch(experiment: Experiment) -> int:
    return experiment.batch or BATCH


def _example() -> torch.Tensor:
    return torch.randn(setting.EXAMPLE, generator=torch.Generator().manual_seed(0))


def _network_file(name: str, seed: int, folder: Path) -> Path:
    """The finished network, for later experiments and for timing."""
    return folder / f"{name}-{seed}.safetensors"


def finished(name: str, seed: int, folder: Path) -> nn.Module:
    """The network that an experiment ended with."""
    path = _network_file(name, seed, folder)
    if not path.exists():
        raise FileNotFoundError(f"experiments: {path.name} is not there; run {name} with seed {seed} first")
    return bk.load(path, setting.network(BY_NAME[name].network, 0), pruned=True)


def untrained(name: str, weights: Path, folder: Path) -> nn.Module:
    """The network of an experiment's stages without their training: its sizes, or nearly, for timing alone."""
    model = _start(BY_NAME[name], 0, weights, folder)
    for stage in BY_NAME[name].stages:
        model, _ = _converted(stage, model, 0)
    return model


def _converted(stage: Stage, model: nn.Module, seed: int) -> tuple[nn.Module, bk.CompressionReport | None]:
    """What the conversion of a stage makes of a network, and its report where ``compress`` gave one."""
    torch.manual_seed(seed)
    if callable(stage.config):
        return stage.config(model), None
    if stage.config is None:
        return model, None
    return bk.compress(model.cpu(), stage.config, example_inputs=_example())


def _start(experiment: Experiment, seed: int, weights: Path, folder: Path) -> nn.Module:
    if experiment.start == "published":
        made = setting.published(experiment.network, weights)
    elif experiment.start == "random":
        made = setting.network(experiment.network, seed)
    else:
        made = finished(experiment.start, 0, folder)
    return made.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def _stages(
    experiment: Experiment, dense: nn.Module, seed: int, folder: Path, shorten: int | None, resident: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Convert, on the CPU so that ranks are the same everywhere, and train, stage by stage."""
    place = next(dense.parameters()).device
    model, described, batch = dense, [], _batch(experiment)
    teacher = copy.deepcopy(dense).eval().requires_grad_(False) if any(s.distill for s in experiment.stages) else None
    for number, stage in enumerate(experiment.stages):
        model, report = _converted(stage, model, seed)
        model = model.to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        before = setting.test_accuracy(model)
        state = folder / f"{experiment.name}-{seed}-{number}.state"
        history = _train(stage, model, seed, batch, state, shorten, resident, teacher if stage.distill else None)
        best = max(history, key=lambda record: record.validation or 0.0)
        described.append(
            {
                "config": stage.words,
                "epochs": stage.epochs,
                "steps_an_epoch": history[0].steps,
                "lr": stage.lr,
                "optimizer": stage.optimizer,
                "orthogonality": stage.orthogonality,
                "distill": stage.distill,
                "test_accuracy_before_training": before,
                "curve": [asdict(record) for record in history],
                "chosen_epoch": best.epoch,
                "validation_accuracy": best.validation,
                "report": None if report is None else report.totals(),
            }
        )
    return model, {"stages": described}


def _train(
    stage: Stage,
    model: nn.Module,
    seed: int,
    batch: int,
    checkpoint: Path,
    shorten: int | None,
    resident: bool,
    teacher: nn.Module | None,
) -> list[EpochRecord]:
    if teacher is not None and not resident:
        raise ValueError("experiments: a teacher's answers are learned in resident training only, --device cuda")
    place = str(next(model.parameters()).device)
    whole = len(setting.training(batch, place)) if not resident else len(setting.resident(place)) // batch
    most = min(whole, shorten or whole)
    factor = _rates(stage, most)
    parameters = bk.trainable_parameters(model)
    after = _clipper(model)
    if resident:
        rates = [stage.lr * factor(step) for step in range(stage.epochs * most)]
        return _train_resident(stage, model, parameters, rates, seed, batch, most, after, teacher)
    if stage.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=stage.lr, betas=graphed.BETAS)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=stage.lr, momentum=graphed.MOMENTUM, weight_decay=graphed.DECAY, nesterov=True
        )
    return bk.finetune(
        model,
        _Shortened(setting.training(batch, place), most),
        epochs=stage.epochs,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        scheduler_step="step",
        orthogonality=stage.orthogonality,
        validate=setting.validation_accuracy,
        checkpoint=checkpoint,
        seed=seed,
        autocast=torch.bfloat16,
        progress=False if after is None else lambda _: after(),
    )


def _rates(stage: Stage, most: int) -> Callable[[int], float]:
    """Share of the learning rate at each step: a line up, a cosine down to 0."""
    steps = stage.epochs * most
    rising = max(1, round(stage.warm_up * steps)) if stage.warm_up else 0

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _clipper(model: nn.Module) -> Callable[[], None] | None:
    """What keeps latent weights within ±1, as XNOR-Net does; None where there are none."""
    layers = [layer for layer in model.modules() if isinstance(layer, bk.BinaryConv2d)]
    return (lambda: [layer.clip_weights() for layer in layers] and None) if layers else None


def _train_resident(
    stage: Stage,
    model: nn.Module,
    parameters: list[nn.Parameter],
    rates: list[float],
    seed: int,
    batch: int,
    most: int,
    after: Callable[[], None] | None,
    teacher: nn.Module | None,
) -> list[EpochRecord]:
    """By ``graphed.Trainer``; at the end the network is that of the best epoch on the validation images."""
    place = str(next(model.parameters()).device)
    latent = any(isinstance(layer, (bk.BinaryConv2d, bk.StackedBinaryConv2d)) for layer in model.modules())
    records: list[EpochRecord] = []
    best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
    model.train()
    # Binary layers have no choice of their own between our kernels and the reference in training, the others have.
    with use_backend("reference") if latent and place != "cpu" else contextlib.nullcontext():
        trainer = graphed.Trainer(
            model, parameters, setting.resident(place), batch=batch, rates=rates, optimizer=stage.optimizer,
            orthogonality=stage.orthogonality, after=after, teacher=teacher, distill=stage.distill,
        )  # fmt: skip
        for epoch in range(1, stage.epochs + 1):
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(epochs.seed_of(seed, 0, epoch))
            sums = trainer.epoch(generator, most)
            value = setting.validation_accuracy(model)
            if value > best[0]:
                best = value, {name: t.detach().clone() for name, t in model.state_dict().items()}
            taken = time.perf_counter() - began
            rate = rates[epoch * most - 1]
            records.append(EpochRecord(epoch, most, *sums, rate, taken, value))
    model.load_state_dict(best[1])
    return records


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
        loader=setting.training(_batch(experiment), str(next(dense.parameters()).device)),
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


def _sizes(experiment: Experiment, seed: int, model: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """MACs, parameters and bytes of the dense network and of the one found, whose latents become bits here."""
    twin = setting.network(experiment.network, seed)
    bits = [layer for layer in model.modules() if isinstance(layer, (bk.BinaryConv2d, bk.StackedBinaryConv2d))]
    replaced = sum(4 * m.out_channels * m.in_channels // m.groups * math.prod(m.kernel_size) for m in bits)
    learnable = [sum(p.numel() for p in n.parameters() if p.requires_grad) for n in (twin, model)]
    with tempfile.TemporaryDirectory() as name:
        sizes = []
        for network in (twin, bk.freeze_bits(model)):
            bk.save(network, path := Path(name) / "network")
            sizes.append(path.stat().st_size)
    found = {
        "macs": [_macs(twin, example), _macs(model, example)],
        "parameters": [network_parameters(twin), network_parameters(model)],
        "learnable": learnable,
        "file_bytes": sizes,
    }
    return found | ({"binary_layer_bytes": [replaced, sum(layer.payload_bytes for layer in bits)]} if bits else {})


def _macs(network: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates an image of all convolutions, counted on ordinary layers; of ±1 and ternary weights too."""
    copied = copy.deepcopy(network)
    for layer in copied.modules():
        if isinstance(layer, bk.StackedBinaryConv2d):
            layer.binarize_input = False  # signs or not, the filters are the same
    signs = [layer for layer in copied.modules() if isinstance(layer, bk.BinaryConv2d)]
    copied = substitute(copied, {layer: _of_the_same_size(layer) for layer in signs})
    return sum(layer.dense_macs for layer in survey(bk.to_plain(copied, inplace=True), example))


def _of_the_same_size(layer: bk.BinaryConv2d) -> nn.Module:
    (top, bottom, left, right), conv = layer.padding, layer
    spatial: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **spatial)
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain)
