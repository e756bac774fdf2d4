"""What a network's convolutions are and do: names, shapes, how often and at what size each is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.ConvTranspose2d
# How networks refuse inputs that are not theirs.
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError)


@dataclass
class ConvLayer:
    """One convolution module of a network; a module used under several names, or several times, is one layer.

    Attributes:
        name: its first name in the network; ``names`` holds all.
        module: the convolution.
        pixels: Σ over its calls of OH·OW (transposed convolutions: H·W of the input), an image; 0 if never reached.
        pixels_in: Σ over its calls of H·W of the input, an image, padding that is not of zeros included.
        example: shape, dtype, device and memory format of its first input, to time it with.
        tied_to: the layer whose weight parameter it shares, or None.
    """

    name: str
    names: tuple[str, ...]
    module: Convolution
    pixels: int = 0
    pixels_in: int = 0
    calls: int = 0
    example: Tensor | None = field(default=None, repr=False)
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(K, C, R, S, G)."""
        m = self.module
        return m.out_channels, m.in_channels, m.kernel_size[0], m.kernel_size[1], m.groups

    @property
    def conv(self) -> nn.Conv2d:
        """The module, known to be a Conv2d (``conversion.refusal`` found nothing against it)."""
        if not isinstance(self.module, nn.Conv2d):
            raise TypeError(f"{self.name} is a {type(self.module).__name__}, not a Conv2d")
        return self.module

    @property
    def taps(self) -> int:
        """D = (C/G)·R·S."""
        _, C, R, S, G = self.shape
        return C // G * R * S

    @property
    def weights(self) -> int:
        """Number of filter weights, K·D; transposed convolutions alike."""
        K, C, R, S, G = self.shape
        return K * (C // G) * R * S

    @property
    def bias_parameters(self) -> int:
        """K with a bias, else 0."""
        return self.module.out_channels if self.module.bias is not None else 0

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates an image, over all calls."""
        return self.pixels * self.weights

    @property
    def dense_parameters(self) -> int:
        """Weights and bias."""
        return self.weights + self.bias_parameters

    def basis_macs(self, per_group: int) -> int:
        """The same of the two stages with block-diagonal coefficients, ``pixels·(Q·D + K·Q/G)``."""
        K, _, _, _, G = self.shape
        return self.pixels * per_group * (G * self.taps + K)

    def basis_parameters(self, per_group: int) -> int:
        """``Q·D + K·Q/G`` and the bias; a BatchNorm between the stages folds away and is not counted."""
        K, _, _, _, G = self.shape
        return per_group * (G * self.taps + K) + self.bias_parameters


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the network with a mapping of keyword arguments, a tuple or list of positional ones, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own training flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def watching(modules: Mapping[nn.Module, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Call ``watcher(input, output)`` at every call of the modules inside the block."""

    def hook_for(watcher: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            watcher(args[0] if args else kwargs["input"], output)

        return hook

    handles = [m.register_forward_hook(hook_for(watcher), with_kwargs=True) for m, watcher in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def substitute(model: nn.Module, replacements: dict[Any, Any]) -> nn.Module:
    """Put modules in the place of others, under every name that they have; the network, or what replaces it itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def convolutions(model: nn.Module) -> list[ConvLayer]:
    """Every Conv2d and ConvTranspose2d of the network, subclasses included, in the order of its modules."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            names.setdefault(module, []).append(name)
    owners: dict[int, str] = {}
    layers = []
    for module, found in names.items():
        layer = ConvLayer(found[0], tuple(found), module)  # type: ignore[arg-type]
        weight = module._parameters.get("weight")
        if weight is not None:
            first = owners.setdefault(id(weight), layer.name)
            layer.tied_to = first if first != layer.name else None
        layers.append(layer)
    for layer in layers:  # the first of a tied pair is as tied as the others
        if layer.tied_to is not None:
            partner = next(other for other in layers if other.name == layer.tied_to)
            partner.tied_to = partner.tied_to or layer.name
    return layers


def _pixels_read(module: Convolution, input: Tensor) -> int:
    """H·W of the input, or of what explicit padding makes of it."""
    height, width = input.shape[-2:]
    if module.padding_mode != "zeros":
        right, bottom = module._reversed_padding_repeated_twice[:2], module._reversed_padding_repeated_twice[2:]
        height, width = height + sum(bottom), width + sum(right)
    return height * width


def survey(model: nn.Module, example_inputs: Any) -> list[ConvLayer]:
    """``convolutions`` with what one run in eval mode shows of each; the network itself is not changed.

    Raises:
        ValueError: the network does not take the inputs.
    """
    layers = convolutions(model)

    def watcher_for(layer: ConvLayer) -> Callable[[Tensor, Tensor], None]:
        def watch(input: Tensor, output: Tensor) -> None:
            measured = input if isinstance(layer.module, nn.ConvTranspose2d) else output
            layer.pixels_in += _pixels_read(layer.module, input)
            layer.pixels += measured.shape[-1] * measured.shape[-2]
            layer.calls += 1
            if layer.example is None:
                layer.example = torch.empty_like(input, device="meta")

        return watch

    with evaluating(model), watching({layer.module: watcher_for(layer) for layer in layers}):
        try:
            run(model, example_inputs)
        except REFUSALS as error:
            what = f"compress: the network does not run on example_inputs, {_kind(example_inputs)}"
            raise ValueError(f"{what}: {error}") from error
    return layers


def _kind(inputs: Any) -> str:
    """What the inputs are, in a few words."""
    if isinstance(inputs, Tensor):
        return f"a Tensor {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return f"a mapping of {', '.join(map(str, inputs)) or 'nothing'}"
    if isinstance(inputs, (tuple, list)):
        return f"{type(inputs).__name__} of {', '.join(map(_kind, inputs)) or 'nothing'}"
    return f"a {type(inputs).__name__}"
