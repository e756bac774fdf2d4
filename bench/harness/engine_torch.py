"""PyTorch's own two engines, eager and compiled; and what every engine inside PyTorch shares."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness.case import PLAIN
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Array, Files, Method

TRIALS = 7  # of each compiled form of a network
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def arrays(tensors: Sequence[Tensor]) -> list[Array]:
    """Results as float32 for the parent."""
    return [tensor.detach().float().contiguous().numpy() for tensor in tensors]


def load(path: Path, layout: str) -> nn.Module:
    """A module that our own parent pickled a moment ago, its filters in a layout.

    The file is mapped, so that engines share the pages of large weights.
    """
    module: nn.Module = torch.load(path, weights_only=False, mmap=True)
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]


def placed(x: Tensor, layout: str) -> Tensor:
    """Maps in a layout; anything else as it is."""
    return x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x


def inference(form: str, layout: str, call: Callable[[], Tensor], detail: str = "") -> Method:
    """A method without gradients, which are switched off once for many calls, as programs do it."""
    return Method(form, layout, call, lambda: arrays([call()]), detail, torch.no_grad)


def training(
    form: str, layout: str, forward: Callable[[Tensor], Tensor], leaves: Sequence[Tensor], x: Tensor, grad: Tensor,
    detail: str = "",
) -> Method:  # fmt: skip
    """Forward and backward; ``leaves`` are the trained weights. Gradients start as None, as optimizers leave them."""
    x = x.requires_grad_()
    wanted = [x, *leaves]

    def step() -> Tensor:
        for leaf in wanted:
            leaf.grad = None
        out = forward(x)
        out.backward(grad)
        return out

    def output() -> list[Array]:
        out = step()
        return arrays([out, *(leaf.grad for leaf in wanted if leaf.grad is not None)])

    return Method(form, layout, step, output, detail)


class _Plain:
    """Dense and two-step forms as plain modules."""

    layouts: tuple[str, ...] = ("channels_last",)

    def wrap(self, module: nn.Module, x: Tensor, kind: str) -> tuple[Callable[[Tensor], Tensor], str]:
        """What is called instead of the module on inputs like ``x``, and a word about it."""
        raise NotImplementedError

    def prepare(self, files: Files) -> list[Method]:
        """One method a form and layout."""
        about = files.about
        x = torch.load(files.folder / "input.pt")
        methods = []
        for form in about["forms"]:
            if form not in PLAIN:
                continue
            for layout in self.layouts if x.dim() == 4 else ("channels_last",):
                x_placed = placed(x, layout)
                module = load(files.folder / f"{form}.pt", layout)
                run, detail = self.wrap(module, x_placed, about["kind"])
                if about["kind"] == "training":
                    grad = placed(torch.load(files.folder / "grad.pt"), layout)
                    trained = [p for p in module.parameters() if p.requires_grad]
                    methods.append(training(form, layout, run, trained, x_placed, grad, detail))
                else:
                    methods.append(inference(form, layout, functools.partial(run, x_placed), detail))
        if not methods:
            raise UnsupportedError("this case has no plain form")
        return methods


class Eager(_Plain):
    """PyTorch as it is, in both layouts."""

    layouts = ("channels_last", "nchw")

    def wrap(self, module: nn.Module, x: Tensor, kind: str) -> tuple[Callable[[Tensor], Tensor], str]:
        """The module itself."""
        return module, ""


def compile_module(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """``torch.compile``; the work happens in the first call."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(module)
    return compiled


def freeze(network: bool = False) -> None:
    """Make Inductor fold and pre-pack weights; a network's calls then follow each other in C++ instead of Python."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._inductor.config.cpp_wrapper = network


def packaged(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A package of AOTInductor for inputs like ``x``, loaded again: what a program without Python would run."""
    import torch._inductor

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(module, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/network.pt2", inductor_configs={"freezing": True}
        )
        loaded: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(path)
    return loaded


def compile_network(module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The faster of ``torch.compile`` and an AOTInductor package on inputs like ``x``, and which it is.

    The one asks its guards in every call, the other goes through a table of operators: each wins on some network.
    """
    forms = {"torch.compile": compile_module(module), "AOTInductor package": packaged(module, x)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for _ in range(TRIALS + 1):
            for name, run in forms.items():
                run(x)  # finds its own data in the caches next
                start = time.perf_counter()
                run(x)
                times[name].append(time.perf_counter() - start)
    best = min(forms, key=lambda name: statistics.median(times[name][1:]))
    return forms[best], best


class Compiled(_Plain):
    """Inductor with freezing: weights are constants and pre-packed."""

    def wrap(self, module: nn.Module, x: Tensor, kind: str) -> tuple[Callable[[Tensor], Tensor], str]:
        """The compiled module."""
        return compile_network(module, x) if kind == "network" else (compile_module(module), "")

    def prepare(self, files: Files) -> list[Method]:
        """As plain, in a fresh compiler."""
        torch._dynamo.reset()
        if files.about["kind"] == "training":
            raise UnsupportedError("frozen weights cannot be trained")
        freeze(network=files.about["kind"] == "network")
        return super().prepare(files)
