"""Write resnet56_spectra.json: singular values and shapes of the convolutions of the published CIFAR-10 ResNet-56.

    python tests/compression/make_resnet56_spectra.py path/to/resnet56-4bfd9763.th

The rule for Q needs nothing else, so it is tested to the digit wherever the weights themselves are not at hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from basisconv_kernels.compression.survey import survey
from basisconv_kernels.demo.networks import CifarResNet
from basisconv_kernels.layers.decompose import decompose

SIGNIFICANT_DIGITS = 9


def load_resnet56(path: Path) -> CifarResNet:
    """The network with the weights of the public checkpoint."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = CifarResNet(56)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def spectra(model: CifarResNet) -> dict[str, object]:
    """What the file holds."""
    rows = []
    for layer in survey(model, torch.zeros(1, 3, 32, 32)):
        K, C, R, S, _ = layer.shape
        values = decompose(layer.conv.weight).singular_values[0].tolist()
        rounded = [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in values]
        rows.append({"name": layer.name, "K": K, "C": C, "R": R, "S": S, "pixels": layer.pixels, "s": rounded})
    return {"network": "resnet56-4bfd9763 (CIFAR-10), 32×32 images", "layers": rows}


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    target = Path(__file__).with_name("resnet56_spectra.json")
    data = spectra(load_resnet56(Path(sys.argv[1])))
    rows = ",\n".join(json.dumps(row) for row in data["layers"])
    head = json.dumps(data["network"], ensure_ascii=False)
    target.write_text(f'{{"network": {head}, "layers": [\n{rows}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
