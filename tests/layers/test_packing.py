"""Remembered packed weights: used where they hold, renewed after every kind of change, never part of the state."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from basisconv_kernels import testing
from basisconv_kernels.layers import basis_conv2d as module
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.packing import PreparedWeights


class Packs:
    """Counts how often weights are packed; the packing itself stays as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = module.basis_conv2d_pack

        def counting(*args: object, **settings: object) -> torch.Tensor | None:
            self.count += 1
            return original(*args, **settings)

        monkeypatch.setattr(module, "basis_conv2d_pack", counting)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Packs:
    return Packs(monkeypatch)


@pytest.fixture(params=[False, True], ids=["", "norm"])
def layer(request: pytest.FixtureRequest) -> BasisConv2d:
    made = BasisConv2d(6, 9, 3, 4, padding=1, basis_norm=request.param, activation="relu")
    if request.param:
        made(torch.randn(4, 6, 8, 9))
    return made.eval()


X = torch.randn(2, 6, 8, 9, generator=torch.Generator().manual_seed(0))


def agrees(layer: BasisConv2d, x: torch.Tensor = X) -> None:
    """The remembered weights give what the layer's own weights give now."""
    with torch.no_grad():
        testing.check_same_layer(layer(x), copy.deepcopy(layer).to_plain().eval()(x))


def test_weights_are_packed_once(layer, packs):
    with torch.no_grad():
        for _ in range(3):
            layer(X)
    with torch.inference_mode():
        layer(X[:1])
    assert packs.count == 1


def test_nothing_is_packed_where_a_gradient_is_needed(layer, packs):
    layer(X).sum().backward()
    assert packs.count == 0
    assert layer.coefficients.grad is not None


def test_frozen_weights_are_packed_although_the_input_needs_a_gradient(layer, packs):
    layer.requires_grad_(False)
    x = X.clone().requires_grad_()
    with torch.inference_mode():
        layer(X)
    for _ in range(2):
        layer(x).sum().backward()
    assert packs.count == 1
    expected = torch.autograd.grad(layer.to_plain().eval()(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, 2 * expected)


CHANGES = {
    "optimiser step": lambda layer: step(layer),
    "coefficients in place": lambda layer: in_place(layer.coefficients),
    "basis in place": lambda layer: in_place(layer.basis_weight),
    "one element": lambda layer: in_place(layer.coefficients[2:3, 1:2]),
    "new coefficients": lambda layer: setattr(layer, "coefficients", nn.Parameter(torch.randn(9, 4))),
    "new basis": lambda layer: setattr(layer, "basis_weight", torch.randn(4, 6, 3, 3)),
    "new data": lambda layer: setattr(layer.coefficients, "data", torch.randn(9, 4)),
    "load": lambda layer: layer.load_state_dict(scrambled(layer)),
    "load and assign": lambda layer: layer.load_state_dict(scrambled(layer), assign=True),
    "reset": lambda layer: layer.reset_parameters(),
    "there and back": lambda layer: [in_place(layer.half().coefficients), layer.float()],
    "freed and refilled": lambda layer: refill(layer),
    "in inference mode": lambda layer: in_inference_mode(layer),
    "trained basis": lambda layer: in_place(layer.train_basis().basis_weight),
    "written past PyTorch, then eval": lambda layer: [layer.coefficients.data.mul_(2), layer.eval()],
    "written past PyTorch, then repack": lambda layer: [layer.coefficients.data.mul_(2), layer.repack()],
    "fold": lambda layer: layer.fold(),
    "fold a following norm": lambda layer: fold_following(layer),
}


@torch.no_grad()
def in_place(tensor: torch.Tensor) -> None:
    tensor.mul_(-1.5).add_(0.25)


def step(layer: BasisConv2d) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    layer(X).square().sum().backward()
    optimizer.step()


def scrambled(layer: BasisConv2d) -> dict[str, torch.Tensor]:
    return {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for name, value in layer.state_dict().items()
    }


def refill(layer: BasisConv2d) -> None:
    """Free the coefficients and allocate new ones, which may get the old address and the old version number."""
    layer.coefficients = None
    layer.coefficients = nn.Parameter(torch.randn(9, 4))


def in_inference_mode(layer: BasisConv2d) -> None:
    with torch.inference_mode():
        layer.coefficients.mul_(3)


def fold_following(layer: BasisConv2d) -> None:
    norm = nn.BatchNorm2d(9)
    norm(torch.randn(5, 9, 4, 4) * 3 + 1)
    layer.activation = None
    layer.fold(norm)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, layer):
    if change == "fold" and layer.basis_norm is None:
        pytest.skip("there is nothing to fold, so nothing changes")
    agrees(layer)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    CHANGES[change](layer)
    after = layer.state_dict()
    assert before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in after)
    agrees(layer)
    agrees(layer)


@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "bias", "eps"])
def test_every_part_of_the_norm_counts(part):
    layer = BasisConv2d(6, 9, 3, 4, basis_norm=True).eval()
    agrees(layer)
    if part == "eps":
        layer.basis_norm.eps = 0.5
    else:
        in_place(getattr(layer.basis_norm, part).abs_() if part == "running_var" else getattr(layer.basis_norm, part))
    if part == "running_var":
        layer.basis_norm.running_var.abs_()
    agrees(layer)


def test_the_geometry_counts():
    layer = BasisConv2d(6, 9, 3, 4, padding=2).eval()
    for name, value in (("stride", (2, 1)), ("dilation", (2, 2)), ("precise", True)):
        agrees(layer)
        setattr(layer, name, value)
        agrees(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_conversion_to_another_dtype(dtype, layer):
    agrees(layer)
    layer.to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double().to_plain().eval()(X.double())
        got = layer(X.to(dtype))
    assert got.dtype == dtype
    testing.check_same_layer(got, exact)


def test_weights_made_in_inference_mode(packs):
    """They count no versions: every edit must be noticed all the same, and the packing still be reused."""
    with torch.inference_mode():
        layer = BasisConv2d(6, 9, 3, 4, padding=1).eval()
        assert layer.coefficients.is_inference()
        for _ in range(3):
            layer(X)
        assert packs.count == 1
        for tensor in (layer.coefficients, layer.basis_weight):
            tensor[0, 0] += 1
            torch.testing.assert_close(layer(X), copy.deepcopy(layer)(X))
    with torch.no_grad():
        agrees(layer)


def test_nothing_of_it_reaches_state_copies_or_pickles(layer):
    keys = set(layer.state_dict())
    unpacked = pickle.dumps(layer)
    with torch.no_grad():
        layer(X)
    assert layer._prepared._entry is not None
    assert len(pickle.dumps(layer)) == len(unpacked)
    assert set(layer.state_dict()) == keys
    assert set(dict(layer.named_buffers())) | set(dict(layer.named_parameters())) == keys
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._prepared is not layer._prepared
        assert other._prepared._entry is None


def test_moving_the_layer_frees_the_old_weights(layer):
    with torch.no_grad():
        layer(X)
    layer.double()
    assert layer._prepared._entry is None


def test_functional_calls_and_transforms_see_their_own_weights(layer):
    with torch.no_grad():
        before = layer(X)
        state = {name: value * 1 for name, value in layer.state_dict().items()}
        state["coefficients"] = state["coefficients"] * 2
        changed = torch.func.functional_call(layer, state, (X,))
        assert not torch.allclose(before, changed)
        assert torch.equal(layer(X), before)
    gradient = torch.func.grad(lambda c: torch.func.functional_call(layer, {"coefficients": c}, (X,)).sum())
    layer(X).sum().backward()
    torch.testing.assert_close(gradient(layer.coefficients.detach()), layer.coefficients.grad)


def test_threads_that_share_a_layer(layer):
    expected = layer.to_plain().eval()(X).detach()
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                layer.repack()
                results.append(layer(X))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        testing.check_same_layer(result, expected)


def test_a_source_with_an_equal_address_is_the_same_memory():
    """The alias that is kept: without it the second tensor could lie where the first one was."""
    prepared = PreparedWeights()
    values = []
    for number in range(50):
        source = torch.full((257,), float(number))
        values.append(prepared.get((source,), None, lambda source=source: (source * 1, None, None))[0][0].item())
        del source
    assert values == [float(number) for number in range(50)]


def test_data_that_is_freed_and_replaced_is_noticed():
    """One parameter, one version number, and new data that would lie where the old was if that were not kept."""
    prepared, values = PreparedWeights(), []
    parameter = nn.Parameter(torch.empty(257))
    for number in range(50):
        parameter.data = torch.empty(0)
        parameter.data = torch.full((257,), float(number))
        values.append(prepared.get((parameter,), None, lambda: (parameter * 1, None, None))[0][0].item())
        assert prepared._entry.sources[0].kept.data_ptr() == parameter.data_ptr()
    assert values == [float(number) for number in range(50)]


def test_a_view_of_the_same_memory_is_another_weight():
    prepared = PreparedWeights()
    parameter = nn.Parameter(torch.arange(4.0).reshape(2, 2))
    first = prepared.get((parameter,), None, lambda: (parameter * 1, None, None))[0]
    parameter.data = parameter.data.t()
    assert torch.equal(prepared.get((parameter,), None, lambda: (parameter * 1, None, None))[0], first.t())


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_graphs_pack_inside(norm, fresh_compiler):
    layer = BasisConv2d(6, 9, 3, 4, padding=1, basis_norm=norm, activation="relu").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), layer(X))
        exported = torch.export.export(layer, (X,))
        torch.testing.assert_close(exported.module()(X), layer(X))
        in_place(layer.coefficients)
        torch.testing.assert_close(compiled(X), layer(X))
    kept = set(exported.state_dict) | set(exported.constants)
    assert kept == set(layer.state_dict())
    compiled(X).sum().backward()
    got = layer.coefficients.grad.clone()
    layer.zero_grad()
    layer(X).sum().backward()
    torch.testing.assert_close(got, layer.coefficients.grad)
