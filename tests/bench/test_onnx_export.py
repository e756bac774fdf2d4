"""The exporter gives engines the network that PyTorch runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")

from bench import models
from bench.harness import onnx_export


def network() -> nn.Module:
    """Every operator that the exporter knows."""
    torch.manual_seed(0)
    dense = models.folded(
        nn.Sequential(models._conv_norm(3, 4, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), models._Block(4, 6, 2))
    )
    return nn.Sequential(
        dense, models.folded(models._Block(6, 6, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7)
    )


def test_onnx_runtime_agrees_with_pytorch() -> None:
    runtime = pytest.importorskip("onnxruntime")
    module, x = network().eval(), torch.randn(2, 3, 21, 18)
    session = runtime.InferenceSession(
        onnx_export.to_onnx(module, x).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_bare_layer_is_exported() -> None:
    conv = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2)
    made = onnx_export.to_onnx(conv, torch.zeros(1, 4, 8, 9))
    (node,) = [n for n in made.graph.node if n.op_type == "Conv"]
    attributes = {a.name: list(a.ints) or a.i for a in node.attribute}
    assert attributes == {
        "kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 0, 1, 0], "dilations": [2, 1], "group": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "module", [nn.Conv2d(1, 1, 3, padding="same"), nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2), nn.GELU()]
)
def test_what_has_no_rule_is_refused(module: nn.Module) -> None:
    with pytest.raises(onnx_export.NotExportableError, match="onnx_export"):
        onnx_export.to_onnx(module, torch.zeros(1, 1, 6, 6))
