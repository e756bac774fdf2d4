"""The training loop: it trains what it should, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from basisconv_kernels.compression.basis import orthogonality_loss
from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.finetune import EpochRecord, finetune, trainable_parameters
from basisconv_kernels.compression.model import compress
from basisconv_kernels.layers.basis_conv2d import BasisConv2d


def network(train_basis: bool = False, basis_norm: bool = False) -> nn.Module:
    """A compressed network of two convolutions for 10×10 images."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    config = BasisConfig(fraction=0.25, train_basis=train_basis, basis_norm=basis_norm)
    return compress(dense, config, example_inputs=torch.randn(4, 2, 10, 10))[0]


def batches(count: int = 8, N: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three classes that differ in what one convolution sees: brightness, rows, columns."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        y = torch.randint(3, (N,), generator=generator)
        x = 0.3 * torch.randn(N, 2, 10, 10, generator=generator)
        stripes = torch.tensor([1.0, -1.0]).repeat(5)
        patterns = torch.stack([torch.ones(10, 10), stripes[:, None].expand(10, 10), stripes[None].expand(10, 10)])
        made.append((x + patterns[y][:, None], y))
    return made


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def test_a_compressed_network_learns():
    model = network(train_basis=True, basis_norm=True)
    history = finetune(model, batches(), epochs=6, lr=0.05, orthogonality=1e-3, progress=False)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert all(record.steps == 8 for record in history)
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > 0.9
    assert history[0].learning_rate == 0.05


def test_a_frozen_basis_stays_whatever_the_weight_decay():
    model = network()
    bases = {name: value.clone() for name, value in model.state_dict().items() if "basis_weight" in name}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    finetune(model, batches(2), optimizer=optimizer, progress=False)
    assert len(bases) == 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in bases.items())
    assert {"0.coefficients", "0.bias", "3.coefficients", "7.weight", "1.weight"} <= changed(before, model)


def test_a_trained_basis_moves_and_the_orthogonality_loss_acts():
    plain, pulled = network(train_basis=True), network(train_basis=True)
    before = copy.deepcopy(plain.state_dict())
    finetune(plain, batches(), epochs=3, lr=0.1, progress=False)
    history = finetune(pulled, batches(), epochs=3, lr=0.1, orthogonality=5.0, progress=False)
    assert {"0.basis_weight", "3.basis_weight"} <= changed(before, plain)
    assert orthogonality_loss(pulled) < orthogonality_loss(plain)
    assert all(record.orthogonality > 0 for record in history[1:])


def test_coefficients_and_norms_alone():
    model = network(train_basis=True, basis_norm=True)
    before = copy.deepcopy(model.state_dict())
    chosen = trainable_parameters(model, "coefficients_and_norm")
    names = {name for name, p in model.named_parameters() if any(p is c for c in chosen)}
    expected = {
        f"{layer}.{part}"
        for layer in (0, 3)
        for part in ("coefficients", "bias", "basis_norm.weight", "basis_norm.bias")
    }
    assert names == expected | {"1.weight", "1.bias"}
    finetune(model, batches(3), train="coefficients_and_norm", lr=0.1, progress=False)
    moved = {name for name in changed(before, model) if "running" not in name and "tracked" not in name}
    assert moved == names
    assert all(p.requires_grad for p in model.parameters())
    assert model[7].weight.grad is None


def test_parameters_are_listed_once_and_frozen_ones_never():
    model = network()
    assert len(trainable_parameters(nn.Sequential(model, model))) == len(list(model.parameters()))
    model[7].requires_grad_(False)
    assert not any(p is model[7].weight for p in trainable_parameters(model))
    with pytest.raises(ValueError, match="what must be one of all, coefficients_and_norm, got 'some'"):
        trainable_parameters(model, "some")
    with pytest.raises(ValueError, match="nothing to train for what='coefficients_and_norm'"):
        trainable_parameters(nn.Linear(2, 2), "coefficients_and_norm")


def test_training_flags_come_back():
    model = network(basis_norm=True).eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    seen = []

    def loss(outputs, targets):
        seen.append(all(module.training for module in model.modules()))
        return nn.functional.cross_entropy(outputs, targets)

    finetune(model, batches(2), loss_function=loss, progress=False)
    assert seen == [True, True]
    assert [module.training for module in model.modules()] == flags


def test_remembered_weights_are_renewed_after_training():
    model = network().eval()
    x = batches(1)[0][0]
    with torch.no_grad():
        model(x)
    finetune(model, batches(2), lr=0.1, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))


def test_steps_schedulers_and_progress():
    model, seen = network(), []
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    history = finetune(
        model, batches(4), epochs=3, optimizer=optimizer, scheduler=scheduler, progress=seen.append, max_steps=6
    )
    assert [record.steps for record in history] == [4, 2]
    assert [record.learning_rate for record in history] == pytest.approx([0.5, 0.05])
    assert len(seen) == 6
    assert all(isinstance(record, EpochRecord) for record in seen)
    assert seen[3] == history[0] or seen[3].loss == history[0].loss
    made = []

    def per_step(optimizer):
        made.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        return made[0]

    history = finetune(network(), batches(3), lr=0.8, scheduler=per_step, scheduler_step="step", progress=False)
    assert history[0].learning_rate == pytest.approx(0.2)
    assert made[0].last_epoch == 3


def test_other_targets_and_losses():
    model = nn.Sequential(BasisConv2d(2, 4, 3, 2), nn.Flatten(), nn.Linear(256, 1))
    data = [(torch.randn(5, 2, 10, 10), torch.randn(5, 1)) for _ in range(3)]
    history = finetune(model, data, loss_function=nn.functional.mse_loss, progress=True, max_steps=2, device="cpu")
    assert history[0].accuracy is None
    assert history[0].steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"scheduler_step": "batch"}, "scheduler_step must be 'epoch' or 'step'"),
        ({"orthogonality": -1.0}, "orthogonality must not be negative"),
        ({"orthogonality": 0.1}, "no BasisConv2d of this module trains its basis"),
        ({"train": "nothing"}, "what must be one of"),
    ],
)
def test_errors(settings, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        finetune(model, batches(1), progress=False, **settings)
    assert not changed(before, model)


def test_an_orthogonality_weight_that_would_train_nothing_is_refused():
    with pytest.raises(ValueError, match="the optimiser holds no basis"):
        finetune(
            network(train_basis=True), batches(1), orthogonality=0.1, train="coefficients_and_norm", progress=False
        )


def test_a_loss_that_is_no_number_stops_the_training():
    x, y = batches(1)[0]
    with pytest.raises(FloatingPointError, match=r"finetune: the loss is nan at step 2 of epoch 1"):
        finetune(network(), [(x, y), (x * float("nan"), y)], progress=False)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        finetune(network(), [], progress=False)
