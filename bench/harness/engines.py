"""The engines: where each is implemented and with which environment its process starts."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.harness.errors import UnknownNameError

OURS = ("ours", "ours_compiled", "ours_avx2")
"""Ours called from eager PyTorch, inside a compiled and frozen graph (whole networks only), and capped to AVX2."""

INT8 = ("torch_int8", "onnxruntime_int8")
"""Convolutions on 8-bit codes."""

BASELINES = ("torch_eager", "torch_compiled", "onnxruntime", "openvino")
"""Everybody whose best time counts as the rival."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine as data.

    Attributes:
        name: as rows carry it.
        target: ``module:class``, imported in the worker process only; the class is called with ``argument`` if given.
        requires: the module without which it is missing.
        describes: one line for people.
        environment: variables on top of those that all workers share.
        argument: for the constructor.
        forms: that it computes.
        kinds: of cases that it is for; empty: all.
        interpreter: the variable that names a Python with what it needs; without it, the one that runs the harness.
    """

    name: str
    target: str
    requires: str
    describes: str
    environment: dict[str, str] = field(default_factory=dict)
    argument: str = ""
    forms: tuple[str, ...] = ("two_step", "dense")
    kinds: tuple[str, ...] = ()
    interpreter: str = ""

    @property
    def python(self) -> str:
        """The Python that its process runs."""
        return os.environ.get(self.interpreter, "") or sys.executable

    def installed(self) -> bool:
        """Whether what it needs is there; one that runs in a Python of its own says so itself when it starts."""
        return self.python != sys.executable or importlib.util.find_spec(self.requires) is not None

    def takes(self, kind: str, forms: Sequence[str]) -> bool:
        """Whether such a case is for this engine at all; what it then cannot do, it says itself."""
        return (not self.kinds or kind in self.kinds) and bool(set(self.forms) & set(forms))


ENGINES = (
    EngineSpec(
        "ours", "bench.harness.engine_ours:Ours", "basisconv_kernels",
        "our op with packed weights, channels_last", forms=("fused",),
    ),
    EngineSpec(
        "ours_avx2", "bench.harness.engine_ours:Ours", "basisconv_kernels",
        "ours with its kernels capped to AVX2", environment={"BASISCONV_CPU_ISA": "avx2"}, forms=("fused",),
        kinds=("layer",),
    ),
    EngineSpec(
        "ours_compiled", "bench.harness.engine_ours:OursCompiled", "basisconv_kernels",
        "networks with our layers inside torch.compile, frozen, C++ wrapper, channels_last", forms=("fused",),
        kinds=("network",),
    ),
    EngineSpec(
        "torch_eager", "bench.harness.engine_torch:Eager", "torch",
        "PyTorch eager, channels_last and NCHW",
    ),
    EngineSpec(
        "torch_compiled", "bench.harness.engine_torch:Compiled", "torch",
        "torch.compile (Inductor) with freezing, networks with the C++ wrapper, channels_last",
    ),
    EngineSpec(
        "onnxruntime", "bench.harness.engine_onnxruntime:OnnxRuntime", "onnxruntime",
        "ONNX Runtime, all graph optimisations, io-binding, NCHW",
    ),
    EngineSpec(
        "openvino", "bench.harness.engine_openvino:OpenVino", "openvino",
        "OpenVINO, LATENCY hint, f32 or bf16 as the case says, channels_last and NCHW",
    ),
    EngineSpec(
        "torch_int8", "bench.harness.engine_bits:TorchInt8", "torch",
        "PyTorch's quantized convolution (oneDNN), 8-bit in and out, channels_last", forms=("int8",), kinds=("layer",),
    ),
    EngineSpec(
        "onnxruntime_int8", "bench.harness.engine_int8:OnnxRuntimeInt8", "onnxruntime",
        "ONNX Runtime's QLinearConv, 8-bit in and out, NCHW", forms=("int8",), kinds=("layer",),
    ),
    EngineSpec(
        "larq", "bench.harness.engine_larq:Larq", "larq_compute_engine",
        "Larq Compute Engine, indirect BGEMM, real in and out, NHWC", forms=("binary",), kinds=("layer",),
        interpreter="BASISCONV_LARQ_PYTHON",
    ),
    EngineSpec(
        "onednn_avx2", "bench.harness.engine_torch:Compiled", "torch",
        "torch_compiled with oneDNN capped to AVX2, whose filter quantum is 8 instead of 16",
        environment={"ONEDNN_MAX_CPU_ISA": "AVX2"},
    ),
    EngineSpec(
        "onednn_no_amx", "bench.harness.engine_torch:Compiled", "torch",
        "torch_compiled with oneDNN capped below matrix units (AMX), to tell their share of a bfloat16 result",
        environment={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    ),
)  # fmt: skip


def find(name: str) -> EngineSpec:
    """An engine by name; ``candidate:package.module:function`` makes one of a user's kernel.

    Raises:
        UnknownNameError: no such engine.
    """
    if name.startswith("candidate:"):
        target = name.removeprefix("candidate:")
        candidate = "bench.harness.engine_ours:Candidate"
        return EngineSpec(name, candidate, "torch", f"{target}, channels_last", argument=target, forms=("fused",))
    for spec in ENGINES:
        if spec.name == name:
            return spec
    raise UnknownNameError(f"bench: no engine has the name {name!r}; there are {', '.join(s.name for s in ENGINES)}")


def _malloc_threshold() -> str:
    """Bytes below which malloc keeps freed memory for the next call.

    glibc before 2.35 ignores values above 32 MiB, which would leave its small default in force.
    """
    library, version = platform.libc_ver()
    recent = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return str(2**30 if recent else 2**25)


def timing_environment(threads: int) -> dict[str, str]:
    """Variables of every timing worker alike.

    Threads wait without spinning, or an idle engine's pool would eat the time of the one that is measured. Memory stays
    with the process between calls, or the page faults of fresh outputs would be measured instead of the kernels.
    """
    threshold = _malloc_threshold()
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's, which only the probe of quiet.py uses
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "MALLOC_MMAP_THRESHOLD_": threshold,
        "MALLOC_TRIM_THRESHOLD_": threshold,
    }


def memory_environment(threads: int) -> dict[str, str]:
    """Variables of a worker whose memory is measured: large blocks come from the system and go back at once."""
    return {
        **timing_environment(threads),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
