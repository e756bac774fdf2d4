"""CIFAR-10 for the experiments: its three splits, the networks and the weights they start from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.survey import evaluating
from basisconv_kernels.demo import data
from basisconv_kernels.demo.networks import CifarResNet, SmallVGG

VALIDATION = 2_000  # of the 10,000 test images: published weights have seen all 50,000 training images
EVALUATED = 500  # images a batch
NARROW_VGG = (32, 32, 64, 64, 128, 128)
EXAMPLE = (2, 3, 32, 32)


class ChannelsLast(data.Batches):
    """Batches whose images lie channels_last, as the networks do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in super().__iter__():
            yield images.contiguous(memory_format=torch.channels_last), labels


@functools.cache
def cifar10() -> tuple[data.ImageSet, data.Split]:
    """The data with the 8,000 test images that nothing is chosen by, and the 2,000 of the validation split."""
    whole = data.cifar10()
    images, labels = whole.test
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2_026))
    chosen, kept = order[:VALIDATION], order[VALIDATION:]
    rest = data.ImageSet(whole.name, whole.train, data.Split(images[kept], labels[kept]), whole.mean, whole.std)
    return rest, data.Split(images[chosen], labels[chosen])


def training(batch: int) -> data.Batches:
    """The training images, shuffled, shifted by up to 4 pixels and mirrored."""
    images, _ = cifar10()
    return ChannelsLast(images, images.train, batch, train=True, crop=4)


def accuracy(network: nn.Module, split: data.Split) -> float:
    """Share of right answers in eval mode."""
    right, place = 0, next(network.parameters()).device
    with evaluating(network):
        for images, labels in ChannelsLast(cifar10()[0], split, EVALUATED):
            right += int((network(images.to(place)).argmax(1).cpu() == labels).sum())
    return right / len(split.labels)


def validation_accuracy(network: nn.Module) -> float:
    """Of the validation split: what may choose."""
    return accuracy(network, cifar10()[1])


def test_accuracy(network: nn.Module) -> float:
    """Of the other 8,000 test images: what is reported, and chooses nothing."""
    return accuracy(network, cifar10()[0].test)


def network(kind: str, seed: int) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(seed)
    return SmallVGG(3, NARROW_VGG) if kind == "small-vgg" else CifarResNet(int(kind.removeprefix("resnet")))


def published(kind: str, folder: Path) -> nn.Module:
    """A CIFAR ResNet with the weights of its public checkpoint, ``resnet20-*.th`` and so on, from ``folder``."""
    found = sorted(folder.glob(f"{kind}-*.th"))
    if not found:
        raise FileNotFoundError(f"experiments: no {kind}-*.th in {folder}; name the folder with --weights")
    state = torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"]
    made = network(kind, 0)
    made.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return made
