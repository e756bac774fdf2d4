"""Training that is killed, repeated, validated, in mixed precision, compiled."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from basisconv_kernels.compression import finetune_state
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.finetune import finetune, trainable_parameters
from basisconv_kernels.compression.model import compress
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError
from tests.compression.killed import killed_at

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(24, 2, 6, 6, generator=GENERATOR)
LABELS = torch.randint(3, (24,), generator=GENERATOR)


def network(width: int = 12) -> nn.Module:
    """A compressed network with BatchNorm and dropout, which draws random numbers."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    config = BasisConfig(fraction=0.25, train_basis=True, keep_dense="never")
    return compress(dense, config, example_inputs=IMAGES[:2])[0]


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True)


def validate(model: nn.Module) -> float:
    """How near the logits are to a number."""
    return float(-(model(IMAGES) - 0.1).square().mean())


def train(model: nn.Module, batches=None, judge=validate, **settings):
    """Three epochs of three steps with Adam and a schedule by step."""
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
    settings = {"epochs": 3, "save_every": 0.0, "orthogonality": 0.1, "progress": False} | settings
    return finetune(
        model, loader() if batches is None else batches, optimizer=optimizer, scheduler=schedule,
        scheduler_step="step", validate=judge, **settings,
    )  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def without_times(history):
    return [replace(record, seconds=0.0) for record in history]


def interrupted(where: str, count: int, path) -> int:
    """Train in a child that kills itself with SIGKILL at the count-th step, validation or moment of a save."""

    def run(tick):
        class Ticking(DataLoader):
            def __iter__(self):
                for batch in super().__iter__():
                    tick("step")
                    yield batch

        def judge(model):
            tick("validation")
            return validate(model)

        train(network(), Ticking(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True), judge, checkpoint=path)

    return killed_at(where, count, run)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("where", "counts"),
    [("step", (2, 3, 5)), ("validation", (1, 2)), ("fsync", (1, 4, 9)), ("replace", (1, 3, 5))],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(where, counts, tmp_path):
    path = tmp_path / "run.state"
    for count in counts:
        assert interrupted(where, count, path) == -signal.SIGKILL
    resumed, whole = network(), network()
    found = train(resumed, checkpoint=path)
    expected = train(whole, seed=0)
    assert same(resumed, whole)
    assert without_times(found) == without_times(expected)


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    path, first, again = tmp_path / "run.state", network(), network()
    history = train(first, checkpoint=path)
    assert train(again, [], checkpoint=path) == history
    assert same(first, again)


def test_one_seed_gives_one_result_and_leaves_the_callers_numbers_alone():
    models = [network() for _ in range(3)]
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    train(models[0], seed=5)
    assert torch.equal(torch.rand(2), expected)
    train(models[1], seed=5)
    train(models[2], seed=6)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_best_epoch_is_kept():
    states, values = [], iter([0.2, 0.7, 0.7])

    def judge(model):
        assert not model.training
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(values)

    model = network()
    history = train(model, judge=judge, seed=0)
    assert [record.validation for record in history] == [0.2, 0.7, 0.7]
    assert all(torch.equal(value, states[1][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, states[2][name]) for name, value in model.state_dict().items())


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.state"
    train(network(), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ArchitectureError, match="another epochs, seed;"):
        train(network(), checkpoint=path, epochs=4, seed=1)
    with pytest.raises(ArchitectureError, match="another network"):
        train(network(10), checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "edited", "empty", "a model"])
def test_damaged_checkpoints_are_refused(damage, tmp_path):
    path = tmp_path / "run.state"
    train(network(), checkpoint=path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-9]
    elif damage == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if damage == "a model":
        from basisconv_kernels.compression.files import save

        save(network(), path)
    with pytest.raises(FileFormatError):
        train(network(), checkpoint=path)


def test_what_no_file_can_hold_is_refused():
    with pytest.raises(TypeError, match="cannot hold a object"):
        finetune_state.flatten({"a": [object()]}, [])
    tree = {"a": (1, 2.5, None), 3: [torch.ones(2), True], "b": {"c": "text"}}
    tensors: list[torch.Tensor] = []
    flat = finetune_state.flatten(tree, tensors)
    again = finetune_state.restore(flat, {str(i): t for i, t in enumerate(tensors)})
    assert again["a"] == tree["a"]
    assert again[3][0] is tree[3][0]
    assert again["b"] == {"c": "text"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model, seen = network(), set()
    handle = model[-1].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    history = train(model, autocast=dtype, seed=0)
    handle.remove()
    assert dtype in seen
    assert model[0].basis_weight.dtype == torch.float32
    exact = train(network(), seed=0)
    assert history[0].loss == pytest.approx(exact[0].loss, rel=0.02)


def test_a_scaled_loss_steps_on_plain_gradients():
    """Weights after a step of float16 autocast, which scales the loss, are near those without it."""
    moved = []
    for dtype in (None, torch.float16):
        model = network()
        finetune(model, [(IMAGES, LABELS)], lr=0.1, autocast=dtype, seed=0, progress=False)
        moved.append(model[4].coefficients.detach() - network()[4].coefficients.detach())
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.05


@pytest.mark.full
def test_a_compiled_network_learns_the_same(fresh_compiler):
    eager, compiled = network(), network()
    for model in (eager, compiled):
        model[3].p = 0.0
    whole = train(eager, seed=0)
    found = train(compiled, seed=0, compiled=True)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in whole], rel=1e-3)
    for (name, one), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3, msg=name)
