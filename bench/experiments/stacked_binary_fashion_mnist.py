"""What binary filters cost in accuracy, and what they bring: the demo's small VGG on Fashion-MNIST, or on CIFAR-10.

    python -m bench.experiments.stacked_binary_fashion_mnist train --epochs 5      # the 6,000 shipped training images
    BASISCONV_DATA=... python -m bench.experiments.stacked_binary_fashion_mnist train --complete --epochs 8
    python -m bench.experiments.stacked_binary_fashion_mnist time                  # the networks that ``train`` saved

``train`` gives one row a network: accuracy on all test images right after the conversion and after training, what the
converted layers and the whole file take on disk, and whether the inference form (bits; for XNOR packed from layer to
layer) gives exactly what the training form gives, on every test image. ``time`` takes the saved networks in turn, image
by image. The first convolution, BatchNorms and the classifier stay real. The dense row gets the same training as the
others. Seeds are fixed; the test images are used for the rows alone, nothing is chosen by them. These are our own
numbers, not those of a paper.
"""

from __future__ import annotations

import json
import re
import time as clock
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

from basisconv_kernels import (
    BinaryConfig,
    BinaryConv2d,
    StackedBinaryConfig,
    StackedBinaryConv2d,
    compress,
    finetune,
    fold_batchnorm,
    freeze_bits,
    load,
    pack_activations,
    save,
)
from basisconv_kernels.compression.named import load_weights
from basisconv_kernels.core import machine, timing
from basisconv_kernels.demo.data import Batches, ImageSet, cifar10, fashion_mnist
from basisconv_kernels.demo.models import SHIPPED_WEIGHTS
from basisconv_kernels.demo.networks import SmallVGG

ROWS: dict[str, StackedBinaryConfig | BinaryConfig | None] = {
    "dense": None,
    "XNOR": BinaryConfig(),
    "binary weights (1 split, bank K)": StackedBinaryConfig(splits=1, bank=1.0),
    "stacked, 2 splits, bank K/2": StackedBinaryConfig(splits=2, bank=0.5),
    "stacked, 2 splits, bank K/4": StackedBinaryConfig(splits=2, bank=0.25),
    "stacked, 4 splits, bank K/4": StackedBinaryConfig(splits=4, bank=0.25),
}
Data = Literal["fashion-mnist", "cifar10"]

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """Of all images, in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images.contiguous(memory_format=torch.channels_last)) for images, _ in batches])


def accuracy(found: Tensor, batches: Batches) -> float:
    """Fraction of correctly classified images."""
    return float((found.argmax(1) == batches.split.labels).double().mean())


def network(data: ImageSet) -> SmallVGG:
    """The dense network, untrained."""
    return SmallVGG(in_channels=data.train.images.shape[1])


def dense(data: ImageSet, train: Batches, epochs: int) -> nn.Module:
    """The network to convert: the shipped weights, or trained here where there are none."""
    torch.manual_seed(0)
    model = network(data)
    if data.train.images.shape[1] == 1:
        load_weights(model, SHIPPED_WEIGHTS)
    else:
        learn(model, train, epochs, 1e-3)
    return model


def learn(model: nn.Module, train: Batches, epochs: int, lr: float) -> None:
    """Adam, the learning rate falling to zero along a cosine; latent weights stay within ±1, as XNOR-Net keeps them."""
    if not epochs:
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    binary = [layer for layer in model.modules() if isinstance(layer, BinaryConv2d)]

    def clip(_: Any) -> None:
        for layer in binary:
            layer.clip_weights()

    finetune(model, train, epochs=epochs, optimizer=optimizer, scheduler=schedule, scheduler_step="step", progress=clip)


def inference_form(model: nn.Module, example: Tensor) -> nn.Module:
    """Bits where there are any, from layer to layer where that can be."""
    if any(isinstance(layer, BinaryConv2d) for layer in model.modules()):
        packed, report = pack_activations(model, example)
        if report.left_alone:
            raise RuntimeError(f"the activations stay real: {report.left_alone}")
        return packed
    return freeze_bits(model)


def file_of(folder: Path, data: Data, name: str) -> Path:
    """Where the network of a row is saved."""
    return folder / f"{data}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.safetensors"


def row(
    name: str, images: ImageSet, train: Batches, test: Batches, epochs: int, lr: float, dense_epochs: int, path: Path
) -> dict[str, Any]:
    """Convert, train, freeze, save, judge."""
    model = dense(images, train, dense_epochs)
    config = ROWS[name]
    example = next(iter(test))[0][:100].contiguous(memory_format=torch.channels_last)
    if config is not None:
        model, _ = compress(model, config, example_inputs=next(iter(train))[0])
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    converted = [m for m in model.modules() if isinstance(m, (StackedBinaryConv2d, BinaryConv2d))]
    weights = sum(m.out_channels * m.in_channels // m.groups * m.kernel_size[0] * m.kernel_size[1] for m in converted)
    found: dict[str, Any] = {"row": name, "epochs": epochs, "lr": lr}
    found["accuracy_before"] = accuracy(logits(model, test), test)
    started = clock.perf_counter()
    learn(model, train, epochs, lr)
    found["seconds"] = round(clock.perf_counter() - started, 1)
    expected = logits(model, test)
    found["accuracy"] = accuracy(expected, test)
    model = inference_form(model, example)
    got = logits(model, test)
    found["test_images"] = len(got)
    found["equal_logits"] = int((got == expected).all(1).sum())
    found["equal_classes"] = int((got.argmax(1) == expected.argmax(1)).sum())
    save(model, path)
    found["file_bytes"] = path.stat().st_size
    found["payload_bytes"] = sum(layer.payload_bytes for layer in converted)
    found["replaced_float32_bytes"] = 4 * weights
    stacked = [layer for layer in converted if isinstance(layer, StackedBinaryConv2d)]
    found["unused_bank_filters"] = sum(len(layer.usage().unused) for layer in stacked)
    return found


def images_of(data: Data, complete: bool) -> ImageSet:
    """The data set."""
    return cifar10() if data == "cifar10" else fashion_mnist(complete=complete)


def write(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Append rows to a file, one a line."""
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(found) + "\n" for found in rows)


@app.command()
def train(
    data: Annotated[Data, typer.Option(help="Which images.")] = "fashion-mnist",
    complete: Annotated[bool, typer.Option(help="All 60,000 training images, from BASISCONV_DATA.")] = False,
    epochs: Annotated[int, typer.Option(help="Of training after the conversion, the same for every row.")] = 5,
    dense_epochs: Annotated[int, typer.Option(help="Of the dense network, where no weights are shipped.")] = 20,
    lr: Annotated[float, typer.Option(help="Of Adam, falling to zero along a cosine.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name contains this.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Append rows to this file, one a line.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the saved networks go.")] = Path("out"),
) -> None:
    """Train and print one row a network."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    images = images_of(data, complete)
    test = Batches(images, images.test, 500)
    for name in ROWS:
        if only and not any(word in name for word in only):
            continue
        batches = Batches(images, images.train, batch_size, train=True, seed=0)
        path = file_of(folder, data, name)
        found = {"what": "train", "data": data} | row(name, images, batches, test, epochs, lr, dense_epochs, path)
        found |= {"training_images": len(images.train.labels), "torch": torch.__version__, "seed": 0}
        packed, replaced = found["payload_bytes"], found["replaced_float32_bytes"]
        smaller = f", {replaced / packed:.0f} times smaller than {replaced} bytes of float32" if packed else ""
        print(
            f"{name:<34} {100 * found['accuracy_before']:6.2f} % -> {100 * found['accuracy']:6.2f} %, "
            f"{found['seconds']:.0f} s; bits {packed}{smaller}; file {found['file_bytes']}; the inference form gives "
            f"the same numbers on {found['equal_logits']} of {found['test_images']} images",
            flush=True,
        )
        write([found], out)


@app.command()
def time(
    data: Annotated[Data, typer.Option(help="Which images.")] = "fashion-mnist",
    seconds: Annotated[float, typer.Option(help="In all.")] = 20.0,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images a call.")] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Append rows to this file, one a line.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the saved networks are.")] = Path("out"),
) -> None:
    """Time the saved networks in turn, BatchNorms folded, in one process and on one pool of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    channels, size = (3, 32) if data == "cifar10" else (1, 28)
    image = torch.randn(batch_size, channels, size, size).contiguous(memory_format=torch.channels_last)
    networks: dict[str, nn.Module] = {}
    for name in ROWS:
        path = file_of(folder, data, name)
        if path.is_file():
            model = load(path, SmallVGG(in_channels=channels).eval())
            folded, _ = fold_batchnorm(model, image)
            networks[name] = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not networks:
        raise typer.BadParameter(f"{folder} holds no network of this experiment; run train first")
    with torch.inference_mode():
        calls = {name: (lambda model=model: model(image)) for name, model in networks.items()}
        taken = timing.interleave(calls, seconds)
    rows = []
    for name, series in taken.items():
        spread = series.scaled(1e3).spread()
        found: dict[str, Any] = {"what": "time", "data": data, "row": name, "ms": spread.to_dict()}
        found |= {"batch_size": batch_size, "threads": threads, "cpu": machine.cpu_name(), "isa": machine.isa()}
        found |= {"torch": torch.__version__, "disturbed": round(timing.disturbed(taken.values()), 3)}
        if "dense" in taken:
            found["speed_up"] = timing.speed_up(taken["dense"], series).to_dict()
        rows.append(found)
        over = f", {found['speed_up']['median']:.2f} times as fast as dense" if "speed_up" in found else ""
        print(f"{name:<34} {spread.median:.3f} ms{over}")
    write(rows, out)


if __name__ == "__main__":
    app()
