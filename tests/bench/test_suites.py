"""The suites as data: names, targets that select something, networks that add up."""

from __future__ import annotations

import pytest
import torch

from bench import models, suites
from bench.harness import engines
from bench.harness.case import Suite
from bench.harness.errors import UnknownNameError

SUITES = suites.suites()


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suite_is_consistent(suite: Suite) -> None:
    ids = [case.id for case in suite.cases]
    assert len(ids) == len(set(ids))
    for name in suite.engines:
        assert engines.find(name).name == name
    for target in suite.targets:
        assert any(not target.tag or target.tag in case.tags for case in suite.cases), target.name
        assert set(target.rivals) <= set(suite.engines)
    for case in suite.cases:
        assert all(part.case in ids for part in case.parts)
        assert any(engines.find(name).takes(case.kind, case.forms) for name in suite.engines)


def test_the_layer_suites_hold_every_performance_case_once() -> None:
    tagged = [case.id for name in ("C1", "C2") for case in SUITES[name].cases]
    assert sorted(tagged) == sorted(case.id for case in SUITES["C3"].cases)
    assert [len(SUITES[name].cases) for name in ("C1", "C2", "C3")] == [11, 3, 14]


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("resnet18", 11_689_512, 1.814e9), ("vgg16", 138_365_992 - 4_224, 15.47e9), ("resnet50", 25_557_032, 4.089e9)],
)
def test_networks_are_the_published_ones(name: str, parameters: int, macs: float) -> None:
    with torch.device("meta"):
        model = models.NETWORKS[name]()
    # VGG-16 without the 4224 biases before its BatchNorms, which make them idle.
    assert sum(p.numel() for p in model.parameters()) == parameters
    counted = 0
    for use, count in models.layer_uses(name, 1):
        case = use.case
        counted += count * (case.problem.dense_macs() if case.problem else case.linear[1] * case.linear[2])
    assert counted == pytest.approx(macs, rel=1e-3)


def test_folding_keeps_the_function() -> None:
    torch.manual_seed(0)
    block = models._Block(4, 6, 2).eval()
    for part in block.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    net = torch.nn.Sequential(block)
    x = torch.randn(2, 4, 8, 8)
    plain = models.folded(net)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x))


def test_a_converted_network_agrees_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prediction takes as converted is what the conversion converts, at the Q that is measured."""
    from basisconv_kernels.layers.basis_conv2d import BasisConv2d

    monkeypatch.setitem(models.NETWORKS, "tiny", lambda: torch.nn.Sequential(
        models._conv_norm(3, 8, 3, 4), torch.nn.ReLU(), models._Block(8, 16, 2), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(16, 5),
    ))  # fmt: skip
    x, forms = models.network_forms("tiny", 2, torch.Generator().manual_seed(1))
    made = [part for part in forms["fused"].modules() if isinstance(part, BasisConv2d)]
    uses = models.layer_uses("tiny", 2)
    expected = [use.case.problem for use, count in uses if use.converted for _ in range(count)]
    assert sorted((m.in_channels, m.out_channels, m.basis_channels) for m in made) == sorted(
        (p.C, p.K, p.Q) for p in expected
    )
    with torch.no_grad():
        torch.testing.assert_close(forms["fused"](x), forms["two_step"](x))


def test_unknown_names_list_those_that_exist() -> None:
    with pytest.raises(UnknownNameError, match="no suite has the name 'C99'; there are C1, C2"):
        suites.find("C99")
    with pytest.raises(UnknownNameError, match="no engine has the name 'x'; there are ours"):
        engines.find("x")
    assert suites.find("c10").name == "C10"
