"""Layer-wise training: pruning, order, bound and restore, reports, and runs killed at any point."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from basisconv_kernels.compression import ternary_layers, ternary_state
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.ternary import train_layerwise
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError
from basisconv_kernels.layers.ternary import TernaryLayer
from tests.compression.killed import killed_at

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(24, 2, 6, 6, generator=GENERATOR)
TARGETS = torch.randint(3, (24,), generator=GENERATOR)


def network():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


class Shuffled:
    """Batches in an order drawn from PyTorch's generator, as a DataLoader with shuffle does."""

    def __iter__(self):
        for chosen in torch.randperm(len(IMAGES)).split(6):
            yield IMAGES[chosen], TARGETS[chosen]


def accuracy(model):
    return (model(IMAGES).argmax(1) == TARGETS).float().mean().item()


def config(**changes):
    base = {
        "loader": Shuffled(), "evaluate": accuracy, "sparsity": 0.5, "bound": 1.0, "baseline": 1.0, "lr": 0.02,
        "prune_lr": 0.05, "save_every": 0.0,
    }  # fmt: skip
    return TernaryConfig(**{**base, **changes})


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- pruning and order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.8, 1.0])
def test_pruning_takes_the_smallest_of_the_whole_network_in_exact_number(sparsity):
    weights = {"a": torch.randn(7, 5), "b": 3 * torch.randn(2, 3, 3, 3), "c": torch.full((10,), 0.25)}
    masks = ternary_layers.prune_masks(weights, sparsity)
    kept = torch.cat([masks[n].reshape(-1) for n in weights])
    size = torch.cat([weights[n].abs().reshape(-1) for n in weights])
    assert int((~kept).sum()) == round(sparsity * kept.numel())
    if 0 < sparsity < 1:
        assert size[~kept].max() <= size[kept].min()
    again = ternary_layers.prune_masks(weights, sparsity)
    assert all(torch.equal(masks[n], again[n]) for n in weights)


def test_equal_magnitudes_go_in_order():
    masks = ternary_layers.prune_masks({"a": torch.ones(4), "b": -torch.ones(4)}, 0.375)
    assert masks["a"].tolist() == [False, False, False, True]
    assert masks["b"].all()


def test_the_sparsest_layer_comes_first_and_of_equals_the_larger():
    masks = {
        "half": torch.tensor([True, False]),
        "small_full": torch.ones(3, dtype=torch.bool),
        "large_full": torch.ones(5, dtype=torch.bool),
        "sparse": torch.tensor([True] + [False] * 9),
    }
    assert ternary_layers.order_of(masks) == ["sparse", "half", "large_full", "small_full"]


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_every_layer_is_constrained_within_a_wide_bound():
    model = network()
    before = state_of(model)
    found, report = train_layerwise(model, config())
    assert_same(state_of(model), before)  # a copy was trained
    assert [row.verdict for row in report.layers] == ["constrained"] * 3
    assert {row.name for row in report.layers} == {"0", "3", "7"}
    layers = [m for m in found.modules() if isinstance(m, TernaryLayer)]
    assert all(layer.is_packed for layer in layers)
    total = sum(row.weights for row in report.layers)
    assert round(sum(row.density * row.weights for row in report.layers)) == total - round(0.5 * total)
    assert len(report.history) == 4  # pruning and three layers
    assert report.layer_ratio > report.network_ratio > 1
    # No layer assumes a ternary neighbour: the network runs, and its plain form computes the same.
    image = IMAGES[:3]
    torch.testing.assert_close(to_plain(found.eval())(image), found.eval()(image))
    assert "constrained" in report.to_table()
    assert report.to_dict()["layers"][0]["ratio"] == report.layers[0].ratio


def test_pruned_weights_stay_zero_and_sigma_positive():
    found, report = train_layerwise(network(), config(pack=False, lr=0.3))
    for layer in (m for m in found.modules() if isinstance(m, TernaryLayer)):
        assert torch.equal(layer.ternary() != 0, layer.mask)
        assert (layer.scales()[0] > 0).all()
    assert report.final == pytest.approx(accuracy(found.eval()))


def test_a_layer_that_costs_too_much_is_put_back_bit_by_bit():
    """LW4: the second layer fails; what was before it comes back, and the loop goes on."""
    seen = []

    def evaluate(model):
        seen.append(state_of(model))
        constrained = sum(isinstance(m, TernaryLayer) for m in model.modules())
        return 0.2 if len(seen) == 4 and constrained == 2 else 0.9

    found, report = train_layerwise(network(), config(evaluate=evaluate, baseline=None, bound=0.05, pack=False))
    order = sorted(report.layers, key=lambda row: row.density)
    assert [row.verdict for row in order] == ["constrained", "kept", "constrained"]
    assert "fell to 0.2000, below 0.8500" in order[1].reason
    module = dict(found.named_modules())[order[1].name]
    assert not isinstance(module, TernaryLayer)
    assert report.baseline == 0.9
    # dense, pruned, three layers, final: the state after the failure is the one that passed before.
    assert len(seen) == 6


def test_restoring_gives_the_very_bits():
    states = {}

    def evaluate(model):
        constrained = sum(isinstance(m, TernaryLayer) for m in model.modules())
        states[constrained] = state_of(model)
        return 0.0 if constrained else 1.0

    found, report = train_layerwise(network(), config(evaluate=evaluate, bound=0.5))
    assert not report.constrained
    assert_same(state_of(found), states[0])


def test_stop_at_the_first_failure_leaves_the_others_untried():
    def evaluate(model):
        return 0.0 if any(isinstance(m, TernaryLayer) for m in model.modules()) else 1.0

    _, report = train_layerwise(network(), config(evaluate=evaluate, bound=0.5, on_failure="stop"))
    assert report.stopped.startswith("constraining ")
    assert sum(row.accuracy is None for row in report.layers) == 2


def test_pruning_that_breaks_the_bound_ends_the_run():
    found, report = train_layerwise(network(), config(evaluate=lambda model: 0.3, baseline=0.9, bound=0.1))
    assert report.stopped.startswith("pruning alone loses more")
    assert not report.constrained
    assert (torch.cat([found[i].weight.reshape(-1) for i in (0, 3, 7)]) == 0).float().mean() > 0.49


def test_sparsity_one_leaves_the_biases():
    found, report = train_layerwise(network(), config(sparsity=1.0))
    assert [row.density for row in report.layers] == [0.0] * 3
    assert [row.scale for row in report.layers] == [0.0] * 3
    out = found.eval()(IMAGES)
    assert torch.equal(out, found[7].bias.expand_as(out))


def test_recomputed_scales_are_the_mean_of_the_shadow():
    found, _ = train_layerwise(network(), config(scale="recompute", pack=False))
    for layer in (m for m in found.modules() if isinstance(m, TernaryLayer)):
        torch.testing.assert_close(layer.scale[0], layer.weight[layer.mask].abs().mean())


def test_the_random_numbers_of_the_caller_are_untouched():
    model = network()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    train_layerwise(model, config())
    assert torch.equal(torch.rand(3), expected)


# --- kill and resume --------------------------------------------------------------------------------------------------


def interrupted(where, count, path):
    """Run in a child that kills itself with SIGKILL at the count-th step, evaluation, or moment of a save."""

    def run(tick):
        class Loader(Shuffled):
            def __iter__(self):
                for batch in super().__iter__():
                    tick("step")
                    yield batch

        def evaluate(model):
            tick("evaluation")
            return accuracy(model)

        train_layerwise(network(), config(loader=Loader(), evaluate=evaluate, state=path))

    return killed_at(where, count, run)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("where", "counts"),
    [
        ("step", (1, 3, 6, 7, 3)),  # while fine-tuning after pruning, and within three stages
        ("evaluation", (1, 2)),  # between training and verdict
        ("fsync", (1, 2, 9)),  # half a file lies beside the old one
        ("replace", (1, 4, 7)),  # the new file is complete, and not yet in its place
    ],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(where, counts, tmp_path):
    path = tmp_path / "run.state"
    for count in counts:
        assert interrupted(where, count, path) == -signal.SIGKILL
    found, report = train_layerwise(network(), config(state=path))
    expected, whole = train_layerwise(network(), config())
    assert_same(state_of(found), state_of(expected))
    assert report.to_dict() == whole.to_dict()


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    path = tmp_path / "run.state"
    first, report = train_layerwise(network(), config(state=path))
    lines = []

    def never(model):
        raise AssertionError("evaluated again")

    again, read = train_layerwise(network(), config(state=path, evaluate=never, progress=lines.append))
    assert lines == ["going on at done"]
    assert_same(state_of(again), state_of(first))
    assert read.to_dict() == report.to_dict()


def test_a_state_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.state"
    train_layerwise(network(), config(state=path))
    before = path.read_bytes()
    with pytest.raises(ArchitectureError, match="another lr, sparsity"):
        train_layerwise(network(), config(state=path, lr=0.01, sparsity=0.4))
    other = network()
    other[0] = nn.Conv2d(2, 6, 5, padding=2, bias=False)
    with pytest.raises(ArchitectureError, match="another network"):
        train_layerwise(other, config(state=path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "edited", "empty", "a model"])
def test_a_damaged_state_is_refused(damage, tmp_path):
    path = tmp_path / "run.state"
    train_layerwise(network(), config(state=path, prune_epochs=0))
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
        ternary_state.read(path, config().fixed())


# --- configuration, and compress --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "binary"}, "method must be one of"),
        ({"sparsity": 1.5}, "sparsity must be a number in 0..1"),
        ({"epochs": 0}, "epochs must be an int of at least 1"),
        ({"loader": None}, "needs loader"),
        ({"evaluate": None, "loader": None}, "needs loader and evaluate"),
        ({"scale": "fixed"}, "scale must be one of"),
        ({"max_steps": 0}, "max_steps must be an int"),
        ({"method": "twn"}, "go with method='layerwise'"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"TernaryConfig: .*{message}"):
        config(**changes)


def test_nan_weights_and_networks_without_layers_are_refused():
    broken = network()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="'3' has NaN"):
        train_layerwise(broken, config())
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        train_layerwise(nn.Sequential(nn.ReLU()), config())


@pytest.mark.parametrize("method", ["twn", "ttq"])
@pytest.mark.parametrize("linear", [True, False])
def test_compress_makes_twn_and_ttq_networks(method, linear):
    small, report = compress(network(), TernaryConfig(method=method, linear=linear), example_inputs=IMAGES[:1])
    made = [name for name, m in small.named_modules() if isinstance(m, TernaryLayer)]
    assert made == (["0", "3", "7"] if linear else ["0", "3"])
    assert all(row.replaced and "density" in row.reason for row in report.layers)
    assert str(report.rule).startswith(f"method='{method}'")


def test_compress_runs_layerwise_training_on_what_it_is_told_to():
    small, report = compress(network(), config(), example_inputs=IMAGES[:1], only=["3"])
    assert [name for name, m in small.named_modules() if isinstance(m, TernaryLayer)] == ["3"]
    assert [row.verdict for row in report.layers] == ["kept", "replaced"]
    assert report.layers[0].reason == "not in only"


def test_a_shared_layer_is_constrained_once_and_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.first = nn.Conv2d(2, 2, 3, padding=1)
            self.again = self.first
            self.last = nn.Linear(72, 3)

        def forward(self, x):
            return self.last(self.again(torch.relu(self.first(x))).flatten(1))

    found, report = train_layerwise(Twice(), config())
    assert found.first is found.again
    assert len(report.layers) == 2
    assert replace(report.layers[0], accuracy=None).verdict == "constrained"
