"""What the tests of model files share: small networks, their whole state, and files taken apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.files import load, save
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError
from basisconv_kernels.layers.ternary import TernaryLayer

ROOT = Path(__file__).parents[2]
HALF = BasisConfig(fraction=0.5, keep_dense="never")
QUARTER = BasisConfig(fraction=0.25)
REFUSALS = (FileFormatError, ArchitectureError)


class Small(nn.Module):
    """Two blocks, a residual and a grouped convolution: small enough to be loaded ten thousand times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=(1, 0), groups=2)
        self.mix = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.grouped(x)
        x = 2 * torch.relu(self.mix(x) + x) - 1
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)).contiguous(), 1))


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)


def compressed(config: BasisConfig = HALF, network: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    made, _ = compress(network or Small(), config, example_inputs=image())
    return made


def folded() -> nn.Module:
    made, _ = fold_batchnorm(compressed(), image())
    return made


def ternary() -> nn.Module:
    """Convolutions and the linear layer as packed codes, one of them sparse enough for gaps."""
    made = compressed(TernaryConfig(method="twn"))
    made.mix.threshold = 2.0
    for layer in made.modules():
        if isinstance(layer, TernaryLayer):
            layer.pack()
    return made


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor | None = None) -> Tensor:
    flags = [(module, module.training) for module in model.modules()]
    out = model.eval()(image() if inputs is None else inputs)
    for module, flag in flags:
        module.training = flag
    return out


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> Any:
    """Everything about a network that a refused file must leave alone."""
    modules = [(name, id(m), m.training, list(vars(m))) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (name, id(t), t.data_ptr(), t.dtype, t.requires_grad, bits(t))
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, t in named
    ]
    return modules, tensors, bits(torch.get_rng_state())


def round_trip(model: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """Load what was saved, and check that saving it again gives the same bytes."""
    save(model, path)
    again = load(path, fresh)
    content = path.read_bytes()
    save(again, path)
    assert path.read_bytes() == content
    return again


CONFIGS = {
    "frozen": HALF,
    "trained": BasisConfig(fraction=0.5, keep_dense="never", train_basis=True),
    "norm": BasisConfig(fraction=0.5, keep_dense="never", basis_norm=True),
    "some_stay_dense": BasisConfig(basis_channels={"mix": 3}),
    "all_stay_dense": BasisConfig(basis_channels={}),
}


def refused(path: Path, model: nn.Module, error: type[Exception], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load(path, model)
    assert str(caught.value).startswith(f"load: {path}: ")
    assert snapshot(model) == before


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(tensor table, document, data) of a file."""
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    return table, json.loads(table.pop("__metadata__")["basisconv_kernels"]), content[8 + length :]


def joined(table: dict[str, Any], document: Any, data: bytes, digest: bool = True) -> bytes:
    """A file of these parts, its digest computed again."""
    if isinstance(document, dict) and digest:
        document = {**document, "sha256": "0" * 64}
    text = document if isinstance(document, str) else json.dumps(document)
    header = json.dumps({"__metadata__": {"basisconv_kernels": text}, **table}).encode()
    content = packed(header + b" " * (-len(header) % 8), data)
    if not digest:
        return content
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)
