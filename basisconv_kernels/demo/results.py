"""``results.json``: what a run of the demo found, as JSON values, and what follows from it in words.

Keys: ``schema`` and ``version``; ``quick``; ``finished`` (UTC); ``environment``; ``data``; ``network``; ``recipe`` of
the fine-tuning; ``timing``; ``dense``; ``levels`` (one a compressed network, with ``two_step``, ``fused``, ``layers``
and ``verification``); ``others`` (one a network of another method); ``gains``; ``spectra``; ``samples``; ``remarks``;
``verification``; ``seconds`` by stage.
Times are milliseconds, an image for networks and a call for layers, keyed by batch size; speed-ups are against dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from basisconv_kernels.compression.model import network_parameters
from basisconv_kernels.compression.report import CompressionReport
from basisconv_kernels.core.timing import Series, speed_up
from basisconv_kernels.demo import measure
from basisconv_kernels.demo.timing import LARGE
from basisconv_kernels.layers.conversion import dense_parameters
from basisconv_kernels.layers.decompose import decompose

SCHEMA, SCHEMA_VERSION = "basisconv-demo", 2
FORMS = ("two_step", "fused")
FIRST_SHOWN, DIFFERENT_SHOWN = 12, 6
FIRST_REASON = "the first convolution, see below"
BUSY = 0.25  # share of interrupted samples from which the reader is warned


@dataclass
class Level:
    """One compressed network on its way through the demo.

    ``logits`` are those of the fine-tuned network in its forms "fused" and "two_step".
    """

    energy: float
    network: nn.Module
    report: CompressionReport
    file: str
    file_bytes: int = 0
    accuracy_before: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)

    def key(self, form: str) -> str:
        """Name of a form of this network among all timed networks."""
        return f"{form}@{self.energy:g}"


@dataclass
class Times:
    """Samples of networks {batch: {network: ms an image}}, their memory formats, and spreads of layers {energy: …}."""

    networks: dict[int, dict[str, Series]] = field(default_factory=dict)
    formats: dict[int, dict[str, str]] = field(default_factory=dict)
    layers: dict[float, dict[int, dict[str, Any]]] = field(default_factory=dict)


def dense_results(dense: nn.Module, report: CompressionReport, accuracy: float, count: int, times: Times) -> Any:
    """The network that everything is compared with."""
    return {
        "accuracy": accuracy,
        "standard_error": measure.standard_error(accuracy, count),
        "macs": report.macs_before,
        "parameters": network_parameters(dense),
        "file_bytes": len(safetensors.torch.save({n: t.contiguous() for n, t in dense.state_dict().items()})),
        "ms_per_image": {str(b): taken["dense"].spread().to_dict() for b, taken in times.networks.items()},
    }


def level_results(
    level: Level, labels: Tensor, times: Times, verification: dict[str, Any], first_conv: str
) -> dict[str, Any]:
    """One compressed network: cost, accuracy, time as two convolutions and fused, layer by layer."""
    report = level.report
    forms: dict[str, Any] = {}
    for form in FORMS:
        key = level.key(form)
        forms[form] = {
            "accuracy": measure.accuracy(level.logits[form], labels),
            "ms_per_image": {str(b): t[key].spread().to_dict() for b, t in times.networks.items()},
            "speed_up": {str(b): speed_up(t["dense"], t[key]).to_dict() for b, t in times.networks.items()},
        }
    fused, two_step = level.logits["fused"], level.logits["two_step"]
    forms["two_step"]["other_predictions_than_fused"] = int((fused.argmax(1) != two_step.argmax(1)).sum())
    forms["two_step"]["largest_logit_difference"] = float((fused - two_step).abs().max())
    layers = [
        {
            "name": layer.name,
            "replaced": layer.replaced,
            "reason": FIRST_REASON if layer.name == first_conv else layer.reason,
            "C": layer.C,
            "K": layer.K,
            "R": layer.R,
            "S": layer.S,
            "Q": layer.basis_channels,
            "break_even": round(layer.break_even, 2),
            "energy_kept": layer.energy_kept,
            "macs_before": layer.macs_before,
            "macs_after": layer.macs_after,
            "ms": {str(b): t[layer.name] for b, t in times.layers[level.energy].items() if layer.name in t},
        }
        for layer in report.layers
    ]
    return {
        "energy": level.energy,
        "file": level.file,
        "file_bytes": level.file_bytes,
        "macs": report.macs_after,
        "parameters": report.network_parameters_after,
        "filters_before": report.filters_before,
        "filters_after": report.filters_after,
        "theoretical_speed_up": report.macs_before / report.macs_after,
        "accuracy_before": level.accuracy_before,
        "training": level.training,
        **forms,
        "layers": layers,
        "verification": verification["files"][level.file],
    }


def gains(levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each compressed network and batch size: which layers run faster fused than dense, and than two-step.

    A gain counts where the quartiles do not touch: then it is not noise.
    """
    found = []
    for level in levels:
        timed = [layer for layer in level["layers"] if layer["ms"]]
        for batch in timed[0]["ms"] if timed else ():
            row: dict[str, Any] = {"energy": level["energy"], "batch": int(batch), "layers": len(timed)}
            for form in ("dense", "two_step"):
                row[f"faster_than_{form}"] = [
                    layer["name"] for layer in timed
                    if layer["ms"][batch]["fused"]["q3"] < layer["ms"][batch][form]["q1"]
                ]  # fmt: skip
            found.append(row)
    return found


def spectra(dense: nn.Module, levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each replaced convolution the kept energy by number of basis filters, and which number each level took."""
    rows = []
    for position, layer in enumerate(levels[0]["layers"]):
        module = dense.get_submodule(layer["name"])
        chosen = [level["layers"][position]["Q"] for level in levels]
        if isinstance(module, nn.Conv2d) and any(chosen):
            values = decompose(dense_parameters(module)[0], module.groups).energies
            kept = (values.cumsum(0) / values.sum()).tolist()
            rows.append({"name": layer["name"], "K": layer["K"], "kept": [round(v, 6) for v in kept], "chosen": chosen})
    return rows


def samples(labels: Tensor, dense: Tensor, compressed: Tensor) -> list[dict[str, Any]]:
    """Which test images to show: the first ones, and the first on which dense and compressed differ; none chosen."""
    before, after = dense.argmax(1), compressed.argmax(1)
    kinds = [("first", i) for i in range(min(FIRST_SHOWN, len(labels)))]
    kinds += [("different", int(i)) for i in (before != after).nonzero()[:DIFFERENT_SHOWN, 0]]
    sure = torch.softmax(compressed, 1).amax(1)
    return [
        {"kind": kind, "index": i, "label": int(labels[i]), "dense": int(before[i]), "compressed": int(after[i]),
         "confidence": round(float(sure[i]), 4)}
        for kind, i in kinds
    ]  # fmt: skip


def middle(levels: Sequence[Any]) -> Any:
    """The level that headline, layers and sample images are about."""
    return levels[len(levels) // 2]


def disturbance(results: dict[str, Any]) -> str:
    """A warning where other work on the machine spoiled the times; empty where it did not."""
    share = results["timing"]["disturbed_samples"]
    if share <= BUSY:
        return ""
    return (
        f"The machine was busy: in {100 * share:.0f} % of the samples another program took a core away. Where enough "
        "others remained, these were left out; still, the times are not to be trusted. Run again on an idle machine."
    )


def some(names: list[str], shown: int = 8) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the numbers, made from the numbers themselves."""
    dense, levels = results["dense"], results["levels"]
    large, main = str(LARGE), middle(levels)
    said = []
    ones = [(level["fused"]["speed_up"]["1"]["median"], level["theoretical_speed_up"]) for level in levels]
    if any(got < 0.95 * theory for got, theory in ones):
        said.append(
            f"One image at a time gains less: {', '.join(f'{got:.2f}×' for got, _ in ones)} in time where operation "
            f"counts say {', '.join(f'{theory:.2f}×' for _, theory in ones)}. With so little work in each layer, the "
            "fixed cost of starting it weighs most."
        )
    for level in levels:
        theory, got = level["theoretical_speed_up"], level["fused"]["speed_up"][large]["median"]
        if got < 0.95 * theory:
            said.append(
                f"At energy {level['energy']:g}, {theory:.2f}× fewer multiply-accumulates became {got:.2f}× in time at "
                f"batch {large}: narrow layers fill vector registers less well, and the rest costs as before."
            )
    for level in levels:
        for form, words in (("dense", "dense"), ("two_step", "two separate convolutions")):
            behind = [
                layer["name"]
                for layer in level["layers"]
                if layer["ms"] and layer["ms"][large]["fused"]["median"] > layer["ms"][large][form]["median"]
            ]
            if behind:
                said.append(
                    f"At energy {level['energy']:g} the fused kernel is slower than {words} in {some(behind)} "
                    f"(batch {large})."
                )
    lost = [(level["energy"], 100 * (dense["accuracy"] - level["fused"]["accuracy"])) for level in levels]
    said.append(
        "Compression costs accuracy: "
        + ", ".join(f"{points:+.2f} points at energy {energy:g}".replace("+", "−", 1) if points >= 0
                    else f"+{-points:.2f} points at energy {energy:g}" for energy, points in lost)
        + f". One standard error on {results['data']['test_images']:,} images is "
        f"{100 * dense['standard_error']:.2f} points. A longer fine-tuning on all training images should recover more "
        f"than one epoch over {results['data']['train_images']:,}."
    )  # fmt: skip
    unhelped = [f"{level['energy']:g}" for level in levels if level["fused"]["accuracy"] < level["accuracy_before"]]
    if unhelped:
        said.append(
            f"At energy {', '.join(unhelped)} fine-tuning for an epoch did not raise accuracy: little was lost before, "
            "and it sees a small part of the training images. The same recipe serves all levels."
        )
    first = next(layer for layer in main["layers"] if layer["name"] == results["network"]["first_conv"])
    said.append(
        f"The first convolution ({first['name']}, {first['C']}→{first['K']}) stays dense: with "
        f"{100 * first['macs_before'] / dense['macs']:.1f} % of the multiply-accumulates there is little to gain."
    )
    said.append(
        "Times are of float32 on this machine's CPU only. All networks run in PyTorch, BatchNorm folded, ReLU inside "
        "the convolution and weights packed before; a dedicated inference engine may do better on all three sides."
    )
    backend = results["environment"]["variables"].get("BASISCONV_BACKEND")
    if not isinstance(results["environment"]["native_library"], dict):
        said.insert(0, "The native library is not built here: what is called fused ran as two convolutions too.")
    elif backend not in (None, "", "cpu"):
        said.insert(0, f"BASISCONV_BACKEND={backend} was set: what is called fused ran on that backend.")
    if disturbance(results):
        said.insert(0, disturbance(results))
    if results["quick"]:
        said.insert(0, "This was a quick run on few images: its numbers show that everything works, and nothing else.")
    return said
