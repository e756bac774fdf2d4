"""Image sets for demo, tests and benchmarks: Fashion-MNIST from the package, CIFAR-10 from the user's disk."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from basisconv_kernels.core import env

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Split(NamedTuple):
    """Images [N, C, H, W] as uint8 and their labels [N] as int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """A classification data set with the per-channel normalisation its networks were trained with."""

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] → float32, ``(images/255 − mean)/std`` per channel."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


class Batches:
    """A sized, re-iterable loader of normalised batches, shuffled anew and augmented in each pass if ``train``.

    Args:
        data (ImageSet): where ``normalise`` comes from.
        split (Split): the images to deliver.
        batch_size (int): images a batch; the last batch may be smaller.
        train (bool): shuffle, pad by ``crop`` pixels and crop at random, flip left-right at random.
        crop (int): padding in pixels of the random crop.
        seed (int): seed of the order and the augmentation; pass ``n`` of two loaders with one seed is the same.
    """

    def __init__(
        self, data: ImageSet, split: Split, batch_size: int, *, train: bool = False, crop: int = 2, seed: int = 0
    ) -> None:
        self.data, self.split, self.batch_size, self.train, self.crop = data, split, batch_size, train, crop
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.split.labels)
        order = torch.randperm(count, generator=self.generator) if self.train else torch.arange(count)
        for chosen in order.split(self.batch_size):
            images = self.split.images[chosen]
            if self.train:
                images = self._augment(images)
            yield self.data.normalise(images), self.split.labels[chosen]

    def _augment(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.crop,) * 4)
        top = torch.randint(0, 2 * self.crop + 1, (count, 1, 1, 1), generator=self.generator)
        left = torch.randint(0, 2 * self.crop + 1, (count, 1, 1, 1), generator=self.generator)
        rows = top + torch.arange(height).view(1, 1, -1, 1)
        columns = left + torch.arange(width).view(1, 1, 1, -1)
        flip = torch.rand(count, 1, 1, 1, generator=self.generator) < 0.5
        columns = torch.where(flip, columns.flip(3), columns)
        index = torch.arange(count).view(-1, 1, 1, 1)
        return padded[index, torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes (the format of the MNIST family): magic, sizes, data."""
    with gzip.open(path, "rb") as stream:
        content = stream.read()
    zero, kind, rank = struct.unpack_from(">HBB", content)
    if zero != 0 or kind != 0x08:
        raise ValueError(f"{path.name}: not an IDX file of unsigned bytes (magic {content[:4].hex()})")
    sizes = struct.unpack_from(f">{rank}I", content, 4)
    values = torch.frombuffer(bytearray(content[4 + 4 * rank :]), dtype=torch.uint8)
    expected = int(torch.tensor(sizes).prod())
    if values.numel() != expected:
        raise ValueError(
            f"{path.name}: sizes {list(sizes)} need {expected} bytes of data, the file holds {values.numel()}"
        )
    return values.view(sizes)


def write_idx(path: Path, values: Tensor) -> None:
    """Write a uint8 tensor as a gzipped IDX file, byte-for-byte reproducible."""
    header = struct.pack(f">HBB{values.dim()}I", 0, 0x08, values.dim(), *values.shape)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as stream:
        stream.write(header + values.contiguous().numpy().tobytes())


def _fashion_split(folder: Path, prefix: str) -> Split:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").to(torch.int64)
    return Split(images, labels)


FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)


def fashion_mnist(*, complete: bool = False) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, MIT licence).

    Args:
        complete (bool): False gives what the package carries, all 10,000 test images and the first 6,000 training
            images; True gives all 60,000 training images from ``BASISCONV_DATA/fashion-mnist``.

    Raises:
        FileNotFoundError: ``complete`` and the files are absent.
    """
    if complete:
        folder = env.data_folder() / "fashion-mnist"
        if not (folder / "train-images-idx3-ubyte.gz").is_file():
            raise FileNotFoundError(
                f"fashion_mnist(complete=True): the four original idx files are expected in {folder}; "
                "put them there or name another folder with BASISCONV_DATA"
            )
        train, test = _fashion_split(folder, "train"), _fashion_split(folder, "t10k")
    else:
        with resources.as_file(resources.files("basisconv_kernels.assets")) as assets:
            train, test = _fashion_split(assets, "train6k"), _fashion_split(assets, "t10k")
    return ImageSet("Fashion-MNIST", train, test, FASHION_MEAN, FASHION_STD)


def cifar10() -> ImageSet:
    """CIFAR-10 (Krizhevsky 2009) from ``BASISCONV_DATA/cifar10.npz``, or through torchvision's download.

    The npz holds ``train_x`` [50000, 32, 32, 3] and ``test_x`` [10000, 32, 32, 3] as uint8, ``train_y`` and ``test_y``.

    Raises:
        FileNotFoundError: neither the npz nor torchvision is there.
    """
    path = env.data_folder() / "cifar10.npz"
    if path.is_file():
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in ("train_x", "train_y", "test_x", "test_y")}
        splits = [
            Split(arrays[f"{part}_x"].permute(0, 3, 1, 2).contiguous(), arrays[f"{part}_y"].to(torch.int64))
            for part in ("train", "test")
        ]
    else:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise FileNotFoundError(
                f"cifar10: no {path.name} in {path.parent} and torchvision is not installed; "
                "put the npz there, name another folder with BASISCONV_DATA, or install torchvision"
            ) from error
        loaded = [CIFAR10(str(path.parent), train=train, download=True) for train in (True, False)]
        splits = [
            Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in loaded
        ]
    return ImageSet("CIFAR-10", splits[0], splits[1], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
