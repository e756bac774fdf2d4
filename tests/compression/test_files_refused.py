"""What ``save`` and ``load`` refuse by name, and that a refusal touches nothing."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.model import compress
from basisconv_kernels.core.errors import ArchitectureError
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

from .file_networks import HALF, Small, compressed, folded, refused, snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


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
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            TypeError,
            "save: bias must be a dense tensor .*, got torch.complex64",
        ),
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


def test_save_names_a_folder_that_does_not_exist(path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*there is no folder .*missing; create it first"):
        save(Small(), path.parent / "missing" / path.name)


def test_save_refuses_graphs_with_other_arguments(path):
    model = folded()
    node = next(node for node in model.graph.nodes if node.op == "call_method")
    args = node.args
    node.args = (*args, "\ud800")
    with pytest.raises(ValueError, match="the format cannot hold this network: 'utf-8' codec"):
        save(model, path)
    node.args = (*args, range(3))
    with pytest.raises(TypeError, match=r"save: '': node 'contiguous' of the graph has an argument of <class 'range'>"):
        save(model, path)


# --- what load refuses ------------------------------------------------------------------------------------------------


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
    "lacks": (small_with(norm=nn.Identity()), r"the model has a layer 'norm' \(identity\), the file has none there"),
    "more": (small_with(extra=nn.Linear(1, 1)), r"the file lacks: extra.bias, extra.weight"),
    "layer": (
        small_with(extra=nn.Conv2d(1, 1, 1)),
        r"the model has a layer 'extra' \(conv2d\), the file has none there",
    ),
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


def test_a_model_of_inference_tensors(path):
    """PyTorch writes them first and complains then, so they are refused before."""
    save(compressed(), path)
    with torch.inference_mode():
        model = Small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"load: stem.weight was made in torch.inference_mode\(\); load there too"):
        load(path, model)
    assert snapshot(model) == before
    with torch.inference_mode():
        assert isinstance(load(path, model).stem, BasisConv2d)


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
