"""The networks and layers that the demo times, each in its inference form for the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from basisconv_kernels.core.timing import Series, interleave
from basisconv_kernels.demo import measure
from basisconv_kernels.demo.inference import channels_last, inference_form
from basisconv_kernels.layers.basis_conv2d import BasisConv2d

LARGE = 32
BATCHES = (1, LARGE)
TRIAL_SHARE = 0.15  # of the time given, for finding each network's better memory format


class Forms:
    """Folded networks by name, and their inference forms by batch size, made when first asked for."""

    def __init__(self) -> None:
        self._folded: dict[str, tuple[nn.Module, torch.Size]] = {}
        self._made: dict[tuple[str, int], nn.Module] = {}

    def add(self, name: str, folded: nn.Module, image_shape: torch.Size) -> None:
        """Take in a network without BatchNorms; ``image_shape`` is (C, H, W)."""
        self._folded[name] = (folded, image_shape)

    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._folded)

    def images(self, name: str, batch: int) -> Tensor:
        """Random images [batch, C, H, W] in NCHW, the same every time."""
        shape = self._folded[name][1]
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))

    def at(self, name: str, batch: int) -> nn.Module:
        """The form of a network for a batch size."""
        key = (name, batch)
        if key not in self._made:
            self._made[key] = inference_form(self._folded[name][0], channels_last(self.images(name, batch)))
        return self._made[key]


def time_all(
    forms: Forms, batch: int, seconds: float, progress: Callable[[float], None]
) -> tuple[dict[str, Series], dict[str, str]]:
    """Milliseconds an image of every network at a batch size, and the memory format in which each was timed.

    A short trial finds for each network whether NCHW or channels_last serves it better.
    """
    networks, images, formats = {}, {}, {}
    for name in forms.names():
        network, nchw = forms.at(name, batch), forms.images(name, batch)
        trial = {"channels_last": channels_last(nchw), "nchw": nchw}
        share = TRIAL_SHARE * seconds / len(forms.names())
        taken = measure.time_networks(dict.fromkeys(trial, network), trial, share)
        formats[name] = min(taken, key=lambda form: taken[form].spread().median)
        networks[name], images[name] = network, trial[formats[name]]
    return measure.time_networks(networks, images, seconds, progress), formats


def time_layers(
    forms: Forms,
    energy: str,
    names: Sequence[str],
    images: Tensor,
    seconds: float,
    progress: Callable[[float], None],
) -> dict[str, dict[str, dict[str, float | int]]]:
    """{layer: {form: spread of milliseconds a call}} of the replaced layers, each with its ReLU, on real activations
    in channels_last.

    Args:
        forms: holds ``dense``, ``two_step@energy`` and ``fused@energy``.
        energy: as it stands in those names.
        names: of the replaced layers.
        images (Tensor[N, C, H, W]): channels_last; N is the batch size.
        seconds: for all of them together.
    """
    batch = len(images)
    dense, two_step, fused = (forms.at(name, batch) for name in ("dense", f"two_step@{energy}", f"fused@{energy}"))
    inputs = measure.layer_inputs(fused, names, images)
    found = {}
    for done, name in enumerate(names):
        layer = fused.get_submodule(name)
        calls = {
            "dense": _with_activation(dense.get_submodule(name), layer),
            "two_step": nn.Sequential(*two_step.get_submodule(name).children()),
            "fused": layer,
        }
        with torch.inference_mode():
            taken = interleave({form: _bound(m, inputs[name]) for form, m in calls.items()}, seconds / len(names))
        found[name] = {form: series.scaled(1e3).spread().to_dict() for form, series in taken.items()}
        progress((done + 1) / len(names))
    return found


def _with_activation(conv: nn.Module, layer: nn.Module) -> nn.Module:
    """A plain convolution is followed by what the fused layer holds inside; a packed one holds it already."""
    if type(conv) is nn.Conv2d and isinstance(layer, BasisConv2d) and layer.activation == "relu":
        return nn.Sequential(conv, nn.ReLU(inplace=True))
    return conv


def _bound(module: nn.Module, input: Tensor) -> Callable[[], object]:
    return lambda: module(input)
