"""What a model file holds, and how it reaches the disk."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from basisconv_kernels.compression import recipe
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, read_recipe, save
from basisconv_kernels.compression.model import compress, network_parameters, to_plain
from basisconv_kernels.compression.recipe import LayerKind
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError
from basisconv_kernels.demo.networks import SmallVGG
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

from .file_networks import (
    CONFIGS,
    ROOT,
    Small,
    bits,
    compressed,
    folded,
    image,
    predictions,
    refused,
    round_trip,
    snapshot,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- what a file holds ------------------------------------------------------------------------------------------------


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
        self.down = nn.Parameter(torch.randn(rank, inputs, **kind))
        self.up = nn.Parameter(torch.randn(outputs, rank, **kind))
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
