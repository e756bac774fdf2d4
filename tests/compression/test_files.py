"""``save``, ``load`` and ``read_recipe``: what comes back, what is refused, and that a refusal touches nothing."""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import io
import json
import math
import operator
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from basisconv_kernels.compression import recipe
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import ArchitectureError, load, read_recipe, save
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, network_parameters, to_plain
from basisconv_kernels.compression.recipe import LayerKind
from basisconv_kernels.core.errors import FileFormatError
from basisconv_kernels.demo.networks import SmallVGG
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

ROOT = Path(__file__).parents[2]
HALF = BasisConfig(fraction=0.5, keep_dense="never")
QUARTER = BasisConfig(fraction=0.25)
REFUSALS = (FileFormatError, ArchitectureError)


class Small(nn.Module):
    """Two blocks, a residual and a grouped convolution: small enough to be loaded ten thousand times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=(1, 0), groups=2)
        self.mix = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.grouped(x)
        x = 2 * torch.relu(self.mix(x) + x) - 1
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)).contiguous(), 1))


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)


def compressed(config: BasisConfig = HALF, network: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    made, _ = compress(network or Small(), config, example_inputs=image())
    return made


def folded() -> nn.Module:
    made, _ = fold_batchnorm(compressed(), image())
    return made


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor | None = None) -> Tensor:
    flags = [(module, module.training) for module in model.modules()]
    out = model.eval()(image() if inputs is None else inputs)
    for module, flag in flags:
        module.training = flag
    return out


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> Any:
    """Everything about a network that a refused file must leave alone."""
    modules = [(name, id(m), m.training, list(vars(m))) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (name, id(t), t.data_ptr(), t.dtype, t.requires_grad, bits(t))
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, t in named
    ]
    return modules, tensors, bits(torch.get_rng_state())


def round_trip(model: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """Load what was saved, and check that saving it again gives the same bytes."""
    save(model, path)
    again = load(path, fresh)
    content = path.read_bytes()
    save(again, path)
    assert path.read_bytes() == content
    return again


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- round trips ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "frozen": HALF,
    "trained": BasisConfig(fraction=0.5, keep_dense="never", train_basis=True),
    "norm": BasisConfig(fraction=0.5, keep_dense="never", basis_norm=True),
    "some_stay_dense": BasisConfig(basis_channels={"mix": 3}),
    "all_stay_dense": BasisConfig(basis_channels={}),
}


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
spec = importlib.util.spec_from_file_location("test_files", {str(Path(__file__))!r})
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


# --- what a file holds ------------------------------------------------------------------------------------------------


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


def test_the_size_of_a_small_network(path):
    dense = SmallVGG()
    model, _ = compress(dense, BasisConfig(fraction=0.25, keep_dense="never"), example_inputs=torch.randn(1, 1, 28, 28))
    save(model, path)
    assert abs(path.stat().st_size / (4 * network_parameters(model)) - 1) < 0.015  # running statistics: 0.6 %


def test_other_readers(path):
    model = folded()
    save(model, path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())
    page = (ROOT / "docs/model_files.md").read_text(encoding="utf-8")
    code = page[page.index("import hashlib") : page.rindex("```")]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    document, tensors = namespace["read"](path)
    told = read_recipe(path)
    assert {key: document[key] for key in ("layers", "graphs", "shared")} == {
        key: told[key] for key in ("layers", "graphs", "shared")
    }
    assert all(tensors[name][2] == bits(value) for name, value in model.state_dict().items())


def test_read_recipe(path):
    save(compressed(), path)
    told = read_recipe(path)
    assert told["version"] == 1
    assert told["bytes"] == path.stat().st_size
    assert told["tensors"]["stem.basis_weight"] == {"dtype": "float32", "shape": [4, 3, 3, 3]}
    assert [(x["kind"], x["names"], x["basis_channels"], x["groups"]) for x in told["layers"]] == [
        ("basis_conv2d", ["grouped"], 6, 2),
        ("basis_conv2d", ["mix"], 6, 1),
        ("basis_conv2d", ["stem"], 4, 1),
    ]
    assert json.loads(json.dumps(told)) == told


def test_packed_weights_are_not_stored(path):
    model = compressed().eval()
    with torch.no_grad():
        model(image())
    save(model, path)
    assert set(read_recipe(path)["tensors"]) == set(model.state_dict())


def test_shared_memory_is_stored_once(path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False)
            self.b.weight = self.a.weight

    save(Tied(), path)
    assert path.stat().st_size < 50 * 50 * 4 * 1.1
    again = load(path, Tied())
    assert again.a.weight is again.b.weight
    untied = Tied()
    untied.b.weight = nn.Parameter(untied.a.weight.detach().clone())
    before = snapshot(untied)
    with pytest.raises(ArchitectureError, match=r"other tensors are one in the file than in the model: b\.weight"):
        load(path, untied)
    assert snapshot(untied) == before
    save(untied, path)
    with pytest.raises(ArchitectureError, match=r"other tensors are one .* b\.weight"):
        load(path, Tied())


def test_a_basis_shared_by_two_layers(path):
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3))

    model = make()
    for name in ("0", "2"):
        setattr(model, name, BasisConv2d.from_conv(model.get_submodule(name), basis_channels=3))
    model.get_submodule("2").basis_weight = model.get_submodule("0").basis_weight
    again = round_trip(model, make(), path)
    assert again.get_submodule("2").basis_weight is again.get_submodule("0").basis_weight


def test_layouts_of_memory(path):
    """Channels-last, transposed, expanded and overlapping tensors are stored by their values."""
    model = compressed().to(memory_format=torch.channels_last)
    model.head.weight = nn.Parameter(torch.arange(60.0).reshape(12, 5).t())
    whole = torch.arange(20.0)
    model.norm.running_mean, model.norm.running_var = whole[:8], whole[4:12]
    model.norm.weight = nn.Parameter(torch.ones(1).expand(8))
    again = round_trip(model, Small(), path)
    assert again.head.weight.is_contiguous()
    torch.testing.assert_close(predictions(again), predictions(model))


def test_the_given_network_keeps_its_flags(path):
    save(compressed(CONFIGS["norm"]).eval(), path)
    fresh = Small()
    fresh.norm.eval()
    fresh.stem.eval()
    fresh.mix.requires_grad_(False)
    fresh.head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    again = load(path, fresh)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any((again.norm.training, again.stem.training, again.stem.basis_norm.training))
    assert all((again.training, again.grouped.training, again.mix.basis_norm.training))
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == [
        "mix.coefficients",
        "mix.bias",
        "head.weight",
    ]


def test_copies_give_the_same_file(path):
    model = compressed()
    save(model, path)
    content = path.read_bytes()
    for other in (copy.deepcopy(model).eval(), pickle.loads(pickle.dumps(model))):
        save(other, path)
        assert path.read_bytes() == content
    save(load(path, Small()), path)
    assert path.read_bytes() == content


def test_no_pickle(path, monkeypatch):
    model, fresh = folded(), Small()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle")

    for owner, name in ((torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, fail)
    save(model, path)
    load(path, fresh)


# --- layer kinds of other methods -------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A stand-in for the layer of a later method: twice a low-rank Linear."""

    def __init__(self, inputs: int, outputs: int, rank: int, **kind: Any) -> None:
        super().__init__()
        self.sizes = (inputs, outputs, rank)
        self.down = nn.Parameter(torch.empty(rank, inputs, **kind))
        self.up = nn.Parameter(torch.empty(outputs, rank, **kind))
        self.also = nn.Conv2d(1, 1, 1, **kind)  # described by nobody but the layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.down.t() @ self.up.t()


def rebuild_doubled(description: dict[str, Any], module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Linear):
        raise ArchitectureError(f"the model's module is a {type(module).__name__}")
    made = Doubled(module.in_features, module.out_features, description["rank"], device="meta")
    return made.train(module.training)


DOUBLED = LayerKind(
    "doubled", Doubled, {"rank": recipe.integer(1)}, lambda layer: {"rank": layer.sizes[2]}, rebuild_doubled
)


def test_a_new_kind_of_layer(path, monkeypatch):
    monkeypatch.setattr(recipe, "_kinds", dict(recipe._kinds))
    model = compressed()
    model.head = Doubled(12, 5, 2)
    recipe.register(DOUBLED)
    with pytest.raises(ValueError, match="layer kind 'doubled' of Doubled is taken by 'doubled'"):
        recipe.register(DOUBLED)
    again = round_trip(model, Small(), path)
    assert isinstance(again.head, Doubled)
    assert torch.equal(predictions(again), predictions(model))
    del recipe._kinds["doubled"]
    with pytest.raises(
        FileFormatError, match="layer 'head' is of the kind 'doubled', which this package does not know"
    ):
        load(path, Small())


# --- what save refuses ------------------------------------------------------------------------------------------------


class Odd(BasisConv2d):
    """A subclass of a layer that the file would turn into the layer itself."""


class Extra(nn.Module):
    """State that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"anything": 1}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("text", TypeError, "save: model must be a torch.nn.Module, got str"),
        (nn.Sequential(Odd(3, 4, 3, 2)), TypeError, "save: '0': Odd is a subclass of BasisConv2d"),
        (nn.Sequential(Extra()), TypeError, "save: 0._extra_state must be a dense tensor of a usual dtype, got dict"),
        (nn.Linear(2, 2).to(torch.complex64), TypeError, "save: bias must be a dense tensor .*, got torch.complex64"),
        (nn.Linear(2, 2, device="meta"), ValueError, "save: weight has no values yet"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, "save: 0.weight has no values yet"),
        (
            nn.ModuleDict({"x" * 2000: nn.Conv2d(1, 1, 1)}),
            ValueError,
            "save: the format cannot hold this network: .*names",
        ),
    ],
    ids=["no_module", "subclass", "extra_state", "dtype", "meta", "lazy", "long_name"],
)
def test_save_refuses(model, error, message, path):
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        save(model, path)
    assert path.read_bytes() == b"old"


def test_save_refuses_graphs_with_other_arguments(path):
    model = folded()
    node = next(node for node in model.graph.nodes if node.op == "call_method")
    node.args = (*node.args, range(3))
    with pytest.raises(TypeError, match=r"save: '': node 'contiguous' of the graph has an argument of <class 'range'>"):
        save(model, path)


# --- what load refuses ------------------------------------------------------------------------------------------------


def refused(path: Path, model: nn.Module, error: type[Exception], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load(path, model)
    assert str(caught.value).startswith(f"load: {path}: ")
    assert snapshot(model) == before


def small_with(**changes: nn.Module) -> nn.Module:
    model = Small()
    for name, module in changes.items():
        setattr(model, name, module)
    return model


GROUPED = functools.partial(nn.Conv2d, 8, 12, 3, padding=(1, 0), groups=2)
MISMATCHES = {
    "missing": (nn.Sequential(nn.Conv2d(3, 8, 3)), "has no module 'grouped', which the file needs"),
    "stride": (small_with(grouped=GROUPED(stride=1)), r"'grouped': stride is \[2, 2\] in the file, \[1, 1\] in the"),
    "kernel": (
        small_with(mix=nn.Conv2d(12, 12, 5, padding=1)),
        r"'mix': kernel_size is \[3, 3\] in the file, \[5, 5\]",
    ),
    "channels": (small_with(stem=nn.Conv2d(3, 9, 3, padding=1)), "'stem': out_channels is 8 in the file, 9 in the"),
    "bias": (small_with(stem=nn.Conv2d(3, 8, 3, padding=1)), "'stem': it has no bias in the file, one in the model"),
    "kind": (small_with(mix=nn.Linear(12, 12)), "'mix': the model's module is a Linear, not a Conv2d"),
    "shape": (small_with(head=nn.Linear(12, 6)), r"head.bias is \[5\] in the file, \[6\] in the model"),
    "lacks": (small_with(norm=nn.Identity()), "has a identity at 'norm', the file has none"),
    "more": (small_with(extra=nn.Linear(1, 1)), r"the file lacks: extra.bias, extra.weight"),
    "layer": (small_with(extra=nn.Conv2d(1, 1, 1)), "the model has a conv2d at 'extra', the file has none"),
    "dtype": (small_with(head=nn.Linear(12, 5).half()), "head.bias is torch.float32 in the file, torch.float16 in the"),
}


@pytest.mark.parametrize(("model", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_architecture(model, message, path):
    save(compressed(), path)
    refused(path, model, ArchitectureError, message)


def test_another_architecture_of_a_folded_network(path):
    save(folded(), path)

    class Other(Small):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    class Untraceable(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    class More(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.mix(x.repeat(1, 4, 1, 1))[:, :3])

    refused(path, Other(), ArchitectureError, r"graph '': its inputs are \[\('x', \[\]\)\] in the file")
    refused(path, Untraceable(), ArchitectureError, "graph '': torch.fx cannot trace the model's module: ")
    refused(path, small_with(mix=nn.Sequential(nn.Conv2d(12, 12, 3))), ArchitectureError, "'mix': .* is a Sequential")
    load(path, More())  # the graph has all modules that this network calls, so it is not told apart


def test_a_module_that_is_shared_in_the_file_only(mixed, image, path):
    model, _ = compress(mixed, HALF, example_inputs=image)
    save(model, path)
    mixed.again = copy.deepcopy(mixed.shared)
    refused(path, mixed, ArchitectureError, "layer 'again' is one with shared in the file, not in the model")


def test_parameters_that_overlap_cannot_hold_the_values(path):
    save(compressed(), path)
    model = Small()
    whole = torch.zeros(12)
    model.norm.weight, model.norm.bias = nn.Parameter(whole[:8]), nn.Parameter(whole[4:])
    refused(path, model, ArchitectureError, "the model's memory does not hold the values of norm.weight")


def test_models_without_values(path):
    save(compressed(), path)
    with pytest.raises(ValueError, match=r"load: stem.weight has no values yet; build the network on a real device"):
        load(path, Small().to("meta"))
    with pytest.raises(TypeError, match=r"load: model must be a torch.nn.Module, got str"):
        load(path, "text")
    with pytest.raises(FileNotFoundError):
        load(path.with_name("nothing"), Small())


@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("make", [compressed, folded, Small], ids=["layers", "graph", "dense"])
def test_a_failure_half_way_is_undone(make, error, path, monkeypatch):
    save(make(), path)
    model = Small()
    before = snapshot(model)

    def half_way(module: nn.Module, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in list(module.state_dict().items())[:5]:
                value.copy_(state[name])
        raise error

    monkeypatch.setattr(nn.Module, "load_state_dict", half_way)
    with pytest.raises(ArchitectureError if isinstance(error, RuntimeError) else type(error)):
        load(path, model)
    assert snapshot(model) == before


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(tensor table, document, data) of a file."""
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    return table, json.loads(table.pop("__metadata__")["basisconv_kernels"]), content[8 + length :]


def joined(table: dict[str, Any], document: Any, data: bytes, digest: bool = True) -> bytes:
    """A file of these parts, its digest computed again."""
    if isinstance(document, dict) and digest:
        document = {**document, "sha256": "0" * 64}
    text = document if isinstance(document, str) else json.dumps(document)
    header = json.dumps({"__metadata__": {"basisconv_kernels": text}, **table}).encode()
    content = packed(header + b" " * (-len(header) % 8), data)
    if not digest:
        return content
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def test_files_of_others(path):
    model = Small()
    for content, message in (
        (b"", "truncated or foreign: 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated or foreign: its first 8 bytes announce"),
        ((2**62).to_bytes(8, "little") + bytes(100), "announce a header of 4611686018427387904 bytes"),
        (packed(b"[]", b""), "its JSON must be an object"),
        (packed(b"\xff\xfe", b""), "its header is no UTF-8"),
        (packed(b"{" + b'"a":{' * 100_000, b""), "its JSON does not parse"),
        (packed(b'{"a":' + b"[" * 60 + b"]" * 60 + b"}", b""), "nested more than 40 deep"),
        (packed(b'{"a":1,"a":2}', b""), "names a key twice"),
        (packed(b'{"a":NaN}', b""), "the number 'NaN', which is not finite"),
        (packed(b'{"a":1e999}', b""), "the number '1e999', which is not finite"),
        (packed(b'{"a":' + b"9" * 5000 + b"}", b""), "its JSON does not parse: Exceeds the limit"),
        (safetensors.torch.save(model.state_dict()), "basisconv_kernels did not write it"),
        (safetensors.torch.save(model.state_dict(), {"format": "pt"}), "basisconv_kernels did not write it"),
    ):
        path.write_bytes(content)
        refused(path, model, FileFormatError, message)
        with pytest.raises(FileFormatError, match=f"read_recipe: {re.escape(str(path))}: "):
            read_recipe(path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    path.write_bytes(buffer.getvalue())
    refused(path, model, FileFormatError, "truncated or foreign")


def edited(content: bytes, target: str, value: Any) -> bytes:
    """The file with one value of its document replaced: "layers.0.stride" = value."""
    table, document, data = parts(content)
    *steps, last = (int(step) if step.isdigit() else step for step in target.split("."))
    place: Any = functools.reduce(lambda part, step: part[step], steps, document)
    place[last] = value
    return joined(table, document, data, digest=target != "sha256")


EDITS = {
    "newer": ("version", 2, "has format version 2, this package reads versions up to 1; install a newer package"),
    "version_bool": ("version", True, "version must be an int of at least 1, got True"),
    "version_zero": ("version", 0, "version must be an int of at least 1, got 0"),
    "digest": ("sha256", "0" * 64, "truncated or edited: its content does not have the digest that it states"),
    "no_digest": ("sha256", None, "sha256 must be 64 hexadecimal digits, got None"),
    "unknown_key": ("more", 1, "the recipe must hold exactly layers, graphs, shared"),
    "layers": ("layers", {}, "layers must be a list"),
    "kind": ("layers.0.kind", "tucker_conv2d", "'tucker_conv2d', which this package does not know: a newer package"),
    "field": ("layers.0.depth", 1, r"layer 'grouped' \(basis_conv2d\) must hold exactly"),
    "bool_for_int": ("layers.0.basis_channels", True, "basis_channels must be an int in 1..2147483647, got True"),
    "zero": ("layers.0.basis_channels", 0, "basis_channels must be an int in 1"),
    "float_for_int": ("layers.0.groups", 2.0, "groups must be an int in 1"),
    "int_for_bool": ("layers.0.compact", 1, "compact must be one of False, True, got 1"),
    "huge": ("layers.0.in_channels", 2**40, "in_channels must be an int in 1"),
    "stride": ("layers.0.stride", [2], "stride must be 2 ints of at least 1"),
    "padding": ("layers.0.padding", "full", "padding must be one of 'same', 'valid' or 2 ints"),
    "activation": ("layers.0.activation", "gelu", "activation must be one of null, 'relu', 'relu6', got 'gelu'"),
    "norm": ("layers.0.basis_norm", {"eps": -1}, "basis_norm must be one of null or {eps: a number"),
    "name_twice": ("layers.0.names", ["mix"], "two entries of the recipe have the same name"),
    "names_empty": ("layers.0.names", [], "must have a list of different names"),
    "order": ("layers.0.names", ["z"], "must be in the order of their first names"),
    "channels": ("layers.0.basis_channels", 4, r"'grouped.coefficients' must be \[12, 2\], got \[12, 3\]"),
    "divisible": ("layers.0.basis_channels", 5, "basis_channels must be divisible by groups = 2, got 5"),
    "shared": ("shared", {"head.bias": "stem.bias"}, "shared: 'head.bias' must be a later name of a stored tensor"),
}


@pytest.mark.parametrize(("target", "value", "message"), EDITS.values(), ids=EDITS)
def test_edited_recipes(target, value, message, path):
    save(compressed(), path)
    path.write_bytes(edited(path.read_bytes(), target, value))
    refused(path, Small(), FileFormatError, message)


GRAPH_EDITS = {
    "op": ("1.op", "run", FileFormatError, "graph '', node 1 must have one of the ops"),
    "later": ("1.args", [{"node": 1}], FileFormatError, "node 1: {'node': 1} is no argument"),
    "output": ("1.op", "output", FileFormatError, "inputs come first and one output last"),
    "keyword": ("1.kwargs", {"a=1)#": 1}, FileFormatError, "kwargs must have names"),
    "placeholder": ("0.target", "y", ArchitectureError, "its inputs are .* in the file"),
    "module": ("1.target", "training", ArchitectureError, "the model calls 'stem', the graph does not"),
    "operands": ("5.args", [], ArchitectureError, "torch.fx makes no program of it"),
}


@pytest.mark.parametrize(("target", "value", "error", "message"), GRAPH_EDITS.values(), ids=GRAPH_EDITS)
def test_edited_graphs(target, value, error, message, path):
    save(folded(), path)
    path.write_bytes(edited(path.read_bytes(), f"graphs.0.nodes.{target}", value))
    refused(path, Small(), error, message)


def test_edited_tables(path):
    save(compressed(), path)
    table, document, data = parts(path.read_bytes())
    for key, value, message in (
        ("dtype", "F4", "tensor 'head.bias' must have a dtype of F64, F32"),
        ("dtype", ["F32"], "tensor 'head.bias' must have a dtype of F64, F32"),
        ("shape", [True, 5], "must have a shape of sizes"),
        ("shape", [-5], "must have a shape of sizes"),
        ("shape", [0, 2**31, 2**31], "is too large"),
        ("shape", [6], "no intact safetensors file"),
        ("data_offsets", [0, 2**60], "no intact safetensors file"),
    ):
        other = copy.deepcopy(table)
        other["head.bias"][key] = value
        path.write_bytes(joined(other, document, data))
        refused(path, Small(), FileFormatError, message)
    path.write_bytes(joined(table, document, data + b"more"))
    refused(path, Small(), FileFormatError, "no intact safetensors file")
    del table["head.bias"]
    path.write_bytes(joined(table, document, data))
    refused(path, Small(), FileFormatError, "no intact safetensors file")


def damaged(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """The file with one ordinary damage: bits, a cut, a splice, its header's length, a swap."""
    at = dice.randrange(len(content))
    length = int.from_bytes(content[:8], "little")
    kind = dice.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + other[dice.randrange(len(other)) :]
    if kind == 2:
        return content[:at] + content[at + dice.randrange(1, 20) :]
    if kind == 3:
        return content[:at] + dice.randbytes(dice.randrange(1, 20)) + content[at:]
    if kind == 4:
        wrong = dice.choice([0, 1, length - 8, length + 1, length + dice.randrange(-50, 50), 2**31, 2**63, 2**64 - 1])
        return (wrong % 2**64).to_bytes(8, "little") + content[8:]
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 1, 3, 50])):
        place = dice.randrange(8 + length) if kind == 5 else dice.randrange(len(content))
        changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, "", "x", "stem", "relu", "same",
    "float32", "torch.load", "getattr", "__class__", "\ud800", "a\nb", [], {}, [1], [0, 0], [1, 1], [[]], {"node": 0},
    {"node": 99}, {"tuple": []}, {"dict": {}}, {"slice": [None, 1]}, {"float": "nan"}, {"dtype": "torch.float16"},
    {"device": "cuda:7"},
)  # fmt: skip


def edited_json(value: Any, dice: random.Random) -> Any:
    """The JSON value with one edit somewhere inside, every place being as likely."""
    value = copy.deepcopy(value)
    containers, places = [value], []
    while containers:
        container = containers.pop()
        places += [(container, key) for key in (container if isinstance(container, dict) else range(len(container)))]
        inner = container.values() if isinstance(container, dict) else container
        containers += [child for child in inner if isinstance(child, (dict, list))]
    if not places:
        return dice.choice(ODD_VALUES)
    container, key = dice.choice(places)
    action, other = dice.random(), copy.deepcopy(operator.getitem(*dice.choice(places)))
    if action < 0.4:
        container[key] = copy.deepcopy(dice.choice(ODD_VALUES))
    elif action < 0.6:
        container[key] = other
    elif action < 0.7 and type(container[key]) is int:
        container[key] += dice.choice([-1, 1])
    elif action < 0.85:
        del container[key]
    elif isinstance(container, list):
        container.insert(key, other)
    else:
        container[dice.choice(["x", "kwargs", *container])] = container.pop(key)
    return value


def forged(content: bytes, _: bytes, dice: random.Random) -> bytes:
    """The file with edits of its recipe, its table or its data, and a digest that fits."""
    table, document, data = parts(content)
    kind = dice.random()
    for _ in range(dice.choice([1, 1, 2])):
        if kind < 0.7:
            document = edited_json(document, dice)
        elif kind < 0.9:
            table = edited_json(table, dice)
        else:
            at = dice.randrange(len(data))
            data = dice.choice([data[:at], data[:at] + data[at + 1 :], data[:at] + dice.randbytes(1) + data[at + 1 :]])
    if not isinstance(table, dict):
        table = {"x": table}
    return joined(table, document, data)


@functools.cache
def originals() -> tuple[bytes, ...]:
    """Files of three networks: as compressed, folded, and with BatchNorms between the stages."""
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / str(number) for number in range(3)]
        for name, network in zip(names, (compressed(), folded(), compressed(CONFIGS["norm"])), strict=True):
            save(network, name)
        return tuple(name.read_bytes() for name in names)


def attack(path: Path, count: int, seed: int, mutate: Any) -> int:
    """Load ``count`` mutated files; how many of them were still good."""
    dice = random.Random(seed)
    contents = originals()
    torch.manual_seed(0)
    model = Small()
    good = 0
    for number in range(count):
        content = contents[number % len(contents)]
        mutated = mutate(content, dice.choice(contents), dice)
        path.write_bytes(mutated)
        start = time.perf_counter()
        target = copy.deepcopy(model)
        untouched = snapshot(target)
        try:
            told = read_recipe(path)
            result = load(path, target)
        except REFUSALS:
            result = None
        assert time.perf_counter() - start < 10
        if result is None:
            assert snapshot(target) == untouched
            continue
        # Still good: what was loaded is what the file says, to the last bit.
        good += 1
        table, _, data = parts(mutated)
        state = result.state_dict()
        assert all(bits(state[name]) == data[slice(*entry["data_offsets"])] for name, entry in table.items())
        save(result, path)
        assert {**read_recipe(path), "bytes": 0} == {**told, "bytes": 0}
    return good


def test_damaged_files(path):
    for content in originals():
        path.write_bytes(content)
        load(path, Small())
    assert attack(path, 500, 0, damaged) <= 5  # a damage may leave a file as it was


def test_forged_files(path):
    good = attack(path, 400, 1, forged)
    assert 0 < good < 200


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
def test_ten_thousand_files(path, seed):
    attack(path, 1250, seed, damaged)
    attack(path, 1250, seed, forged)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_failures_leave_the_old_file(path, monkeypatch):
    save(compressed(), path)
    old = path.read_bytes()
    model = folded()

    def fail(error: BaseException) -> Any:
        def raise_it(*args: Any, **kwargs: Any) -> Any:
            raise error

        return raise_it

    full = OSError(errno.ENOSPC, "No space left on device")
    for owner, name, error in (
        (safetensors.torch, "save", full),
        (hashlib, "sha256", MemoryError()),
        (os, "fsync", full),
        (os, "replace", PermissionError(errno.EACCES, "denied")),
        (os, "replace", KeyboardInterrupt()),
        (json, "dumps", RecursionError()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail(error))
            with pytest.raises(type(error)):
                save(model, path)
        assert path.read_bytes() == old
        assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up(path):
    import resource

    save(Small(), path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(Small(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_links_and_permissions_stay(path):
    save(Small(), path)
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    save(compressed(), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert load(path, Small()).stem.basis_channels == 4
    with pytest.raises(FileNotFoundError):
        save(Small(), path.with_name("nowhere") / "model")


def test_networks_of_ordinary_modules_are_for_other_tools(path):
    save(to_plain(compressed()), path)
    refused(path, Small(), ArchitectureError, "the model has no module 'grouped.basis'")
