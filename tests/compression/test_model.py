"""``compress`` and ``to_plain`` on whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from basisconv_kernels.compression import plan
from basisconv_kernels.compression.config import BasisConfig, Sensitivity
from basisconv_kernels.compression.finetune import finetune
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, network_parameters, to_plain
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

EVERYTHING = BasisConfig(fraction=1.0, keep_dense="never")
QUARTER = BasisConfig(fraction=0.25)


def verdicts(report):
    return {layer.name: (layer.verdict, layer.reason) for layer in report.layers}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_every_convolution_gets_a_verdict(mixed, image):
    _, report = compress(mixed, EVERYTHING, example_inputs=image)
    assert verdicts(report) == {
        "stem": ("replaced", ""),
        "shared": ("replaced", ""),
        "depthwise": ("replaced", ""),
        "grouped": ("replaced", ""),
        "pointwise": ("replaced", ""),
        "odd": ("kept", "is a OddConv, a subclass of Conv2d whose forward may differ"),
        "up": ("kept", "is a transposed convolution"),
        "unused": ("kept", "not reached by example_inputs"),
    }


def test_full_rank_gives_the_same_network(mixed, image, close):
    model, report = compress(mixed.eval(), EVERYTHING, example_inputs=image)
    assert len(report.replaced) == 5
    close(model(image), mixed(image))
    plain = to_plain(model)
    assert not any(isinstance(module, BasisConv2d) for module in plain.modules())
    close(plain(image), mixed(image))
    close(to_plain(model, collapse=True)(image), mixed(image))


def test_break_even_keeps_layers_dense(mixed, image):
    _, report = compress(mixed, BasisConfig(fraction=1.0), example_inputs=image)
    assert all(not layer.replaced for layer in report.layers)
    reasons = verdicts(report)
    assert reasons["stem"] == ("kept", "Q = 12 is not below Q* = 8.31, so dense costs no more")
    assert reasons["depthwise"][1].startswith("Q = 12 is not below Q* = 10.80")
    _, report = compress(mixed, QUARTER, example_inputs=image)
    assert {layer.name for layer in report.replaced} == {"stem", "shared", "grouped", "pointwise"}
    assert [layer.basis_channels for layer in report.replaced] == [3, 3, 6, 5]
    assert all(layer.macs_after < layer.macs_before for layer in report.replaced)


def test_a_shared_module_is_converted_once_and_stays_shared(mixed, image):
    model, report = compress(mixed, QUARTER, example_inputs=image)
    assert isinstance(model.shared, BasisConv2d)
    assert model.shared is model.again
    (row,) = [layer for layer in report.layers if layer.name == "shared"]
    assert row.macs_before == 2 * 12 * 10 * 12 * 12 * 9
    plain = to_plain(model)
    assert plain.shared is plain.again


def test_tied_weights_and_hooks_stay_dense(image):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).double()
    model[1].weight = model[0].weight
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    changed, report = compress(model, EVERYTHING, example_inputs=image)
    assert [layer.reason for layer in report.layers] == [
        "shares its weight parameter with 1",
        "shares its weight parameter with 0",
        "carries hooks, which a conversion would lose",
        "",
    ]
    assert changed[0].weight is changed[1].weight
    assert not model[3]._forward_hooks


def test_parametrised_weights_are_materialised(image, close):
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), parametrizations.spectral_norm(nn.Conv2d(8, 9, 3))
    ).double()
    before = state(model)
    changed, report = compress(model, EVERYTHING, example_inputs=image)
    assert len(report.replaced) == 2
    assert unchanged(model, before)
    close(changed.eval()(image), model.eval()(image))


def test_lazy_modules_are_seen_after_the_example_run(image):
    model, report = compress(nn.Sequential(nn.LazyConv2d(24, 3)).double(), QUARTER, example_inputs=image)
    assert report.layers[0].C == 3
    assert isinstance(model[0], BasisConv2d)


def test_names_choose_layers(mixed, image):
    for only, expected in (
        (["stem"], {"stem"}),
        ("stem", {"stem"}),
        (("again",), {"shared"}),
        (iter(["stem", "grouped"]), {"stem", "grouped"}),
    ):
        _, report = compress(mixed, QUARTER, example_inputs=image, only=only)
        assert {layer.name for layer in report.replaced} == expected
    _, report = compress(mixed, QUARTER, example_inputs=image, skip={"stem", "again"})
    assert verdicts(report)["stem"] == ("kept", "in skip")
    assert {layer.name for layer in report.replaced} == {"grouped", "pointwise"}
    nested = nn.Sequential(nn.Sequential(mixed.stem, nn.ReLU()), mixed.grouped)
    _, report = compress(nested, QUARTER, example_inputs=image, only=["0"])
    assert verdicts(report) == {"0.0": ("replaced", ""), "1": ("kept", "not in only")}
    _, report = compress(mixed, QUARTER, example_inputs=image, filter_fn=lambda name, conv: conv.kernel_size == (1, 1))
    assert [layer.name for layer in report.replaced] == ["pointwise"]
    assert verdicts(report)["stem"] == ("kept", "refused by filter_fn")


def test_a_mapping_names_its_layers(mixed, image):
    config = BasisConfig(basis_channels={"again": 5, "grouped": 5, "pointwise": 99}, keep_dense="never")
    with pytest.warns(UserWarning, match=r"compress: layer 'pointwise': Q = 99 lowered to the rank") as caught:
        _, report = compress(mixed, config, example_inputs=image)
    assert caught[0].filename == __file__
    assert {layer.name: layer.basis_channels for layer in report.replaced} == {
        "shared": 5,
        "grouped": 6,
        "pointwise": 20,
    }
    assert verdicts(report)["grouped"] == ("replaced", "Q = 5 rounded up to a multiple of the 2 groups")
    assert verdicts(report)["stem"] == ("kept", "not named in basis_channels")
    assert config.basis_channels == {"again": 5, "grouped": 5, "pointwise": 99}
    _, report = compress(mixed, BasisConfig(energy={"stem": 0.5}, keep_dense="never"), example_inputs=image)
    assert [layer.name for layer in report.replaced] == ["stem"]
    _, report = compress(mixed, BasisConfig(fraction={}), example_inputs=image)
    assert not report.replaced


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (QUARTER, {"only": ["stam"]}, "compress: only names 'stam', which is no convolution .* did you mean stem"),
        (QUARTER, {"skip": ["head"]}, "compress: skip names 'head', which is no convolution"),
        (BasisConfig(energy={"norm": 0.5}), {}, "compress: energy names 'norm', which is no convolution"),
        (BasisConfig(fraction={"shared": 0.5, "again": 0.4}), {}, "names one layer twice, as 'shared' and 'again'"),
        (BasisConfig(macs=10), {}, "a budget of .* is less than their least"),
    ],
)
def test_errors_leave_the_network_alone(mixed, image, config, arguments, message):
    before, kinds = state(mixed), [type(module) for module in mixed.modules()]
    with pytest.raises(ValueError, match=message):
        compress(mixed, config, example_inputs=image, inplace=True, **arguments)
    assert unchanged(mixed, before)
    assert [type(module) for module in mixed.modules()] == kinds


def test_weights_that_are_no_numbers_are_refused_by_name(mixed, image):
    with torch.no_grad():
        mixed.pointwise.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"compress: layer 'pointwise': weight holds NaN or infinite values"):
        compress(mixed, QUARTER, example_inputs=image, inplace=True)
    assert type(mixed.stem) is nn.Conv2d
    assert compress(mixed, QUARTER, example_inputs=image, skip=["pointwise"])[1].replaced


def test_errors_of_types(mixed, image):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        compress(3, QUARTER, example_inputs=image)
    with pytest.raises(TypeError, match=r"config must be a BasisConfig, .* a mapping of name patterns .*, got float"):
        compress(mixed, 0.5, example_inputs=image)
    for function, arguments in ((to_plain, ()), (fold_batchnorm, (image,)), (finetune, ([],))):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be a torch\.nn\.Module, got str"):
            function("text", *arguments)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (torch.zeros(1, 5, 8, 8).double(), r"a Tensor \[1, 5, 8, 8\]: .*channels"),
        ([torch.zeros(2), 3], r"list of a Tensor \[2\], a int: "),
        ({"picture": 1}, "a mapping of picture: .*unexpected keyword"),
        ((), "tuple of nothing: "),
    ],
)
def test_example_inputs_that_the_network_does_not_take(mixed, inputs, kind):
    before = state(mixed)
    with pytest.raises(ValueError, match=f"compress: the network does not run on example_inputs, {kind}"):
        compress(mixed, QUARTER, example_inputs=inputs, inplace=True)
    assert unchanged(mixed, before)
    assert type(mixed.stem) is nn.Conv2d


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_a_copy_unless_in_place(mixed, image):
    before = state(mixed)
    model, _ = compress(mixed, QUARTER, example_inputs=image)
    assert unchanged(mixed, before)
    assert model is not mixed
    same, _ = compress(mixed, QUARTER, example_inputs=image, inplace=True)
    assert same is mixed
    assert isinstance(mixed.stem, BasisConv2d)
    assert to_plain(mixed, inplace=True) is mixed
    assert isinstance(mixed.stem, nn.Sequential)


def test_training_flags_statistics_and_random_numbers_are_kept(mixed, image):
    mixed.train()
    mixed.norm.eval()
    mixed.grouped.eval()
    random = torch.get_rng_state()
    model, _ = compress(mixed, QUARTER, example_inputs=image)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model.stem.training
    assert not model.norm.training
    assert not model.grouped.training
    assert torch.equal(model.norm.running_mean, mixed.norm.running_mean)
    assert not any(module._forward_hooks for module in (*mixed.modules(), *model.modules()))


def test_a_network_that_is_a_convolution(image, close):
    conv = nn.Conv2d(3, 16, 3, dtype=torch.float64)
    model, report = compress(conv, EVERYTHING, example_inputs=image, inplace=True)
    assert isinstance(model, BasisConv2d)
    assert report.layers[0].name == ""
    assert "(the model itself)" in report.to_table()
    close(model(image), conv(image))
    close(to_plain(model)(image), conv(image))


def test_inputs_by_name_and_by_position(mixed, image):
    for inputs in (image, (image,), [image], {"x": image}):
        assert compress(mixed, QUARTER, example_inputs=inputs)[1].replaced


# --- options ----------------------------------------------------------------------------------------------------------


def test_trained_and_frozen_bases(mixed, image):
    frozen, report = compress(mixed, QUARTER, example_inputs=image)
    trained, _ = compress(mixed, BasisConfig(fraction=0.25, train_basis=True), example_inputs=image)
    assert not frozen.stem.trains_basis
    assert trained.stem.trains_basis
    assert frozen.state_dict().keys() == trained.state_dict().keys()
    assert network_parameters(frozen) == network_parameters(trained) == report.network_parameters_after
    assert sum(p.numel() for p in frozen.parameters()) < sum(p.numel() for p in trained.parameters())


def test_norms_between_the_stages_change_nothing_in_eval_mode(mixed, image, close):
    without, _ = compress(mixed, QUARTER, example_inputs=image)
    model, report = compress(
        mixed, BasisConfig(fraction=0.25, basis_norm=True), example_inputs=image, calibration=iter([image, image * 2])
    )
    assert all(model.get_submodule(layer.name).basis_norm is not None for layer in report.replaced)
    close(model.eval()(image), without.eval()(image))
    folded = copy.deepcopy(model)
    for module in folded.modules():
        if isinstance(module, BasisConv2d):
            module.fold()
    close(folded(image), without(image))
    assert model.stem.basis_norm.running_var.min() > 0


def test_the_data_aware_basis_loses_less_output(mixed, image):
    """The share of output energy that the report names is the one that is measured, layer by layer."""
    model, report = compress(
        mixed, BasisConfig(fraction=0.25, data_aware=True, keep_dense="never"), example_inputs=image, only=["stem"]
    )
    blind, _ = compress(mixed, BasisConfig(fraction=0.25, keep_dense="never"), example_inputs=image, only=["stem"])
    bias = mixed.stem.bias[:, None, None]
    exact = mixed.stem(image) - bias
    lost = (model.stem(image) - bias - exact).square().sum()
    assert lost < (blind.stem(image) - bias - exact).square().sum()
    assert report.replaced[0].energy_kept == pytest.approx(1 - (lost / exact.square().sum()).item(), abs=1e-9)


def test_budgets_hold_for_the_whole_report(mixed, image):
    dense = compress(mixed, EVERYTHING, example_inputs=image)[1]
    for rule, shares in (("macs", (0.35, 0.5, 0.8, 1.0)), ("parameters", (0.6, 0.8, 1.0))):
        for share in shares:
            total = getattr(dense, f"{rule}_before")
            for budget in (share, int(share * total)):
                _, report = compress(mixed, BasisConfig(**{rule: budget}), example_inputs=image)
                assert getattr(report, f"{rule}_after") <= share * total
    assert verdicts(report)["depthwise"] == ("kept", "no basis of it costs less than dense")


def test_min_channels_and_multiples(mixed, image):
    _, report = compress(mixed, BasisConfig(fraction=0.1, min_channels=4), example_inputs=image)
    assert all(layer.basis_channels >= 4 for layer in report.replaced)
    _, report = compress(mixed, BasisConfig(fraction=0.1, multiple_of=4), example_inputs=image)
    assert {layer.basis_channels % 4 for layer in report.replaced} == {0}


def test_sensitivity_truncates_one_layer_at_a_time_and_puts_it_back(mixed, image):
    mixed.eval()
    exact = mixed(image)
    names = dict(mixed.named_modules())
    seen = []

    def evaluate(model):
        changed = [name for name, module in model.named_modules() if module is not names[name]]
        seen.append((changed, model.training))
        return -float((model(image) - exact).norm() / exact.norm())

    before = state(mixed)
    rule = Sensitivity(evaluate, min_accuracy=-0.05, min_channels=2, fractions=(0.75, 0.5, 0.25))
    model, report = compress(
        mixed.train(), BasisConfig(sensitivity=rule, keep_dense="never"), example_inputs=image, inplace=True
    )
    assert model is mixed
    assert len(report.replaced) == 5
    assert all(not training for _, training in seen)
    assert seen[0][0] == []
    assert all(len(changed) == 1 for changed, _ in seen[1:])
    # The depthwise one is at full rank already, so there is nothing to try.
    assert {name for changed, _ in seen for name in changed} == {"stem", "shared", "grouped", "pointwise"}
    assert all(layer.basis_channels >= 2 for layer in report.replaced)
    untouched = {name: value for name, value in mixed.state_dict().items() if name in before}
    assert all(torch.equal(value, before[name]) for name, value in untouched.items() if "bias" in name)


def test_sensitivity_needs_a_network_that_passes(mixed, image):
    with pytest.raises(ValueError, match=r"the dense network has accuracy 0.5, below min_accuracy = 0.9"):
        compress(mixed, BasisConfig(sensitivity=Sensitivity(lambda model: 0.5, 0.9)), example_inputs=image)


def test_measured_layers_are_kept_unless_they_gain(mixed, image, monkeypatch):
    times = {"stem": [2.0, 1.0], "shared": [1.0, 2.0], "grouped": [1.0, 1.0], "pointwise": [3.0, 0.5]}
    convs = {getattr(mixed, name): name for name in times}
    shapes = {}

    def fake(modules, input):
        name = next(n for conv, n in convs.items() if conv.weight.shape == modules[0].weight.shape)
        shapes[name] = tuple(input.shape)
        return times[name]

    monkeypatch.setattr(plan, "measure_ms", fake)
    _, report = compress(mixed, BasisConfig(fraction=0.25, measure=True), example_inputs=image)
    assert {layer.name for layer in report.replaced} == {"stem", "pointwise"}
    assert verdicts(report)["shared"] == ("kept", "measured: no faster with Q = 3")
    assert shapes["pointwise"] == (2, 24, 6, 5)
    (row,) = [layer for layer in report.layers if layer.name == "pointwise"]
    assert (row.dense_ms, row.basis_ms) == (3.0, 0.5)
    always = BasisConfig(fraction=0.25, measure=True, keep_dense="never")
    _, report = compress(mixed, always, example_inputs=image, skip=["depthwise"])
    assert len(report.replaced) == 4
    _, report = compress(mixed, BasisConfig(macs=0.9, measure=True), example_inputs=image, skip=["depthwise"])
    assert report.macs_after <= 0.9 * report.macs_before


def test_measuring_for_real_and_by_latency(image):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    _, report = compress(
        net, BasisConfig(fraction=0.25, measure=True, keep_dense="never"), example_inputs=image.float()
    )
    assert all(layer.dense_ms > 0 and layer.basis_ms > 0 for layer in report.replaced)
    _, report = compress(net, BasisConfig(latency=1.0), example_inputs=image.float())
    assert all(layer.dense_ms > 0 for layer in report.layers)
    assert report.macs_after <= report.macs_before
