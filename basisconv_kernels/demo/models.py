"""What the demo can be run on: image sets, networks, and the weights that the package carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from basisconv_kernels.demo import data
from basisconv_kernels.demo.networks import CifarResNet, SmallVGG

DATA: dict[str, Callable[[], data.ImageSet]] = {"fashion-mnist": data.fashion_mnist, "cifar10": data.cifar10}
CLASS_NAMES = {
    "fashion-mnist": data.CLASS_NAMES,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
NETWORKS = ("small-vgg", "resnet20", "resnet56")
SHIPPED = ("fashion-mnist", "small-vgg")  # the one combination whose weights the package carries
SHIPPED_BITS = {  # networks of that combination with filters of bits, trained and saved, by method
    "stacked binary": Path(__file__).resolve().parents[1] / "assets" / "fashion_vgg_stacked.safetensors",
    "XNOR": Path(__file__).resolve().parents[1] / "assets" / "fashion_vgg_xnor.safetensors",
}
SHIPPED_WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "fashion_vgg.safetensors"


def build(network: str, in_channels: int) -> nn.Module:
    """A network of the demo with random weights.

    Raises:
        ValueError: an unknown name, or images that it cannot read.
    """
    if network == "small-vgg":
        return SmallVGG(in_channels)
    if network not in NETWORKS:
        raise ValueError(f"demo: network must be one of {', '.join(NETWORKS)}, got {network!r}")
    if in_channels != 3:
        raise ValueError(f"demo: {network} reads colour images of 3 channels, these have {in_channels}; use cifar10")
    return CifarResNet(int(network.removeprefix("resnet")))


def weights_file(data_name: str, network: str, weights: Path | None) -> Path:
    """The file to take trained weights from: the user's, or the shipped one.

    Raises:
        ValueError: the user named none and the package carries none.
    """
    if weights is not None:
        return weights
    if (data_name, network) == SHIPPED:
        return SHIPPED_WEIGHTS
    raise ValueError(
        f"demo: the package carries weights for {SHIPPED[1]} on {SHIPPED[0]} only; name a file of trained weights for "
        f"{network} on {data_name} with --weights"
    )
