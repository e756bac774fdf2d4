"""What the compression tests share: small networks, third-party definitions, and the published ResNet-56."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels import testing
from basisconv_kernels.core import env
from basisconv_kernels.demo.networks import CifarResNet

HERE = Path(__file__).parent
WEIGHTS = "cifar_resnets/resnet56-4bfd9763.th"


@pytest.fixture
def spectra() -> list[dict[str, Any]]:
    """Shapes and singular values of the published ResNet-56, layer by layer."""
    return json.loads((HERE / "resnet56_spectra.json").read_text(encoding="utf-8"))["layers"]


@pytest.fixture(scope="session")
def resnet56() -> CifarResNet:
    """The published ResNet-56 itself; skips where its weights are not at hand."""
    path = env.data_folder() / WEIGHTS
    if not path.is_file():
        pytest.skip(f"{path} is not there; BASISCONV_DATA names the folder")
    maker = _load(HERE / "make_resnet56_spectra.py")
    return maker.load_resnet56(path)


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def torchvision_models() -> Any:
    """torchvision.models. With a CPU-only torch, torchvision imports once its operator registrations are left out."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return pytest.importorskip("torchvision.models")


@pytest.fixture(scope="session")
def timm(torchvision_models: Any) -> Any:
    """timm, which imports torchvision."""
    return pytest.importorskip("timm")


class Mixed(nn.Module):
    """One of everything: a shared module, depthwise, grouped, a subclass, transposed, never reached, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.shared = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.again = self.shared
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=2)
        self.pointwise = nn.Conv2d(24, 20, 1)
        self.odd = OddConv(20, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.unused = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.shared(torch.relu(self.again(x))))
        x = self.pointwise(self.grouped(self.depthwise(x)))
        return self.head(self.up(self.odd(x)).mean((2, 3)))


class OddConv(nn.Conv2d):
    """A subclass, whose forward may be anything."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.fixture
def mixed() -> Mixed:
    """``Mixed`` in float64, with a BatchNorm that is no identity."""
    torch.manual_seed(0)
    return randomize(Mixed().double())


@pytest.fixture
def image() -> Tensor:
    """An input of ``Mixed``."""
    return torch.randn(2, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which a signal lives through a deep network, and BatchNorms that are no identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(name="randomize")
def _randomize() -> Callable[..., nn.Module]:
    return randomize


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], None]:
    """Assert that two results of a network are equal up to rounding, and of one dtype."""

    def check(got: Tensor, expected: Tensor) -> None:
        assert got.dtype == expected.dtype
        testing.check_same_network(got, expected)

    return check
