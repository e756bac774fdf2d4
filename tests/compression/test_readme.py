"""The README's examples, run as they stand; a small network takes the place of the one that would be downloaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from basisconv_kernels.demo.networks import CifarResNet

README = Path(__file__).parents[2] / "README.md"
TRAINING = README.parent / "docs" / "training.md"


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = SimpleNamespace(resnet18=lambda weights=None: CifarResNet(8))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names = {"loader": [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]}
    exec(blocks[0].replace("224, 224", "32, 32"), names)
    assert (tmp_path / "resnet18-basis.safetensors").exists()
    assert "layer1.0.conv1" in capsys.readouterr().out
    names |= {
        "x": torch.randn(1, 64, 8, 8), "basis_weight": torch.randn(16, 64, 3, 3), "coefficients": torch.randn(32, 16),
        "bias": torch.randn(32), "skip": torch.randn(1, 32, 8, 8),
    }  # fmt: skip
    exec(blocks[1], names)
    assert names["out"].shape == (1, 32, 8, 8)
    names |= {"accuracy": lambda model: float(model(names["example"]).std())}
    names |= {"u_in": torch.randn(64, 8), "core": torch.randn(12, 8, 3, 3), "u_out": torch.randn(32, 12)}
    exec(blocks[2], names)
    assert names["out"].shape == (1, 32, 8, 8)
    names |= {"bn": torch.nn.BatchNorm2d(32), "weight": torch.randn(32, 64, 3, 3)}
    exec(blocks[3], names)
    assert names["bits"].shape == (1, 32, 8, 8)
    signs = torch.randn(16, 32, 3, 3).sign()
    names |= {"bank": signs, "index": torch.randint(16, (32, 2)), "scale": torch.rand(32)}
    exec(blocks[4], names)
    assert (tmp_path / "xnor.safetensors").exists()
    assert names["chains"].chains
    exec(blocks[5], names)
    assert (tmp_path / "stacked.safetensors").exists()
    assert names["out"].shape == (1, 32, 8, 8)


def test_the_script_of_the_training_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", TRAINING.read_text(encoding="utf-8"), re.DOTALL)
    for whole, part in (("epochs=5", "max_steps=2"), ("[:1000]", "[:64]"), ("batch_size=128", "batch_size=16")):
        assert whole in script
        script = script.replace(whole, part)
    exec(script, {"__name__": "train"})
    assert 0.1 < float(capsys.readouterr().out) <= 1
    assert (tmp_path / "run.state").exists()
