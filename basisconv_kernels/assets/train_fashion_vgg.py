"""Train the demo's dense network on all of Fashion-MNIST and write the files of this folder.

    BASISCONV_DATA=... python -m basisconv_kernels.assets.train_fashion_vgg [--epochs 24] [--autocast]

Writes ``fashion_vgg.safetensors`` (weights), the 10,000 test images as they are and the first 6,000 training images.
The test images are used once, after the last epoch; there is no selection on them. A checkpoint beside the output
lets an interrupted run go on where it stopped. About 1 minute an epoch on two cores with bf16 matrix units, 3 without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from basisconv_kernels.core import env
from basisconv_kernels.demo.data import Batches, fashion_mnist, write_idx
from basisconv_kernels.demo.networks import SmallVGG


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Fraction of correctly classified images, in float32."""
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return correct / len(batches.split.labels)


def main() -> None:
    """Run the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="highest rate of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="convolutions in bfloat16 during training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = fashion_mnist(complete=True)
    train = Batches(data, data.train, args.batch_size, train=True, seed=args.seed)
    model = SmallVGG()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, epochs=args.epochs, steps_per_epoch=len(train), pct_start=0.2
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.05)

    checkpoint = args.out / "fashion_vgg.checkpoint.pt"
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        train.generator.set_state(state["generator"])
        first = state["epoch"]

    for epoch in range(first, args.epochs):
        model.train()
        started, total = time.perf_counter(), 0.0
        for images, labels in train:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
                loss = loss_function(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": train.generator.get_state(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)
        print(f"epoch {epoch + 1}: loss {total / len(train):.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    reached = accuracy(model, Batches(data, data.test, 500))
    print(f"accuracy on the test images: {100 * reached:.2f} %")
    recipe = {"epochs": args.epochs, "lr": args.lr, "seed": args.seed, "test_accuracy": round(reached, 4)}
    save_file(model.state_dict(), args.out / "fashion_vgg.safetensors", metadata={"recipe": json.dumps(recipe)})
    source = env.data_folder() / "fashion-mnist"
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copyfile(source / name, args.out / name)
    write_idx(args.out / "train6k-images-idx3-ubyte.gz", data.train.images[:6000, 0])
    write_idx(args.out / "train6k-labels-idx1-ubyte.gz", data.train.labels[:6000].to(torch.uint8))
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
