"""Ten third-party networks, every method: a layer is converted, or refused by name; nothing is silently wrong.

At full rank the network gives what the dense one gives; a pruned network what the zeroed one gives; a binary or ternary
one what ordinary convolutions with its filters give; and each comes back from its file.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig, freeze_bits
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig

from .zeroing import zeroed

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
METHODS = {
    "basis": BasisConfig(fraction=1.0, keep_dense="never"),
    "tucker": TuckerConfig(fraction=1.0, keep_dense="never", rounds=0),
    "prune": PruneConfig(fraction=0.25),
    "ternary": TernaryConfig(method="twn"),
    "stacked": StackedBinaryConfig(splits=2, bank=0.25, rounds=1),
    "binary": BinaryConfig(),
}
TORCHVISION = (
    "squeezenet1_1", "resnet18", "vgg11_bn", "googlenet", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5",
    "regnet_y_400mf",
)  # fmt: skip
TIMM = ("convnext_atto", "resnest14d")
NETWORKS = [pytest.param(name, marks=[] if name == "squeezenet1_1" else pytest.mark.full) for name in TORCHVISION]
NETWORKS += [pytest.param(f"timm {name}", marks=pytest.mark.full) for name in TIMM]


@pytest.fixture
def build(torchvision_models, randomize, request):
    """A function name → network in eval mode, the same each time."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        if name.startswith("timm "):
            timm = request.getfixturevalue("timm")
            return randomize(timm.create_model(name.removeprefix("timm "), num_classes=7)).eval()
        more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return randomize(getattr(torchvision_models, name)(num_classes=7, **more)).eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_converts_or_refuses_by_name(name, method, build, tmp_path):
    dense = build(name)
    before = copy.deepcopy(dense.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks that had to be lowered, say
        small, report = compress(dense, METHODS[method], example_inputs=IMAGE)
    small.eval()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    convolutions = {key for key, module in dense.named_modules() if isinstance(module, nn.Conv2d)}
    assert {row.name for row in report.layers} == convolutions
    for row in report.layers:
        found = small.get_submodule(row.name)
        if row.verdict == "kept":
            assert row.reason, row.name
            assert type(found) is type(dense.get_submodule(row.name)), row.name
        elif row.replaced:
            assert type(found) is not nn.Conv2d, row.name
    expected, found = dense(IMAGE), small(IMAGE)
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    if method in ("basis", "tucker"):
        assert report.replaced
        testing.check_same_network(found, expected)
    elif method in ("ternary", "stacked"):
        assert report.replaced
        freeze_bits(small)
        testing.check_same_network(small(IMAGE), to_plain(small)(IMAGE))
    elif method == "prune":
        assert report.network_parameters_after < report.network_parameters_before
        testing.check_same_network(found, zeroed(dense, IMAGE, METHODS[method])(IMAGE))
    fresh = load(save_to(small, tmp_path / "small"), build(name), pruned=method == "prune").eval()
    assert torch.equal(fresh(IMAGE), small(IMAGE))


def save_to(model: nn.Module, path):
    save(model, path)
    return path
