"""Two processes train what one does: DDP, a checkpoint of it, and sharded parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from basisconv_kernels.compression.finetune import finetune
from tests.compression import distributed_worker as worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What torchrun's two processes found."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, str(Path(worker.__file__)), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def alone(orthogonality: float, epochs: int = 2):
    model = worker.network()
    finetune(model, worker.Part(), epochs=epochs, lr=0.05, orthogonality=orthogonality, progress=False)
    return model.state_dict()


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_train_what_one_does(two_processes):
    assert two_processes["size"] == 2
    first, second = two_processes["validation"]
    assert first > second  # so the first epoch was kept
    assert_near(two_processes["ddp"], alone(0.1, epochs=1))
    assert any(not torch.equal(value, worker.network().state_dict()[n]) for n, value in two_processes["ddp"].items())


def test_all_processes_agree_on_the_validation(two_processes):
    """Each would say another number; the mean of both counts, and it is that of no process alone."""
    model = worker.network()
    finetune(model, worker.Part(), epochs=2, lr=0.05, orthogonality=0.1, progress=False)
    with torch.no_grad():
        expected = -0.5 - float(model(worker.IMAGES).square().mean())
    assert two_processes["validation"][1] == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_run_of_two_processes_ends_as_a_whole_one(two_processes):
    assert two_processes["interrupted"]
    for name, value in two_processes["ddp"].items():
        assert torch.equal(two_processes["resumed"][name], value), name


def test_sharded_layers_compute_and_train(two_processes):
    with torch.no_grad():
        torch.testing.assert_close(two_processes["sharded output"], worker.network()(worker.IMAGES))
    assert "torch.distributed.checkpoint" in two_processes["refused"]
    assert_near(two_processes["sharded"], alone(0.0))
