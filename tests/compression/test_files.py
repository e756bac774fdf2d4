"""``save`` and ``load``: what comes back is what was saved, bit by bit."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, read_recipe, save
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, network_parameters
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

from .file_networks import (
    CONFIGS,
    QUARTER,
    ROOT,
    Small,
    bits,
    compressed,
    folded,
    image,
    joined,
    parts,
    predictions,
    refused,
    round_trip,
    snapshot,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config, path):
    model, fresh = compressed(config), Small()
    again = round_trip(model, fresh, path)
    assert again is fresh
    assert torch.equal(predictions(again), predictions(model))
    assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for name, layer in model.named_modules():
        if isinstance(layer, BasisConv2d):
            assert again.get_submodule(name).trains_basis == layer.trains_basis
            assert again.get_submodule(name).extra_repr() == layer.extra_repr()


def test_the_result_trains(path):
    save(compressed(CONFIGS["trained"]), path)
    model = load(path, Small())
    model(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_converted_network_of_the_same_structure(path):
    model = compressed()
    save(model, path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    predictions(other)  # packs its weights, which must not outlive the loading
    before = {name: id(t) for name, t in other.named_parameters()}
    assert load(path, other) is other
    assert {name: id(t) for name, t in other.named_parameters()} == before
    assert torch.equal(predictions(other), predictions(model))


def test_a_new_process_predicts_the_same(path):
    model = folded()
    save(model, path)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import importlib.util, torch
spec = importlib.util.spec_from_file_location("networks", {str(Path(__file__).with_name("file_networks.py"))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.load({str(path)!r}, module.Small())
sys.stdout.write(module.bits(module.predictions(model)).hex())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == bits(predictions(model)).hex()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_kept(dtype, path):
    model = compressed(CONFIGS["norm"]).to(dtype)
    again = round_trip(model, Small().to(dtype), path)
    assert {t.dtype for t in again.state_dict().values()} == {dtype, torch.int64}
    assert torch.equal(predictions(again, image(dtype)), predictions(model, image(dtype)))
    with pytest.raises(ArchitectureError, match=f"{dtype} in the file, torch.float32 in the model; convert the model"):
        load(path, Small())


def test_a_float32_norm_in_a_half_network(path):
    model = compressed(CONFIGS["norm"]).half()
    model.stem.basis_norm.float()
    again = round_trip(model, Small().half(), path)
    assert again.stem.basis_norm.weight.dtype == torch.float32


def test_everything_at_once(mixed, image, path):
    """A shared module, depthwise, grouped and transposed convolutions, a subclass; and the same, folded."""
    fresh = copy.deepcopy(mixed)
    model, _ = compress(mixed, BasisConfig(fraction=0.9, keep_dense="never"), example_inputs=image)
    again = round_trip(model, copy.deepcopy(fresh), path)
    assert isinstance(again.shared, BasisConv2d)
    assert again.shared is again.again
    assert read_recipe(path)["shared"]["shared.coefficients"] == "again.coefficients"
    assert torch.equal(predictions(again, image), predictions(model, image))
    lean, _ = fold_batchnorm(model, image)
    assert torch.equal(predictions(round_trip(lean, fresh, path), image), predictions(lean, image))


@pytest.fixture(scope="module")
def resnet18(torchvision_models) -> tuple[nn.Module, nn.Module]:
    """(dense, at Q = K/4)."""
    dense = torchvision_models.resnet18()
    return dense, compress(dense, QUARTER, example_inputs=torch.randn(1, 3, 32, 32))[0]


def test_resnet18(torchvision_models, resnet18, path):
    inputs, model = torch.randn(1, 3, 32, 32), resnet18[1]
    assert torch.equal(
        predictions(round_trip(model, torchvision_models.resnet18(), path), inputs), predictions(model, inputs)
    )
    lean, report = fold_batchnorm(model, inputs)
    assert len(report.chains) == 20
    fresh = torchvision_models.resnet18()
    assert torch.equal(predictions(round_trip(lean, fresh, path), inputs), predictions(lean, inputs))


def test_the_size_is_that_of_the_parameters(resnet18, path):
    dense, model = resnet18
    convs = [m for m in dense.modules() if isinstance(m, nn.Conv2d)]
    parameters = sum(p.numel() for p in dense.parameters())
    rest = parameters - sum(conv.weight.numel() for conv in convs)
    expected = 4 * (rest + sum(sum(formula(conv)) for conv in convs))
    save(model, path)
    assert network_parameters(model) * 4 == expected
    assert abs(path.stat().st_size / expected - 1) < 0.01
    assert parameters * 4 / path.stat().st_size > 3


def formula(conv: nn.Conv2d) -> tuple[int, int]:
    """(Q·D, K·Q) at Q = K/4."""
    K, taps = conv.out_channels, conv.weight[0].numel()
    return K // 4 * taps, K * (K // 4)


def test_mobilenet(torchvision_models, path):
    """Depthwise convolutions, and ReLU6."""
    make = functools.partial(torchvision_models.mobilenet_v2, num_classes=7)
    inputs = torch.randn(1, 3, 32, 32)
    lean, _ = fold_batchnorm(compress(make(), QUARTER, example_inputs=inputs)[0], inputs)
    assert torch.equal(predictions(round_trip(lean, make(), path), inputs), predictions(lean, inputs))


def test_a_network_of_timm(timm, path):
    """It is full of identities of its own."""
    make = functools.partial(timm.create_model, "resnet10t", num_classes=7)
    inputs = torch.randn(1, 3, 32, 32)
    model, _ = compress(make(), QUARTER, example_inputs=inputs)
    assert torch.equal(predictions(round_trip(model, make(), path), inputs), predictions(model, inputs))


def test_a_single_convolution(path):
    conv = nn.Conv2d(3, 8, 3)
    model = BasisConv2d.from_conv(conv, basis_channels=2)
    save(model, path)
    before = snapshot(conv)
    again = load(path, conv)
    assert again is not conv
    assert snapshot(conv) == before
    assert torch.equal(predictions(again), predictions(model))
    assert load(path, again) is again


def test_layers_trained_from_scratch(path):
    """Everything that no dense convolution has: the network is built by the same code."""

    def make() -> nn.Module:
        return nn.Sequential(
            BasisConv2d(3, 8, (3, 2), 4, padding=(0, 2, 1, 0), padding_mode="replicate", basis="dct", precise=True),
            BasisConv2d(8, 9, 3, 4, groups=2, compact=False, dilation=2, bias=False, activation="relu6"),
        )

    model = make()
    again = round_trip(model, make(), path)
    assert torch.equal(predictions(again), predictions(model))
    with pytest.raises(ArchitectureError, match="layer '0': padding_mode is 'replicate' in the file, 'zeros' in the"):
        load(path, nn.Sequential(BasisConv2d(3, 8, (3, 2), 5, padding=(0, 2, 1, 0)), nn.Identity()))


# --- folded networks --------------------------------------------------------------------------------------------------


def test_folded_as_a_whole(path):
    model, fresh = folded(), Small()
    before = snapshot(fresh)
    again = round_trip(model, fresh, path)
    assert snapshot(fresh) == before
    assert isinstance(again, torch.fx.GraphModule)
    assert again.stem.activation == "relu"
    assert torch.equal(predictions(again), predictions(model))
    assert again.training is fresh.training is True
    assert load(path, again) is again
    assert load(path, copy.deepcopy(again)) is not again


class Choosy(nn.Module):
    """What ``torch.fx`` cannot trace as a whole, and parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else x[:, :6]


def test_folded_in_parts(path):
    model, _ = fold_batchnorm(compressed(BasisConfig(basis_channels={"first.0": 3}), Choosy()), image())
    fresh = Choosy()
    again = round_trip(model, fresh, path)
    assert again is fresh
    assert isinstance(again.first, torch.fx.GraphModule)
    assert type(again.second.get_submodule("0")) is nn.Conv2d
    assert torch.equal(predictions(again), predictions(model))


def test_modules_replaced_by_identity(path):
    model = compressed()
    model.stem.fold(model.norm)
    model.norm = nn.Identity()
    assert torch.equal(predictions(round_trip(model, Small(), path)), predictions(model))
    model.head = nn.Identity()
    save(model, path)
    with pytest.raises(ArchitectureError, match="'head': an Identity in the file, in the model a Linear"):
        load(path, Small())


def test_a_dense_convolution_that_gained_a_bias(path):
    model, _ = fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), image())
    again = round_trip(model, nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), path)
    assert torch.equal(predictions(again), predictions(model))


class Arguments(nn.Module):
    """A graph with arguments of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("offset", torch.ones(4, 1, 1))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        x = self.norm(self.conv(x)) * scale + self.offset + self.unsaved + torch.tensor([0.5])
        x = torch.cat([x, x[..., 1:]], dim=-1).to(torch.float32, memory_format=torch.channels_last)
        x = torch.clamp(x, min=-math.inf, max=math.inf).to(torch.device("cpu"))
        return {"out": (x.flatten(2), [x.shape[0], None, True])}


def test_arguments_of_graphs(path):
    torch.manual_seed(0)
    model, _ = fold_batchnorm(Arguments(), image())
    assert isinstance(model, torch.fx.GraphModule)
    again = round_trip(model, Arguments(), path)
    (first, rest), (expected, other) = again(image())["out"], model(image())["out"]
    assert torch.equal(first, expected)
    assert rest == other
    assert torch.equal(again(image(), scale=3.0)["out"][0], model(image(), scale=3.0)["out"][0])


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.sigmoid"])
def test_a_graph_calls_only_what_the_network_calls(name, path):
    save(folded(), path)
    table, document, data = parts(path.read_bytes())
    node = next(node for node in document["graphs"][0]["nodes"] if node["op"] == "call_function")
    node["target"] = name
    path.write_bytes(joined(table, document, data))
    refused(path, Small(), ArchitectureError, f"graph '': it calls '{name}', which the model does not call")
