"""Whole networks (suite C4): ResNet-18 and VGG-16, dense, converted, and the layers that they are made of.

The networks are written out here, so that no other package's version can change what is measured. They serve for time
only: weights are random, the image is 224×224, BatchNorms are folded before anything is measured, in every form.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from basisconv_kernels.compression.config import BasisConfig
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness.case import Case, Form, Part, Suite, Target
from bench.harness.engines import BASELINES

IMAGE = 224
CLASSES = 1000
SHARE = 4  # Q = K/4
BATCHES = (1, 8)

# --- the networks -----------------------------------------------------------------------------------------------------


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the map at stride 1, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3, stride)
        self.first_relu = nn.ReLU(inplace=True)
        self.second = _conv_norm(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        return self.relu(self.second(self.first_relu(self.first(x))) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 of He et al. 2015, 11.7 M parameters."""
    stages: list[nn.Module] = [_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        stages += [_Block(inputs, outputs, 1 if outputs == 64 else 2), _Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


class _Bottleneck(nn.Module):
    """1×1 to fewer channels, 3×3, 1×1 to four times as many, beside a shortcut as in ``_Block``."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_relu = _conv_norm(inputs, inner, 1), nn.ReLU(inplace=True)
        self.second, self.second_relu = _conv_norm(inner, inner, 3, stride), nn.ReLU(inplace=True)
        self.third = _conv_norm(inner, 4 * inner, 1)
        same = stride == 1 and inputs == 4 * inner
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, 4 * inner, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, 4·inner, H/stride, W/stride]."""
        inner = self.second_relu(self.second(self.first_relu(self.first(x))))
        return self.relu(self.third(inner) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """ResNet-50 of He et al. 2015, strides at the 3×3 convolutions, 25.6 M parameters."""
    stages: list[nn.Module] = [_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stages.append(_Bottleneck(inputs, inner, 2 if block == 0 and inner > 64 else 1))
            inputs = 4 * inner
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def vgg16() -> nn.Sequential:
    """VGG-16 of Simonyan and Zisserman 2014 with BatchNorm, 138 M parameters, for 224×224 images only."""
    stages: list[nn.Module] = []
    inputs = 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for outputs in widths:
            stages += [_conv_norm(inputs, outputs, 3), nn.ReLU(inplace=True)]
            inputs = outputs
        stages.append(nn.MaxPool2d(2, 2))
    side = IMAGE // 32
    classifier = [nn.Linear(512 * side * side, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*stages, nn.Flatten(), *classifier, nn.Linear(4096, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"resnet18": resnet18, "vgg16": vgg16, "resnet50": resnet50}
ON_CPU = ("resnet18", "vgg16")  # those of suite C4


def folded(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose ``_conv_norm`` pairs are single convolutions with bias."""
    model = copy.deepcopy(model).eval()
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Sequential) and len(part) == 2:
            conv, norm = part
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, fuse_conv_bn_eval(conv, norm))
    return model


# --- conversion -------------------------------------------------------------------------------------------------------


def kept_dense(model: nn.Module) -> list[str]:
    """Names of the convolutions that stay dense: 1×1, and the first, where a basis saves little."""
    convs = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    return [name for name, conv in convs if conv.in_channels == 3 or conv.kernel_size == (1, 1)]


def network_forms(name: str, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[Form, nn.Module]]:
    """Random images and the three forms of a network, for inference.

    Every form is given what its engine can use best: ``fused`` has additions and ReLU inside its layers, as
    ``fold_batchnorm`` leaves them; ``two_step`` and ``dense`` keep them as operators, which engines fuse themselves.
    """
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        dense = folded(NETWORKS[name]())
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    config = BasisConfig(fraction=1 / SHARE, keep_dense="never")
    basis, _ = compress(dense, config, example_inputs=x[:1], skip=kept_dense(dense))
    fused, _ = fold_batchnorm(basis, x[:1])
    return x, {"dense": dense, "fused": fused, "two_step": to_plain(basis)}


# --- the layers of a network, as cases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Use:
    """One layer of a network as a case of its own."""

    case: Case
    converted: bool


def conv_case_id(problem: Conv2dProblem, dense_only: bool = False) -> str:
    """``n1_64to64_at56_q16``, with kernel and stride where they are not 3×3 and 1; ``dense`` instead of q without Q."""
    p = problem
    name = f"n{p.N}_{p.C}to{p.K}_at{p.H}_{'dense' if dense_only else f'q{p.Q}'}"
    name += f"_{p.R}x{p.S}" if (p.R, p.S) != (3, 3) else ""
    return name + (f"_stride{p.stride[0]}" if p.stride != (1, 1) else "")


def _use(module: nn.Module, shape: torch.Size, keep: bool) -> _Use:
    if isinstance(module, nn.Linear):
        sizes = (shape[0], module.in_features, module.out_features)
        name = f"n{sizes[0]}_linear_{sizes[1]}to{sizes[2]}"
        return _Use(Case(name, "linear", forms=("dense",), tags=frozenset({"part"}), linear=sizes), False)
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    vertical, horizontal = module.padding[0], module.padding[1]
    problem = Conv2dProblem(
        N=shape[0], C=module.in_channels, Q=module.out_channels // SHARE, K=module.out_channels,
        R=module.kernel_size[0], S=module.kernel_size[1], H=shape[2], W=shape[3],
        stride=(module.stride[0], module.stride[1]), padding=(vertical, vertical, horizontal, horizontal),
        channels_last=True, bias=True,
    )  # fmt: skip
    forms: tuple[Form, ...] = ("dense",) if keep else ("fused", "dense")
    return _Use(Case(conv_case_id(problem, keep), "layer", problem, forms, frozenset({"part"})), not keep)


@functools.cache
def layer_uses(name: str, batch: int) -> tuple[tuple[_Use, int], ...]:
    """The convolutions and linear layers of a network with their counts; shapes only, no arithmetic."""
    with torch.device("meta"):
        model = NETWORKS[name]().eval()
        image = torch.empty(batch, 3, IMAGE, IMAGE)
    keep = set(kept_dense(model))
    counts: Counter[_Use] = Counter()

    def record(part: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: counts.update([_use(module, inputs[0].shape, part in keep)])

    for part, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(record(part))
    model(image)
    return tuple(counts.items())


def _network_case(name: str, batch: int) -> Case:
    parts = tuple(Part(use.case.id, count, use.converted) for use, count in layer_uses(name, batch))
    return Case(f"{name}_n{batch}", "network", tags=frozenset({"network"}), network=name, batch=batch, parts=parts)


def _unique(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple({case.id: case for case in cases}.values())


def suite() -> Suite:
    """C4: networks, and before them every layer alone, from which their speed-up is predicted."""
    asked = [(name, batch) for batch in BATCHES for name in ON_CPU]
    parts = [use.case for name, batch in asked for use, _ in layer_uses(name, batch)]
    networks = [_network_case(name, batch) for name, batch in asked]
    return Suite(
        name="C4",
        title="Whole networks, Q = K/4, batch 1 and 8, against the best dense engine",
        cases=(*_unique(parts), *networks),
        engines=("ours", "ours_compiled", *BASELINES),
        targets=(
            Target("C4 share of the predicted speed-up", "share_of_predicted", 0.9, 1.0, "network", BASELINES, "dense"),
        ),
    )
