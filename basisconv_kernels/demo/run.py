"""The demo from end to end: compress a trained network, fine-tune, save, time, verify, and write it all up."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.finetune import EpochRecord, finetune, trainable_parameters
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.named import load_weights
from basisconv_kernels.core.timing import disturbed
from basisconv_kernels.demo import measure, models, others, page, results
from basisconv_kernels.demo.data import Batches, Split
from basisconv_kernels.demo.inference import channels_last, inference_form, packing_available
from basisconv_kernels.demo.progress import Advance, Stages
from basisconv_kernels.demo.results import Level, Times
from basisconv_kernels.demo.timing import BATCHES, LARGE, Forms, time_all, time_layers
from basisconv_kernels.demo.verify import Task, verify
from basisconv_kernels.diagnostics import environment

LEVELS = (0.95, 0.85, 0.70)
# Learning rate, momentum and weight decay of Tayyab, Khan, Mahalanobis 2021; one epoch here, 120 there.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, TRAIN_BATCH = 0.01, 0.9, 5e-4, 64
STAGES_A_LEVEL, STAGES_BESIDE = 6, 3 + len(BATCHES) + others.STAGES * len(others.METHODS)


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: folder for the page, the results and the compressed networks.
        data, network: names as in ``models``.
        weights: file of trained weights; None takes the shipped ones.
        levels: shares of the filters' energy to keep, each in 0..1; one compressed network each.
        train_images, test_images: how many are used, from the start; None takes all test images.
        timing_seconds: for all networks together at each batch size.
        layer_seconds: for all layers of a network together at each batch size.
        quick: a short run, for tests; its numbers mean little.
        seed: of the order of the training images and their flips.
    """

    out: Path
    data: str = "fashion-mnist"
    network: str = "small-vgg"
    weights: Path | None = None
    levels: tuple[float, ...] = LEVELS
    train_images: int = 6000
    test_images: int | None = None
    timing_seconds: float = 10.0
    layer_seconds: float = 3.5
    quick: bool = False
    seed: int = 0

    @property
    def ships_bits(self) -> bool:
        """Whether the package carries networks of filters of bits for this."""
        return (self.data, self.network) == models.SHIPPED and self.weights is None

    def shortened(self) -> Settings:
        """The same in a few seconds: few images, and one level unless the user named some."""
        levels = self.levels if self.levels != LEVELS else (results.middle(LEVELS),)
        return replace(
            self,
            levels=levels,
            train_images=128,
            test_images=200,
            timing_seconds=0.2,
            layer_seconds=0.25,
            quick=True,
        )


def run_demo(settings: Settings) -> dict[str, Any]:
    """Run the demo; write ``index.html``, ``results.json`` and the compressed networks into ``settings.out``.

    Returns:
        dict: what ``results.json`` holds; see ``demo.results``.

    Raises:
        ValueError, OSError: settings, weights or data that do not fit.
        RuntimeError: the process that verifies the files gave no answer.
    """
    count = STAGES_A_LEVEL * len(settings.levels) + STAGES_BESIDE
    count += others.SHIPPED_STAGES * len(others.SHIPPED) if settings.ships_bits else 0
    start = time.perf_counter()
    with Stages(count) as stages:
        demo = _Demo(settings, stages)
        found = demo.run()
        found["seconds"] = {name: round(spent, 2) for name, spent in stages.seconds.items()}
        found["seconds"]["total"] = round(time.perf_counter() - start, 2)
        with stages.stage("writing the page"):
            page.write(found, demo.test, settings.out / "index.html")
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    (settings.out / "results.json").write_text(text + "\n", "utf-8")
    return found


class _Demo:
    """The state of one run; ``run`` goes through it in order."""

    def __init__(self, settings: Settings, stages: Stages) -> None:
        self.settings, self.stages = settings, stages
        self.data = models.DATA[settings.data]()
        train, test = self.data.train, self.data.test
        self.train = Split(train.images[: settings.train_images], train.labels[: settings.train_images])
        self.test = Split(test.images[: settings.test_images], test.labels[: settings.test_images])
        self.dense = models.build(settings.network, self.test.images.shape[1])
        self.weights = models.weights_file(settings.data, settings.network, settings.weights)
        load_weights(self.dense, self.weights)
        self.dense.eval()
        self.first_conv = next(name for name, m in self.dense.named_modules() if isinstance(m, nn.Conv2d))
        self.images = channels_last(self.data.normalise(self.test.images[:LARGE]))
        self.shipped = others.SHIPPED if settings.ships_bits else {}
        self.forms = Forms()
        settings.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Everything but the page; the results as JSON values."""
        settings, labels = self.settings, self.test.labels
        load_average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        dense_logits = self._dense()
        levels = [self._level(energy) for energy in settings.levels]
        beside = [self._other(name, config) for name, config in others.METHODS.items()]
        beside += [self._shipped(name, config) for name, config in self.shipped.items()]
        times = self._time(levels)
        with self.stages.stage("predicting again in a new process", "from the saved files"):
            task = Task(settings.data, settings.network, len(labels), LARGE)
            expected = {level.file: level.logits["fused"] for level in levels}
            expected |= {other.file: other.logits for other in beside if other.logits is not None}
            verification = verify(task, expected, settings.out)
        rows = [results.level_results(level, labels, times, verification, self.first_conv) for level in levels]
        accuracy = measure.accuracy(dense_logits, labels)
        found: dict[str, Any] = {
            "schema": results.SCHEMA,
            "version": results.SCHEMA_VERSION,
            "quick": settings.quick,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": {**environment(), "load_average_at_start": load_average},
            "data": {
                "key": settings.data,
                "name": self.data.name,
                "train_images": len(self.train.labels),
                "test_images": len(labels),
            },
            "network": {"name": settings.network, "weights": self.weights.name, "first_conv": self.first_conv},
            "recipe": {
                "optimizer": "SGD with Nesterov momentum, one cycle",
                "learning_rate": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
                "batch_size": TRAIN_BATCH,
                "epochs": 1,
                "seed": settings.seed,
                "trained": "coefficients and BatchNorm; the basis is frozen",
            },
            "timing": {
                "batches": list(BATCHES),
                "dtype": "float32",
                "memory_format": {str(batch): formats for batch, formats in times.formats.items()},
                "packed_convolutions": packing_available(),
                "disturbed_samples": round(disturbed(s for t in times.networks.values() for s in t.values()), 4),
            },
            "dense": results.dense_results(self.dense, levels[0].report, accuracy, len(labels), times),
            "levels": rows,
            "others": [others.other_results(other, labels, times, verification) for other in beside],
            "gains": results.gains(rows),
            "spectra": results.spectra(self.dense, rows),
            "samples": results.samples(labels, dense_logits, results.middle(levels).logits["fused"]),
            "verification": {key: verification[key] for key in ("passed", "process")},
        }
        found["remarks"] = results.remarks(found)
        return found

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _folded(self, network: nn.Module) -> nn.Module:
        return fold_batchnorm(network, self.images[:2])[0]

    def _predict(self, form: nn.Module, advance: Advance) -> Tensor:
        return measure.predict(form, self.data, self.test, LARGE, advance)

    def _dense(self) -> Tensor:
        self.forms.add("dense", self._folded(self.dense), self.test.images.shape[1:])
        with self.stages.stage("predicting", "with the dense network") as advance:
            return self._predict(self.forms.at("dense", LARGE), advance)

    def _level(self, energy: float) -> Level:
        at = f"at energy {energy:g}"
        with self.stages.stage("compressing", at):
            network, report = compress(
                self.dense, BasisConfig(energy=energy), example_inputs=self.images[:1], skip=[self.first_conv]
            )
        level = Level(energy, network, report, f"{self.settings.network}-energy-{energy:g}.safetensors")
        with self.stages.stage("predicting", f"{at}, before fine-tuning") as advance:
            before = inference_form(self._folded(network), self.images)
            level.accuracy_before = measure.accuracy(self._predict(before, advance), self.test.labels)
        with self.stages.stage("fine-tuning", at) as advance:
            level.training = self._finetune(network, advance)
        save(network.eval(), self.settings.out / level.file)
        level.file_bytes = (self.settings.out / level.file).stat().st_size
        folded = self._folded(network)
        for form, module in (("two_step", to_plain(folded)), ("fused", folded)):
            self.forms.add(level.key(form), module, self.test.images.shape[1:])
            with self.stages.stage("predicting", f"{at}, fine-tuned, {form.replace('_', '-')}") as advance:
                level.logits[form] = self._predict(self.forms.at(level.key(form), LARGE), advance)
        return level

    def _other(self, name: str, config: Any) -> others.Other:
        at = f"by {name}"
        with self.stages.stage("compressing", at):
            network, report = compress(self.dense, config, example_inputs=self.images[:1], skip=[self.first_conv])
        other = others.Other(name, network, report, f"{self.settings.network}-{name.lower()}.safetensors")
        with self.stages.stage("predicting", f"{at}, before fine-tuning") as advance:
            before = inference_form(self._folded(network), self.images)
            other.accuracy_before = measure.accuracy(self._predict(before, advance), self.test.labels)
        with self.stages.stage("fine-tuning", at) as advance:
            other.training = self._finetune(network, advance, "all", others.LEARNING_RATE)
        save(others.pack(network.eval()), self.settings.out / other.file)
        other.file_bytes = (self.settings.out / other.file).stat().st_size
        self.forms.add(name, self._folded(network), self.test.images.shape[1:])
        with self.stages.stage("predicting", f"{at}, fine-tuned") as advance:
            other.logits = self._predict(self.forms.at(name, LARGE), advance)
        return other

    def _shipped(self, name: str, config: Any) -> others.Other:
        """A network that the package carries; nothing is trained."""
        file, example = models.SHIPPED_BITS[name], self.images[:1]
        with self.stages.stage("loading", name):
            # What the conversion replaces and costs; its filters are thrown away for those of the file.
            _, report = compress(self.dense, config, example_inputs=example, skip=[self.first_conv])
            network = load(file, models.build(self.settings.network, example.shape[1])).eval()
        other = others.Other(name, network, report, file.name)
        shutil.copyfile(file, self.settings.out / other.file)
        other.file_bytes = file.stat().st_size
        self.forms.add(name, self._folded(network), self.test.images.shape[1:])
        with self.stages.stage("predicting", f"by {name}, as shipped") as advance:
            other.logits = self._predict(self.forms.at(name, LARGE), advance)
        return other

    def _finetune(
        self, network: nn.Module, advance: Advance, train: str = "coefficients_and_norm", lr: float = LEARNING_RATE
    ) -> dict[str, Any]:
        """One epoch; flips of the images are the only augmentation."""
        loader = Batches(self.data, self.train, TRAIN_BATCH, train=True, crop=0, seed=self.settings.seed)
        parameters = trainable_parameters(network, train)
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=len(loader) + 1, pct_start=0.2, cycle_momentum=False
        )

        def tell(record: EpochRecord) -> None:
            advance(record.steps / len(loader))

        (record,) = finetune(
            network, loader, optimizer=optimizer, scheduler=schedule, scheduler_step="step", progress=tell
        )
        return {
            "steps": record.steps,
            "loss": round(record.loss, 5),
            "train_accuracy": record.accuracy,
            "trained_parameters": sum(p.numel() for p in parameters),
            "seconds": round(record.seconds, 2),
        }

    def _time(self, levels: list[Level]) -> Times:
        times = Times()
        for batch in BATCHES:
            with self.stages.stage("timing all networks in turn", f"at batch {batch}") as advance:
                times.networks[batch], times.formats[batch] = time_all(
                    self.forms, batch, self.settings.timing_seconds, advance
                )
        for level in levels:
            names = [layer.name for layer in level.report.replaced]
            times.layers[level.energy] = {}
            with self.stages.stage("timing layer by layer", f"at energy {level.energy:g}") as advance:
                for batch in BATCHES:
                    times.layers[level.energy][batch] = time_layers(
                        self.forms,
                        f"{level.energy:g}",
                        names,
                        self.images[:batch],
                        self.settings.layer_seconds,
                        advance,
                    )
        return times
