"""A training step captured in a CUDA graph is the eager one, for what the experiments train."""

from __future__ import annotations

import pytest
import torch

import basisconv_kernels as bk
from basisconv_kernels.core.registry import use_backend
from basisconv_kernels.demo.networks import SmallVGG
from bench.experiments import graphed

pytestmark = pytest.mark.gpu
CONFIGS = {
    "basis": bk.BasisConfig(fraction=0.5, train_basis=True, keep_dense="never"),
    "tucker": bk.TuckerConfig(fraction=0.5, keep_dense="never"),
    "stacked": bk.StackedBinaryConfig(splits=2, bank=0.5),
    "xnor": bk.BinaryConfig(),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_captured_step_is_the_eager_one(kind, optimizer):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = graphed.DeviceImages(
        pixels, torch.randint(10, (256,), generator=generator), (0.5,) * 3, (0.25,) * 3, 4, "cuda"
    )
    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        network, _ = bk.compress(SmallVGG(3, (16, 32)), CONFIGS[kind], example_inputs=torch.randn(2, 3, 32, 32))
        network = network.cuda().to(memory_format=torch.channels_last).train()
        weight = 1e-3 if kind == "basis" else 0.0
        with use_backend("reference" if kind in ("stacked", "xnor") else None):
            trainer = graphed.Trainer(
                network, bk.trainable_parameters(network), images, batch=32, rates=[1e-3] * 16, optimizer=optimizer,
                orthogonality=weight, graph=graph,
            )  # fmt: skip
            sums = [trainer.epoch(torch.Generator().manual_seed(epoch)) for epoch in range(2)]
        assert (trainer.captured is not None) == graph
        found.append((sums, [p.detach().clone() for p in network.parameters()]))
    (eager, weights), (captured, same) = found
    assert captured == pytest.approx(eager, rel=1e-3)
    for a, b in zip(weights, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
