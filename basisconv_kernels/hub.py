"""``CompressedHubMixin``: networks that ``compress`` changed, saved and loaded as the Hugging Face hub has it.

Needs huggingface_hub: ``pip install 'basisconv_kernels[hub]'``. Nothing else of the package imports this file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from basisconv_kernels.compression import container
from basisconv_kernels.compression.files import load, save

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
except ImportError as error:
    raise ImportError("basisconv_kernels.hub needs huggingface_hub: pip install 'basisconv_kernels[hub]'") from error


class CompressedHubMixin(PyTorchModelHubMixin):  # type: ignore[misc, unused-ignore]
    """``PyTorchModelHubMixin`` for networks that may have been compressed: files know what became of each layer.

    ``save_pretrained`` and ``push_to_hub`` write ``model.safetensors`` by ``save``; ``from_pretrained`` builds the
    dense network from ``config.json``, and ``load`` gives it structure and values of the file, pruned channels
    included. A ``model.safetensors`` that the plain mixin wrote is read as the plain mixin does.

    Compress in place, so that the network keeps its class:

        class Net(nn.Module, CompressedHubMixin):
            ...

        net = Net(width=64)
        compress(net, BasisConfig(energy=0.8), example_inputs=image, inplace=True)
        net.save_pretrained("folder")
        again = Net.from_pretrained("folder")

    Raises:
        FileFormatError, ArchitectureError: as ``load``.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        network: Any = self
        save(network, save_directory / SAFETENSORS_SINGLE_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = False, **kwargs: Any) -> Any:
        where = {k: kwargs[k] for k in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        if os.path.isdir(model_id):
            file = os.path.join(model_id, SAFETENSORS_SINGLE_FILE)
        else:
            file = hf_hub_download(repo_id=model_id, filename=SAFETENSORS_SINGLE_FILE, **where)
        with safetensors.safe_open(file, "pt") as content:
            ours = container.KEY in (content.metadata() or {})
        if not ours:
            return super()._from_pretrained(model_id=model_id, map_location=map_location, strict=strict, **kwargs)
        network: Any = cls(**{k: v for k, v in kwargs.items() if k not in where})
        found: nn.Module = load(file, network, pruned=True)
        return found.to(map_location).eval()
