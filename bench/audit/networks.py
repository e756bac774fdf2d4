"""Networks of torchvision and timm with random weights of a fixed seed, through which a signal gets."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
CLASSES = 1000
TORCHVISION: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "vgg16": {"init_weights": False},
    "resnet18": {},
    "resnet50": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "densenet121": {},
    "mobilenet_v2": {},
    "mobilenet_v3_large": {},
    "efficientnet_b0": {},
    "convnext_tiny": {},
    "squeezenet1_1": {},
    "shufflenet_v2_x1_0": {},
    "regnet_y_400mf": {},
}
TIMM = (
    "resnest14d",  # split attention
    "inception_v3",  # filters of 1×7 and 7×1
    "tf_efficientnet_lite0",  # padding "same" by a subclass
    "ghostnet_100",  # cheap depthwise halves, concatenated
    "hrnet_w18_small",  # branches of four resolutions
    "dla34",
    "convnext_atto",
    "edgenext_xx_small",  # reads a convolution's weight to know where it is
)
HALVED_FIVE_TIMES = ("timm/hrnet_w18_small", "timm/dla34")  # and added up again: sides must be multiples of 32
NAMES = (*TORCHVISION, *(f"timm/{name}" for name in TIMM))


class Unavailable(Exception):
    """A package that is not installed; the message says which."""


def package(name: str) -> Any:
    """A package by name. Beside a torch without CUDA, torchvision imports once its registrations are left out."""
    if not torch.backends.cuda.is_built():
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise Unavailable(f"{name} cannot be imported ({reason}): pip install {name}") from None


def images(size: int, count: int = 2) -> Tensor:
    """[count, 3, size, size], the same each time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(SEED + 1))


def build(name: str, size: int) -> nn.Module:
    """The network of that name in eval mode, for images of that size, the same each time.

    Raises:
        Unavailable: its package is not installed.
    """
    torch.manual_seed(SEED)
    if name.startswith("timm/"):
        package("torchvision")
        return enliven(package("timm").create_model(name.removeprefix("timm/"), num_classes=CLASSES), size)
    return enliven(getattr(package("torchvision").models, name)(num_classes=CLASSES, **TORCHVISION[name]), size)


@torch.no_grad()
def enliven(model: nn.Module, size: int) -> nn.Module:
    """Let a signal through that neither drowns nor blows up: its statistics in BatchNorms, then moved off a little.

    Weights are drawn anew only where there is no BatchNorm; else the package's own draw is as good.
    """
    generator = torch.Generator().manual_seed(SEED)
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for name, parameter in model.named_parameters():
        if name.endswith(("layer_scale", ".gamma")):  # ConvNeXt starts its branches at next to nothing
            parameter.uniform_(0.3, 0.6, generator=generator)
    for module in () if norms else model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0, 0.2, generator=generator)
        norm.momentum = 1.0
        norm.train()
    model(images(size, 4))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.2 * spread * torch.randn(spread.shape, generator=generator)
        norm.running_var *= torch.empty(spread.shape).uniform_(0.7, 1.4, generator=generator)
    return model.eval()
