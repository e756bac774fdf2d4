"""What the workers are given for one case: a folder with the input and every form, and what the right answers are.

Torch engines read ``input.pt`` and ``<form>.pt``; the others read ``input.npy`` and ``<form>.onnx`` and need no PyTorch
in their process. All see the same numbers. The exact answers stay with the parent: no engine checks itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from bench import models
from bench.harness import answers, bits, tucker
from bench.harness.answers import Answers
from bench.harness.case import PLAIN, Case, Form
from bench.harness.fused_layer import FusedLayer

SEED = 20190412


@dataclass
class Payload:
    """The parent's side of a prepared case."""

    folder: Path
    answers: dict[Form, Answers]


def layer_forms(problem: Conv2dProblem, generator: torch.Generator) -> tuple[Tensor, dict[Form, nn.Module]]:
    """Random input and weights of unit scale, as the three forms with equal results up to rounding.

    Raises:
        ValueError: padding that ``nn.Conv2d`` cannot express.
    """
    p = problem
    top, bottom, left, right = p.padding
    if top != bottom or left != right:
        raise ValueError(f"bench: padding must be symmetric, nn.Conv2d knows no other, got {p.padding}")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(p.dtype)

    x = normal(p.N, p.C, p.H, p.W)
    basis = normal(p.Q, p.C // p.groups, p.R, p.S, scale=p.taps**-0.5)
    mixing = normal(p.K, p.Q, scale=p.Q**-0.5)
    bias = normal(p.K)

    def conv(outputs: int, weight: Tensor, with_bias: bool, groups: int) -> nn.Conv2d:
        made = nn.Conv2d(p.C, outputs, (p.R, p.S), p.stride, (top, left), p.dilation, groups, bias=False, dtype=p.dtype)
        made.weight.data.copy_(weight)
        if with_bias:
            made.bias = nn.Parameter(bias.clone())
        return made

    pointwise = nn.Conv2d(p.Q, p.K, 1, bias=False, dtype=p.dtype)
    pointwise.weight.data.copy_(mixing[:, :, None, None])
    pointwise.bias = nn.Parameter(bias.clone())
    forms: dict[Form, nn.Module] = {
        "fused": FusedLayer(p, basis, mixing, bias),
        "two_step": nn.Sequential(conv(p.Q, basis, False, p.groups), pointwise),
    }
    if p.groups == 1:
        collapsed = (mixing.double() @ basis.double().flatten(1)).reshape(p.K, p.C, p.R, p.S)
        forms["dense"] = conv(p.K, collapsed, True, 1)
    return x, forms


def _linear_forms(sizes: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, dict[Form, nn.Module]]:
    batch, inputs, outputs = sizes
    linear = nn.Linear(inputs, outputs)
    linear.weight.data.copy_(torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)
    return torch.randn(batch, inputs, generator=generator), {"dense": linear}


def build(case: Case, folder: Path) -> Payload:
    """Make the case's tensors, write the workers' files, keep the right answers.

    Raises:
        ValueError: the problem cannot be expressed as ``nn.Conv2d``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    if case.kind == "network":
        assert case.network is not None
        x, forms = models.network_forms(case.network, case.batch, generator)
    elif case.op:
        return _build_bits(case, folder, generator)
    elif case.kind == "linear":
        assert case.linear is not None
        x, forms = _linear_forms(case.linear, generator)
    else:
        assert case.problem is not None
        chain = isinstance(case.problem, TuckerConv2dProblem)
        x, forms = (tucker.layer_forms if chain else layer_forms)(case.problem, generator)

    grad = None
    if case.kind == "training":
        for form in ("fused", "two_step"):
            next(forms[form].parameters()).requires_grad_(not case.frozen)
        with torch.no_grad():
            grad = torch.randn(forms["two_step"](x).shape, generator=generator).to(x.dtype)
        torch.save(grad, folder / "grad.pt")

    found: dict[Form, Answers] = {}
    problem = None if case.kind == "network" else case.problem
    for form in case.forms:
        module = forms[form].eval()
        torch.save(module, folder / f"{form}.pt")
        if form == "fused" and "two_step" in forms:
            continue
        found[form] = answers.of(module, problem, x, grad)
        if case.kind != "training":
            _write_onnx(module, x, folder / f"{form}.onnx")
    if "fused" in case.forms:
        found["fused"] = found.get("two_step") or answers.of(forms["two_step"].eval(), problem, x, grad)

    torch.save(x, folder / "input.pt")
    np.save(folder / "input.npy", x.float().numpy())
    about = {
        "case": case.id,
        "kind": case.kind,
        "dtype": str(x.dtype).removeprefix("torch."),
        "forms": list(case.forms),
    }
    (folder / "payload.json").write_text(json.dumps(about))
    return Payload(folder, found)


def _build_bits(case: Case, folder: Path, generator: torch.Generator) -> Payload:
    """The same for a binary, stacked or ternary layer; 8-bit engines get codes of the same input."""
    x, forms = bits.forms_of(case, generator)
    found: dict[Form, Answers] = {}
    for form in case.forms:
        module = forms[form].eval()
        torch.save(module, folder / f"{form}.pt")
        found[form] = bits.answers_of(case, form, module, forms["dense"], x)
        if form in PLAIN:
            _write_onnx(module, x, folder / f"{form}.onnx")
    if isinstance(forms.get("int8"), bits.Int8Layer):
        codes = bits.quantized(x)
        np.save(folder / "codes.npy", codes.numpy())
        steps = {"centre": bits.CENTRE, "output_step": forms["int8"].output_step}
        (folder / "int8.json").write_text(json.dumps(steps))
        _write_onnx(forms["int8"], codes, folder / "int8.onnx")
    torch.save(x, folder / "input.pt")
    np.save(folder / "input.npy", x.numpy())
    np.save(folder / "filters.npy", forms["dense"].weight.detach().numpy())  # type: ignore[operator]
    about = {"case": case.id, "kind": case.kind, "dtype": "float32", "forms": list(case.forms)}
    about["padding"] = case.problem.padding[0]
    (folder / "payload.json").write_text(json.dumps(about))
    return Payload(folder, found)


def _write_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Skip the file where onnx is not installed: the engines that need it then say that they are missing."""
    try:
        from bench.harness import onnx_export
    except ModuleNotFoundError:
        return
    onnx_export.write(module, x, path)
