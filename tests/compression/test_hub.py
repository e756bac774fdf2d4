"""Compressed networks through the mixin of the Hugging Face hub; nothing is fetched."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("huggingface_hub")

from huggingface_hub import PyTorchModelHubMixin

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.errors import FileFormatError
from basisconv_kernels.hub import CompressedHubMixin

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Body(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3)
        )
        self.head = nn.Linear(2 * width, 5)

    def forward(self, input):
        return self.head(self.body(input).mean((2, 3)))


class Net(Body, CompressedHubMixin):
    pass


class PlainNet(Body, PyTorchModelHubMixin):
    pass


CONFIGS = [
    BasisConfig(fraction=0.25, keep_dense="never"),
    TuckerConfig(fraction=0.5, keep_dense="never"),
    TernaryConfig(method="twn"),
    StackedBinaryConfig(splits=2, bank=0.5),
    PruneConfig(fraction=0.4),
    [PruneConfig(fraction=0.25), BasisConfig(fraction=0.3, keep_dense="never")],
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_compressed_network_comes_back(config, tmp_path):
    torch.manual_seed(0)
    net = Net(width=16).eval()
    small, _ = compress(net, config, example_inputs=IMAGE, inplace=True)
    assert small is net
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 16}
    again = Net.from_pretrained(tmp_path)
    assert type(again) is Net
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(IMAGE), net(IMAGE))


def test_files_of_the_plain_mixin_are_read(tmp_path):
    torch.manual_seed(0)
    plain = PlainNet(width=12).eval()
    plain.save_pretrained(tmp_path)
    again = Net.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IMAGE), plain(IMAGE))


def test_damage_is_refused(tmp_path):
    net = Net(width=8)
    compress(net, CONFIGS[0], example_inputs=IMAGE, inplace=True)
    net.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(FileFormatError):
        Net.from_pretrained(tmp_path)
