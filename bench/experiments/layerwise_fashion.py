"""Layer-wise ternary training of the demo's network on Fashion-MNIST; writes ``layerwise_fashion.json`` beside itself.

    BASISCONV_DATA=... python -m bench.experiments.layerwise_fashion --state run.state

It needs the complete training set (docs/env.md). Of the 10,000 test images, which the shipped network was not trained
on, the first ``--validation`` decide which layers are kept, and the next ``--test`` are looked at once, at the
end. A run that is killed goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from basisconv_kernels import TernaryConfig, load, save, train_layerwise
from basisconv_kernels.compression.named import load_weights
from basisconv_kernels.compression.survey import evaluating
from basisconv_kernels.core import machine
from basisconv_kernels.core.version import __version__
from basisconv_kernels.demo import data
from basisconv_kernels.demo.models import SHIPPED_WEIGHTS
from basisconv_kernels.demo.networks import SmallVGG


def trained_network() -> SmallVGG:
    """The demo's network with the weights that the package carries."""
    network = SmallVGG(1)
    load_weights(network, SHIPPED_WEIGHTS)
    return network.eval()


def accuracy(network: nn.Module, images: data.ImageSet, split: data.Split) -> float:
    """Share of right answers."""
    right = 0
    with evaluating(network):
        for inputs, targets in data.Batches(images, split, 500):
            right += int((network(inputs).argmax(1) == targets).sum())
    return right / len(split.labels)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--bound", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=int, default=2000, help="images")
    parser.add_argument("--test", type=int, default=8000, help="images behind them")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    images = data.fashion_mnist(complete=True)
    validation, rest = _split(images.test, arguments.validation)
    test, _ = _split(rest, arguments.test)
    network = trained_network()
    config = TernaryConfig(
        loader=data.Batches(images, images.train, arguments.batch, train=True),
        evaluate=lambda model: accuracy(model, images, validation),
        sparsity=arguments.sparsity,
        bound=arguments.bound,
        prune_epochs=2,
        epochs=arguments.epochs,
        max_steps=arguments.steps,
        seed=arguments.seed,
        state=arguments.state,
        progress=lambda text: print(text, flush=True),
    )
    start = time.monotonic()
    found, report = train_layerwise(network, config)
    seconds = time.monotonic() - start
    print(report.to_table())
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name, model in (("dense", network), ("ternary", found)):
            save(model, path := Path(folder) / name)
            sizes[name] = path.stat().st_size
        again = load(Path(folder) / "ternary", SmallVGG(1)).eval()
        image = images.normalise(test.images[:10])
        with torch.no_grad():
            same = torch.equal(again(image), found.eval()(image))
    result = {
        "command": f"python -m bench.experiments.layerwise_fashion --sparsity {arguments.sparsity} "
        f"--bound {arguments.bound} --steps {arguments.steps} --epochs {arguments.epochs} --seed {arguments.seed} "
        f"--batch {arguments.batch} --validation {arguments.validation} --test {arguments.test}",
        "versions": {"basisconv_kernels": __version__, "torch": torch.__version__},
        "cpu": machine.cpu_name(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "test_accuracy": {
            "dense": accuracy(network, images, test),
            "ternary": accuracy(found, images, test),
        },
        "file_bytes": sizes,
        "reloaded_gives_the_same_bits": same,
        "report": report.to_dict(),
    }
    arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("test_accuracy", "file_bytes", "seconds")}))


def _split(split: data.Split, first: int) -> tuple[data.Split, data.Split]:
    return (
        data.Split(split.images[:first], split.labels[:first]),
        data.Split(split.images[first:], split.labels[first:]),
    )


if __name__ == "__main__":
    main()
