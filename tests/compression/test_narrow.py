"""Files of pruned networks in networks of full width."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.errors import ArchitectureError

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A stem, a depthwise convolution, a residual, PReLU, and a linear layer on flattened pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.act = nn.PReLU(width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 8, 3, stride=4)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, input):
        x = torch.relu(self.norm(self.stem(input)))
        x = x + self.mix(self.act(self.depthwise(x)))
        return self.head(self.last(x).flatten(1))


def network(width: int = 16) -> Net:
    torch.manual_seed(0)
    net = Net(width)
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(fraction=0.5),
        [PruneConfig(fraction=0.3), BasisConfig(fraction=0.3, keep_dense="never")],
        [PruneConfig(fraction=0.3), TuckerConfig(fraction=0.5, keep_dense="never")],
    ],
    ids=["pruned", "pruned, basis", "pruned, tucker"],
)
def test_a_pruned_file_fits_the_dense_network(config, tmp_path):
    small, _ = compress(network(), config, example_inputs=IMAGE)
    assert small.depthwise.groups < 16
    save(small, tmp_path / "small")
    torch.manual_seed(5)
    fresh = Net().eval()
    before = copy.deepcopy(fresh.state_dict())
    again = load(tmp_path / "small", fresh, pruned=True)
    with torch.no_grad():
        assert torch.equal(again(IMAGE), small(IMAGE))
    assert again is not fresh
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert again.stem.out_channels == again.norm.num_features == again.act.num_parameters
    assert again.head.in_features == small.head.in_features
    with pytest.raises(ArchitectureError):  # without being told, a file of other channels is refused
        load(tmp_path / "small", Net())


def test_a_wider_file_is_refused(tmp_path):
    save(network(16), tmp_path / "wide")
    with pytest.raises(ArchitectureError, match=r"in the file, .* in the model"):
        load(tmp_path / "wide", network(12), pruned=True)


def test_files_that_are_not_pruned_load_as_ever(tmp_path):
    small, _ = compress(network(), BasisConfig(fraction=0.3, keep_dense="never"), example_inputs=IMAGE)
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", network(), pruned=True)
    with torch.no_grad():
        assert torch.equal(again(IMAGE), small(IMAGE))
