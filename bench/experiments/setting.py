"""CIFAR-10 for the experiments: its three splits, the networks and the weights they start from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.survey import evaluating
from basisconv_kernels.core.registry import use_backend
from basisconv_kernels.demo import data
from basisconv_kernels.demo.networks import CifarResNet, SmallVGG
from bench.experiments import networks
from bench.experiments.graphed import DeviceImages, draw

VALIDATION = 2_000  # of the 10,000 test images: published weights have seen all 50,000 training images
EVALUATED = 500  # images a batch
CROP = 4  # largest shift of an augmented image, in pixels
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
    count = min(VALIDATION, len(labels) // 5)  # fewer of a smaller set, for trials
    chosen, kept = order[:count], order[count:]
    rest = data.ImageSet(whole.name, whole.train, data.Split(images[kept], labels[kept]), whole.mean, whole.std)
    return rest, data.Split(images[chosen], labels[chosen])


def training(batch: int, device: str = "cpu") -> data.Batches | ResidentBatches:
    """The training images, shuffled, shifted by up to 4 pixels and mirrored; those of a GPU lie on it."""
    images, _ = cifar10()
    if torch.device(device).type == "cuda":
        return ResidentBatches(resident(device), batch)
    return ChannelsLast(images, images.train, batch, train=True, crop=CROP)


_resident: dict[tuple[int, str], tuple[Tensor, DeviceImages]] = {}  # the first keeps its identity from reuse


def resident(device: str, split: data.Split | None = None) -> DeviceImages:
    """A split, of None the training images, on a device, where it stays."""
    images, _ = cifar10()
    split = images.train if split is None else split
    key = (id(split.images), str(device))
    if key not in _resident:
        made = DeviceImages(split.images, split.labels, images.mean, images.std, CROP, str(device))
        _resident[key] = split.images, made
    return _resident[key][1]


class ResidentBatches:
    """A loader of augmented batches that never leave the device; what is short of a batch is left out."""

    def __init__(self, images: DeviceImages, batch: int) -> None:
        self.images, self.batch = images, batch
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(*draw(self.images, self.batch, len(self), self.generator), strict=True):
            yield self.images.normalised(images), labels


def accuracy(network: nn.Module, split: data.Split) -> float:
    """Share of right answers in eval mode, in float32; on a GPU by the reference of each op."""
    place = next(network.parameters()).device
    with evaluating(network):
        if place.type == "cuda":
            images = resident(str(place), split)
            with use_backend("reference"):
                right = [
                    (network(inputs).argmax(1) == labels).sum()
                    for inputs, labels in map(images.plain, torch.arange(len(images), device=place).split(EVALUATED))
                ]
            return int(torch.stack(right).sum()) / len(images)
        batches = ChannelsLast(cifar10()[0], split, EVALUATED)
        count = sum(int((network(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return count / len(split.labels)


def validation_accuracy(network: nn.Module) -> float:
    """Of the validation split: what may choose."""
    return accuracy(network, cifar10()[1])


def test_accuracy(network: nn.Module) -> float:
    """Of the other 8,000 test images: what is reported, and chooses nothing."""
    return accuracy(network, cifar10()[0].test)


def network(kind: str, seed: int) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(seed)
    if kind in ("vgg16", "googlenet"):
        return networks.vgg16() if kind == "vgg16" else networks.googlenet()
    if kind.endswith("vgg"):
        return SmallVGG(3, NARROW_VGG) if kind == "small-vgg" else SmallVGG(3)
    return CifarResNet(int(kind.removeprefix("resnet")))


def published(kind: str, folder: Path) -> nn.Module:
    """A CIFAR ResNet with the weights of its public checkpoint, ``resnet20-*.th`` and so on, from ``folder``."""
    found = sorted(folder.glob(f"{kind}-*.th"))
    if not found:
        raise FileNotFoundError(f"experiments: no {kind}-*.th in {folder}; name the folder with --weights")
    state = torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"]
    made = network(kind, 0)
    made.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return made
