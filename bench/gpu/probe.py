"""``make gpu-probe``: the rates and costs by which kernels are designed, each a step of its own.

Matrix products and copies of torch; what a call costs by the ways to register an op, and a call of ours; tiles of the
Triton kernels by layer (``sweep``); ``probe.cu``, which nvcc compiles here: matrix instructions by form and N, graph
nodes, the second-level cache, loads of tiles, clusters; and every row of Triton's tile table, right or wrong and then
its time. What cuDNN takes for the layers is measured by ``gpu-bench``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from basisconv_kernels import BackendUnavailable, basis_conv2d, basis_conv2d_pack
from bench.gpu import facts, probe_source
from bench.gpu.journal import Step, Unavailable
from bench.gpu.timing import eager_spread

HERE = Path(__file__).resolve().parent
KEPT = facts.ROOT / "build" / "gpu_probe"
TINY = ((1, 8, 4, 4), (8, 8, 3, 3), (8, 8), (8,))  # input, basis, coefficients and bias of a call
ENGINES = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
NAMES = ("graph_nodes", "cache", "boxes", "bits", "wgmma_bf16", "wgmma_b1", "clusters")


# --- nvcc -------------------------------------------------------------------------------------------------------------


def program(nvcc: str | None = None) -> Path:
    """The compiled probe; built once for a content of its sources.

    Raises:
        Unavailable: there is no nvcc, or it does not compile the probe.
    """
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable("nvcc is not on the path")
    header = probe_source.text()
    digest = hashlib.sha256(header.encode())
    for path in (HERE / "probe.cu", *sorted((facts.ROOT / "csrc" / "cuda").glob("*.h"))):
        digest.update(path.read_bytes())
    made = KEPT / digest.hexdigest()[:12] / "probe"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    (made.parent / "probe_wgmma.h").write_text(header, encoding="utf-8")
    command = [nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{made.parent}"]
    beside = made.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, HERE / "probe.cu", "-o", beside], capture_output=True, text=True, check=False)
    if done.returncode != 0 or "C75" in done.stderr:
        raise Unavailable(f"nvcc does not compile the probe: {done.stderr.strip()[-800:]}")
    beside.replace(made)
    return made


def measured(name: str) -> dict[str, Any]:
    """What ``probe.cu`` prints for a name."""
    done = subprocess.run([program(), name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"probe {name} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-800:]}")
    return json.loads(done.stdout)


# --- torch ------------------------------------------------------------------------------------------------------------


def rates(device: str) -> dict[str, Any]:
    """A large bfloat16 product and a large copy, on random numbers, and the clock under that load."""
    cuda = device == "cuda"
    side, words = (8192, 2**31) if cuda else (256, 2**18)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.randn(words // 8, device=device)
    target = torch.empty_like(source)
    us = functools.partial(_microseconds, device)
    product = us(lambda: a @ b)
    clock = _sm_clock(lambda: a @ b) if cuda else None
    copy = us(lambda: target.copy_(source))
    return {
        "side": side, "tflops": 2 * side**3 / product * 1e-6, "sm_clock_mhz": clock,
        "copied_bytes": 2 * source.numel() * 4, "copy_tb_per_s": 2 * source.numel() * 4 / copy * 1e-6,
    }  # fmt: skip


def _microseconds(device: str, call: Callable[[], Any], times: int = 10) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return eager_spread([call], 15, wait, times).median


def _sm_clock(load: Callable[[], Any]) -> int | None:
    """MHz while products run; read only, nothing is set."""
    if facts.tools()["nvidia-smi"] is None:
        return None
    for _ in range(400):
        load()
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    torch.cuda.synchronize()
    return int(told.splitlines()[0]) if told[:1].isdigit() else None


def op_costs(device: str) -> dict[str, Any]:
    """Microseconds of an eager call that does nothing, by the way in which the op is registered."""
    x = torch.zeros(4, device=device)
    library = torch.library.Library("basisconv_probe", "FRAGMENT")
    custom = torch.library.custom_op("basisconv_probe::custom", lambda x: x.clone(), mutates_args=(),
                                     schema="(Tensor x) -> Tensor")  # fmt: skip
    for name in ("defined", "with_autograd"):
        if not hasattr(torch.ops.basisconv_probe, name):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_autograd("basisconv_probe::with_autograd", lambda ctx, g: g, lib=library)
    defined, with_autograd = (getattr(torch.ops.basisconv_probe, n).default for n in ("defined", "with_autograd"))

    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return defined(x)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g

    leaf = x.clone().requires_grad_()
    ways: dict[str, Callable[[], Any]] = {
        "clone_alone": x.clone,
        "custom_op": lambda: custom(x),
        "define_impl": lambda: defined(x),
        "register_autograd_with_gradient": lambda: with_autograd(leaf),
        "function_outside_with_gradient": lambda: Outside.apply(leaf),
    }
    return {f"us_{name}": _microseconds(device, call, 300) for name, call in ways.items()}


def call_costs(device: str) -> dict[str, Any]:
    """Microseconds that a caller waits for an eager call and a training step on a map that costs the device nothing."""
    x, basis, mixing, bias = (torch.ones(shape, device=device, dtype=torch.bfloat16) for shape in TINY)
    x = x.contiguous(memory_format=torch.channels_last)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, basis, mixing, bias)]
    slope = torch.ones(1, 8, 4, 4, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    packed = basis_conv2d_pack(basis, mixing)

    def ours(backend: str | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
        settings: dict[str, Any] = {"padding": 1, "activation": "relu", "backend": backend}
        call = functools.partial(basis_conv2d, x, basis, mixing, bias, packed=packed, **settings)
        return call, lambda: torch.autograd.grad(basis_conv2d(*leaves, **settings), leaves, slope)

    def two(x: Any, basis: Any, mixing: Any, bias: Any) -> Any:
        return F.relu(F.conv2d(F.conv2d(x, basis, padding=1), mixing[:, :, None, None], bias))

    engines = {"automatic": ours(None), **{name: ours(name) for name in ENGINES[device]}}
    engines["two convolutions"] = (
        functools.partial(two, x, basis, mixing, bias),
        lambda: torch.autograd.grad(two(*leaves), leaves, slope),
    )
    found = {}
    for name, (forward, step) in engines.items():
        with torch.inference_mode():
            try:
                forward()
            except BackendUnavailable:
                continue
            found[f"us_{name} forward"] = _microseconds(device, forward, 300)
        found[f"us_{name} step"] = _microseconds(device, step, 100)
    return found


def triton_row(index: int) -> dict[str, Any]:
    """A row of the tile table: its check, then its time on the problem that fills it."""
    from basisconv_kernels import testing
    from basisconv_kernels.triton_kernels import basis_conv2d as kernels
    from basisconv_kernels.triton_kernels import configs
    from tests.triton import rows

    row = rows.ROWS[index]
    capability = torch.cuda.get_device_capability()
    if row.path != "pointers" and capability < configs.DESCRIPTORS_FROM:
        raise Unavailable("no tensor memory unit")
    dtype = torch.bfloat16 if row.arithmetic == configs.HALF else torch.float32
    if row.arithmetic == configs.FLOAT32:
        dtype = torch.float32
    rows.check(row, dtype, "cuda")
    case = rows.case(row, dtype, "cuda").at(N=32, H=56, W=56, C=64, K=64, padding=(1, 1, 1, 1), residual=False)
    inputs = testing.make_inputs(case)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = row.arithmetic == configs.TF32
    try:
        run = functools.partial(
            kernels.forward, *inputs.tensors, **case.arguments(), path=row.path.removesuffix("2"), tile=row.tile
        )
        us = _microseconds("cuda", run, 20)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return {"row": str(row), "problem": str(case.problem), "us": us, "tflops": 2 * case.problem.macs() / us * 1e-6}


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(about: Mapping[str, Any], device: str) -> list[Step]:
    """All measurements by priority."""
    theirs, ours = (facts.stamp(dict(about), ours=own) for own in (False, True))
    found = [
        Step("rates", functools.partial(rates, device), 6, 90, theirs),
        Step("op_costs", functools.partial(op_costs, device), 4, 90, theirs),
        Step("call_costs", functools.partial(call_costs, device), 8, 150, ours),
    ]
    if device == "cpu":
        return found
    from bench.gpu import sweep
    from tests.triton import rows

    found += sweep.steps(about)
    hopper = about["device"].get("capability") == "9.0"
    for name in NAMES:
        run = functools.partial(measured, name) if hopper else functools.partial(_not_hopper, about)
        found.append(Step(name, run, 8, 150, ours))
    found += [Step(f"triton {row}", functools.partial(triton_row, i), 5, 150, ours) for i, row in enumerate(rows.ROWS)]
    return found


def _not_hopper(about: Mapping[str, Any]) -> dict[str, Any]:
    raise Unavailable(f"probe.cu is for compute capability 9.0, this device has {about['device'].get('capability')}")
