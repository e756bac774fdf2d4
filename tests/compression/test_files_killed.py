"""A process killed while it saves leaves the old file or the new one, never half of either."""

from __future__ import annotations

import builtins
import os
import signal

import pytest
import torch
from torch import nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.model import compress

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net, _ = compress(dense(), BasisConfig(fraction=0.3, keep_dense="never"), example_inputs=IMAGE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def killed_at(where: str, path) -> int:
    """Save in a child that kills itself with SIGKILL at a moment of it; the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "half written":
            real = builtins.open

            class Half:
                def __init__(self, *arguments):
                    self.stream = real(*arguments)

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    self.stream.close()

                def write(self, content):
                    self.stream.write(content[: len(content) // 2])
                    self.stream.flush()
                    die()

            builtins.open = Half
        elif where == "after the renaming":
            real_replace = os.replace
            os.replace = lambda *arguments: (real_replace(*arguments), die())
        else:
            setattr(os, where, die)
        save(network(2), path)
    except BaseException:  # a child must never return into the test run
        os._exit(9)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where", ["half written", "fsync", "replace", "after the renaming"])
@pytest.mark.parametrize("existing", [True, False], ids=["over an old file", "new"])
def test_a_kill_leaves_a_whole_file_or_none(where, existing, tmp_path):
    path = tmp_path / "network.safetensors"
    old, new = network(1).eval(), network(2).eval()
    if existing:
        save(old, path)
    assert killed_at(where, path) == -signal.SIGKILL
    if where == "after the renaming":
        expected = new
    elif existing:
        expected = old
    else:
        assert not path.exists()
        expected = None
    with torch.no_grad():
        if expected is not None:
            assert torch.equal(load(path, dense()).eval()(IMAGE), expected(IMAGE))
        save(new, path)  # what was left beside it does not disturb the next one
        assert torch.equal(load(path, dense()).eval()(IMAGE), new(IMAGE))
