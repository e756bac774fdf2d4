"""``make gpu-bench``, beyond layers: training steps, and whole networks dense, in two steps and fused."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basisconv_kernels import BackendUnavailable, basis_conv2d, use_backend
from bench import models
from bench.gpu import facts
from bench.gpu.journal import Step, Unavailable
from bench.gpu.layers import OURS, RESNET, Layer, Prepared
from bench.gpu.timing import Call, Meter, bytes_of

NETWORKS = ("resnet50", "vgg16")
BATCHES = (32, 1)
ENGINES = ("dense", "two_step", "auto", *OURS)


# --- training steps ---------------------------------------------------------------------------------------------------


def training(layer: Layer, engine: str, frozen: bool, device: str, meter: Meter) -> dict[str, Any]:
    """Forward and backward of one layer, with respect to input, coefficients, bias and, unless frozen, the basis."""
    torch.backends.cudnn.benchmark = True
    meter.forget()
    prepared = Prepared(layer, device)
    weights = [prepared.basis, prepared.mixing, prepared.bias]
    for weight in weights:
        weight.requires_grad_(not (frozen and weight is prepared.basis))
    grad = torch.randn_like(_training_forward(prepared, "two_step", prepared.input(0))).detach()

    def step_on(i: int) -> Call:
        x = prepared.input(i).requires_grad_()
        leaves = [x, *(weight for weight in weights if weight.requires_grad)]

        def step() -> Any:
            out = _training_forward(prepared, engine, x)
            return out.detach(), torch.autograd.grad(out, leaves, grad)

        return step

    try:
        out, gradients = step_on(0)()
    except BackendUnavailable as reason:
        raise Unavailable(str(reason).replace("\n", " ")) from None
    errors = relative_errors(prepared, out, gradients, grad, frozen)
    # Three roundings to bfloat16 (2^-9 each) lie on the way to every one; a wrong one is off by its own size.
    if not max(errors) <= 2.0**-5:
        raise AssertionError(f"{engine}: relative errors of the result and its gradients are {errors}")
    moved = 2 * (bytes_of(prepared.input(0)) + bytes_of(grad))
    found = meter.measure(step_on, moved)
    return {"layer": layer.name, "engine": engine, "frozen": frozen, "relative_errors": errors, **found}


def _training_forward(prepared: Prepared, engine: str, x: Tensor) -> Tensor:
    if engine == "two_step":
        maps = F.conv2d(x, prepared.basis, padding=1)
        return F.relu(F.conv2d(maps, prepared.mixing[:, :, None, None], prepared.bias))
    weights = (prepared.basis, prepared.mixing, prepared.bias)
    return basis_conv2d(x, *weights, padding=1, activation="relu", backend=None if engine == "auto" else engine)


def relative_errors(
    prepared: Prepared, out: Tensor, gradients: Sequence[Tensor], grad: Tensor, frozen: bool
) -> list[float]:
    """Of the result, then of the gradients, beside float32: exact enough beside bfloat16, and fast on every GPU.

    The slope is read off ``out`` itself: where roundings decide the sign, each engine may have its own, and all
    gradients of such a pixel follow it. A wrong sign elsewhere is an error of the result.
    """
    x = prepared.input(0).detach().float().requires_grad_()
    weights = [t.detach().float() for t in (prepared.basis, prepared.mixing, prepared.bias)]
    for weight in weights[1 if frozen else 0 :]:
        weight.requires_grad_()
    before = F.conv2d(F.conv2d(x, weights[0], padding=1), weights[1][:, :, None, None], weights[2])
    leaves = [x, *(weight for weight in weights if weight.requires_grad)]
    exact = (F.relu(before.detach()), *torch.autograd.grad(before, leaves, grad.float() * (out > 0)))
    pairs = zip((out, *gradients), exact, strict=True)
    return [((found.double() - e.double()).norm() / e.double().norm()).item() for found, e in pairs]


# --- networks ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _forms(name: str, device: str) -> tuple[Tensor, dict[str, nn.Module]]:
    """One image and the three forms on the device, in bfloat16; converting takes the longest, so it is kept."""
    image, forms = models.network_forms(name, 1, torch.Generator().manual_seed(0))
    placed = {
        form: module.to(device, torch.bfloat16).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        for form, module in forms.items()
    }
    return image.to(device, torch.bfloat16), placed  # type: ignore[return-value]


def network(name: str, batch: int, engine: str, device: str, meter: Meter) -> dict[str, Any]:
    """A whole network, one image after the other checked against the two-step form in float32."""
    torch.backends.cudnn.benchmark = True
    meter.forget()
    image, forms = _forms(name, device)
    model = forms[engine] if engine in ("dense", "two_step") else forms["fused"]
    wish = use_backend(engine) if engine in (*OURS, "cpu") else contextlib.nullcontext()
    images = [image.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    with torch.inference_mode(), wish:
        try:
            found = model(image).float()
        except BackendUnavailable as reason:
            raise Unavailable(str(reason).replace("\n", " ")) from None
        expected = forms["dense" if engine == "dense" else "two_step"](image).float()
        error = ((found - expected).norm() / expected.norm()).item()
        # Tens of layers with a rounding of 2^-9 each between them; another function is off by its own size.
        if not error <= 0.1:
            raise AssertionError(f"{name} {engine}: the relative error beside the two-step form is {error:.3g}")
        moved = 2**27  # activations of all layers: none of them stays in the cache
        times = meter.measure(lambda i: functools.partial(model, images[i % 2]), moved)
    return {"network": name, "batch": batch, "engine": engine, "relative_error": error, **times}


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(about: Mapping[str, Any], device: str, meter: Meter) -> list[Step]:
    """Training steps, then networks; in a rehearsal a small layer only, since networks take minutes to convert."""
    found = []
    stamps = {True: facts.stamp(dict(about), ours=True), False: facts.stamp(dict(about), ours=False)}
    engines: tuple[str, ...] = ("two_step", "auto", "triton", "cuda") if device == "cuda" else ("two_step", "cpu")
    for C, K, side in RESNET if device == "cuda" else RESNET[:1]:
        layer = Layer(C, K, side, 32, 4)
        layer = layer if device == "cuda" else replace(layer, N=2, side=8)
        for frozen in (False, True):
            for engine in engines:
                key = f"training {layer.name} {'frozen' if frozen else 'trained'} {engine}"
                run = functools.partial(training, layer, engine, frozen, device, meter)
                # Some percent apart: of two steps through cuDNN the process decides, so all engines run in one.
                found.append(Step(key, run, 4.0, 120.0, stamps[True]))
    if device != "cuda":
        return found
    for name in NETWORKS:
        for batch in BATCHES:
            for engine in ENGINES:
                run = functools.partial(network, name, batch, engine, device, meter)
                seconds = 45.0 if (batch, engine) == (BATCHES[0], ENGINES[0]) else 8.0
                stamp = stamps[engine not in ("dense", "two_step")]
                found.append(Step(f"{name}_n{batch} {engine}", run, seconds, 240.0, stamp))
    return found
