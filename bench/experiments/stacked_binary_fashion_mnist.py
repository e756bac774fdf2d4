"""What stacked binary filters cost in accuracy: the demo's small VGG on Fashion-MNIST, from the shipped dense weights.

    python -m bench.experiments.stacked_binary_fashion_mnist --epochs 5              # the 6,000 shipped training images
    BASISCONV_DATA=... python -m bench.experiments.stacked_binary_fashion_mnist --complete --epochs 8 --json rows.jsonl

One row a network: accuracy on all 10,000 test images right after the alternating fit and after fine-tuning, and what
the converted layers take on disk as bits. The first convolution, BatchNorms and the classifier stay real. The dense row
gets the same fine-tuning as the others. Seeds are fixed; the test images are used for the rows alone, nothing is chosen
by them. These are our own numbers, not those of a paper.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from basisconv_kernels import StackedBinaryConfig, StackedBinaryConv2d, compress, finetune, freeze_bits, save
from basisconv_kernels.compression.named import load_weights
from basisconv_kernels.demo.data import Batches, fashion_mnist
from basisconv_kernels.demo.models import SHIPPED_WEIGHTS
from basisconv_kernels.demo.networks import SmallVGG

ROWS: dict[str, StackedBinaryConfig | None] = {
    "dense": None,
    "binary weights (1 split, bank K)": StackedBinaryConfig(splits=1, bank=1.0),
    "stacked, 2 splits, bank K/2": StackedBinaryConfig(splits=2, bank=0.5),
    "stacked, 2 splits, bank K/4": StackedBinaryConfig(splits=2, bank=0.25),
    "stacked, 4 splits, bank K/4": StackedBinaryConfig(splits=4, bank=0.25),
    "XNOR, 2 splits, bank K/2": StackedBinaryConfig(splits=2, bank=0.5, binarize_input=True),
}


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Fraction of correctly classified images."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(batches.split.labels)


def row(name: str, train: Batches, test: Batches, epochs: int, lr: float, folder: Path) -> dict[str, Any]:
    """Convert, fine-tune, freeze, save, judge."""
    torch.manual_seed(0)
    model: nn.Module = SmallVGG()
    load_weights(model, SHIPPED_WEIGHTS)
    config = ROWS[name]
    if config is not None:
        model, _ = compress(model, config, example_inputs=torch.randn(1, 1, 28, 28))
    converted = [m for m in model.modules() if isinstance(m, StackedBinaryConv2d)]
    found: dict[str, Any] = {"row": name, "epochs": epochs, "lr": lr, "accuracy_before": accuracy(model, test)}
    started = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = max(1, epochs * len(train))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if epochs:
        finetune(
            model, train, epochs=epochs, optimizer=optimizer, scheduler=schedule, scheduler_step="step", progress=False
        )
    found["seconds"] = round(time.perf_counter() - started, 1)
    found["accuracy"] = accuracy(freeze_bits(model), test)
    save(model, folder / "network.safetensors")
    found["file_bytes"] = (folder / "network.safetensors").stat().st_size
    found["bank_and_index_bytes"] = sum(layer.payload_bytes for layer in converted)
    found["replaced_float32_bytes"] = 4 * sum(layer.dense_weight().numel() for layer in converted)
    found["unused_bank_filters"] = sum(len(layer.usage().unused) for layer in converted)
    return found


def main(
    complete: Annotated[bool, typer.Option(help="All 60,000 training images, from BASISCONV_DATA.")] = False,
    epochs: Annotated[int, typer.Option(help="Of fine-tuning, the same for every row.")] = 5,
    lr: Annotated[float, typer.Option(help="Of Adam, falling to zero along a cosine.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Append rows to this file, one a line.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the saved network goes.")] = Path("out"),
) -> None:
    """Print one row a network."""
    folder.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist(complete=complete)
    test = Batches(data, data.test, 500)
    for name in ROWS:
        if only and not any(word in name for word in only):
            continue
        train = Batches(data, data.train, batch_size, train=True, seed=0)
        found = row(name, train, test, epochs, lr, folder)
        found |= {"training_images": len(data.train.labels), "torch": torch.__version__, "seed": 0}
        packed, dense = found["bank_and_index_bytes"], found["replaced_float32_bytes"]
        smaller = f", {dense / packed:.0f} times smaller than {dense} bytes of float32" if packed else ""
        print(
            f"{name:<34} {100 * found['accuracy_before']:6.2f} % -> {100 * found['accuracy']:6.2f} %, "
            f"{found['seconds']:.0f} s; bits {packed}{smaller}; file {found['file_bytes']}",
            flush=True,
        )
        if out is not None:
            with out.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    typer.run(main)
