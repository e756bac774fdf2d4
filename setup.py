"""Builds the native kernels; everything else about the package stands in pyproject.toml.

``BASISCONV_BUILD`` decides: ``auto`` (what this machine can build), ``cpu``, ``cuda`` (an error where that is
impossible) or ``none``. One line on stderr says what was chosen and why. ``DEBUG=1`` builds with -O1 -g, and
``BASISCONV_SANITIZE=address,undefined`` with those sanitizers.
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

# LibTorch's stable ABI as of torch 2.10: one library for that version and later ones, and for every Python.
TORCH_TARGET = "0x020a000000000000"
CPU_KERNELS = ["csrc/cpu/basis_conv2d.cpp"]
AMX_KERNELS = ["csrc/cpu/basis_conv2d_amx.cpp"]
ONCE = ["csrc/ops/basis_conv2d.cpp", "csrc/cpu/basis_conv2d_plan.cpp", "csrc/cpu/isa.cpp"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
# name → (sources, compiler options)
INSTRUCTION_SETS = {"base": (CPU_KERNELS, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx2"] = (CPU_KERNELS, ["-DBASISCONV_AVX2", *avx2])
    INSTRUCTION_SETS["avx512"] = (CPU_KERNELS, ["-DBASISCONV_AVX512", *avx2, *AVX512])
    amx = ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
    INSTRUCTION_SETS["amx"] = (AMX_KERNELS, ["-DBASISCONV_AVX512", *avx2, *AVX512, *amx])


def say(text: str) -> None:
    """One line about the build, where pip -v and direct builds show it."""
    print(f"basisconv_kernels build: {text}", file=sys.stderr, flush=True)


def reason_against_native(mode: str) -> str | None:
    """Why nothing native is built; None when it is. Raises where the user asked for what cannot be."""
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"BASISCONV_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return "BASISCONV_BUILD=none"
    if mode == "cuda":
        raise SystemExit("BASISCONV_BUILD=cuda: this version has no CUDA kernels yet; use auto or cpu")
    reason = None
    if importlib.util.find_spec("torch") is None:
        # An isolated build: use the torch of the environment that is installed into.
        sys.path.append(sysconfig.get_path("purelib"))
    if sys.platform == "win32":
        reason = "no native kernels for Windows yet"
    elif importlib.util.find_spec("torch") is None:
        reason = "torch is not importable here; install torch first, or pass --no-build-isolation"
    elif shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        reason = f"no C++ compiler ({os.environ.get('CXX') or 'c++'})"
    if reason is not None and mode == "cpu":
        raise SystemExit(f"BASISCONV_BUILD=cpu is impossible: {reason}")
    return reason


def native() -> dict:
    """The arguments of ``setup`` for the native library, empty without one."""
    reason = reason_against_native(os.environ.get("BASISCONV_BUILD", "auto"))
    if reason is not None:
        say(f"no native kernels ({reason}); the PyTorch reference will run")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    debug = os.environ.get("DEBUG") == "1"
    flags = [
        "-std=c++20",
        *(["-O1", "-g"] if debug else ["-O3", "-g0"]),
        "-fvisibility=hidden",
        f"-ffile-prefix-map={Path(__file__).resolve().parent}/=",  # errors name files of the project, not of a machine
        "-Wno-maybe-uninitialized",  # false alarms inside GCC's own AVX-512 headers
        "-Wno-uninitialized",
        "-Wno-unknown-warning-option",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        *(["-DBASISCONV_X86"] if "avx2" in INSTRUCTION_SETS else []),
    ]
    link = []
    if sanitizers := os.environ.get("BASISCONV_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        link += [f"-fsanitize={sanitizers}"]

    class BuildKernels(BuildExtension):
        """Compiles the CPU kernels once per instruction set, then the rest as usual."""

        def build_extension(self, ext):
            def compile_for(item):
                name, (sources, options) = item
                return self.compiler.compile(
                    sources,
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=list(ext.include_dirs),
                    debug=self.debug,
                    extra_postargs={"cxx": [*flags, f"-DBASISCONV_ISA={name}", *options]},
                    depends=ext.depends,
                )

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                for objects in pool.map(compile_for, INSTRUCTION_SETS.items()):
                    ext.extra_objects += objects
            super().build_extension(ext)

    extension = CppExtension(
        "basisconv_kernels._C",
        ONCE,
        py_limited_api=True,
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )
    say(f"CPU kernels ({', '.join(INSTRUCTION_SETS)}) with torch {torch.__version__}")
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
