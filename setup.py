"""Builds the native kernels; everything else about the package stands in pyproject.toml.

``BASISCONV_BUILD`` decides: ``auto`` (what this machine can build), ``cpu``, ``cuda`` (CPU and CUDA kernels; an error
where that is impossible) or ``none``. One line on stderr says what was chosen and why; an instruction set that the
compiler does not know is left out and named there. ``DEBUG=1`` builds with -O1 -g, and
``BASISCONV_SANITIZE=address,undefined`` with those sanitizers.

CUDA kernels are compiled by nvcc alone, without torch: any torch will do, and one library serves many. ``auto`` builds
them only where torch has CUDA, since they take a minute or more and a CPU-only torch has no tensors for them.
``TORCH_CUDA_ARCH_LIST`` names the architectures.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

# LibTorch's stable ABI as of torch 2.10: one library for that version and later ones, and for every Python.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030A0000"  # the limited API as of Python 3.10
SHORT_WAY = "csrc/python/eager.cpp"
CPU_KERNELS = [
    "csrc/cpu/basis_conv2d.cpp",
    "csrc/cpu/binary_conv2d.cpp",
    "csrc/cpu/bitpack.cpp",
    "csrc/cpu/stacked_binary_conv2d.cpp",
    "csrc/cpu/ternary_conv2d.cpp",
]
POPCOUNT_KERNELS = ["csrc/cpu/binary_conv2d.cpp"]
PAIR_KERNELS = ["csrc/cpu/basis_conv2d.cpp"]
AMX_KERNELS = [
    f"csrc/cpu/{name}_amx.cpp" for name in ("basis_conv2d", "binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")
]
CUDA_KERNELS = [
    f"csrc/cuda/{name}.cu"
    for name in (
        "basis_conv2d",
        "basis_conv2d_sm80",
        "binary_conv2d",
        "binary_conv2d_sm80",
        "bitpack",
        "facts",
        "ternary_conv2d",
        "tucker_conv2d",
    )
]
SM90A_KERNELS = [
    f"csrc/cuda/{name}.cu"
    for name in ("basis_conv2d_sm90a", "binary_conv2d_sm90a", "binary_conv2d_sm90a_slabs", "ternary_conv2d_sm90a")
]
CUDA_GLUE = [
    f"csrc/ops/{name}.cpp"
    for name in (
        "basis_conv2d_cuda",
        "binary_conv2d_cuda",
        "bitpack_cuda",
        "cuda_stream",
        "ternary_conv2d_cuda",
        "tucker_conv2d_cuda",
    )
]
CUDA_ARCHITECTURES = "8.0;9.0a+PTX"
ONCE = [
    "csrc/ops/basis_conv2d.cpp",
    "csrc/ops/binary_conv2d.cpp",
    "csrc/ops/bitpack.cpp",
    "csrc/ops/stacked_binary_conv2d.cpp",
    "csrc/ops/ternary_conv2d.cpp",
    "csrc/cpu/basis_conv2d_plan.cpp",
    "csrc/cpu/binary_conv2d_plan.cpp",
    "csrc/cpu/binary_conv2d_table.cpp",
    "csrc/cpu/stacked_binary_conv2d_plan.cpp",
    "csrc/cpu/ternary_conv2d_plan.cpp",
    "csrc/cpu/isa.cpp",
]


class InstructionSet(NamedTuple):
    """What is compiled for one set, how, and a few lines that only a compiler which knows the set translates."""

    sources: list[str]
    options: list[str]
    probe: str


def instruction_sets() -> dict[str, InstructionSet]:
    """The sets of this kind of processor by name, each wider than the one before."""
    sets = {"base": InstructionSet(CPU_KERNELS, [], "#include <concepts>\nstd::integral auto probe() { return 1; }")}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return sets
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    popcount = [*avx512, "-mavx512vpopcntdq"]
    pairs = [*avx512, "-mavx512bf16"]
    amx = [*pairs, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
    for name, sources, options, body in (
        ("avx2", CPU_KERNELS, ["-DBASISCONV_AVX2", *avx2], "return _mm256_fmadd_ps(v, v, v);"),
        ("avx512", CPU_KERNELS, ["-DBASISCONV_AVX512", *avx512], "return _mm256_mask_add_ps(v, 1, v, v);"),
        (
            "avx512_vpopcntdq",
            POPCOUNT_KERNELS,
            ["-DBASISCONV_AVX512", "-DBASISCONV_VPOPCNTDQ", *popcount],
            "return _mm256_castsi256_ps(_mm512_castsi512_si256(_mm512_popcnt_epi32(_mm512_set1_epi32(v[0]))));",
        ),
        (
            "avx512_bf16",
            PAIR_KERNELS,
            ["-DBASISCONV_AVX512", "-DBASISCONV_PAIRS", *pairs],
            "return _mm256_add_ps(v, (__m256)_mm512_cvtneps_pbh(_mm512_set1_ps(v[0])));",
        ),
        (
            "amx",
            AMX_KERNELS,
            ["-DBASISCONV_AVX512", "-DBASISCONV_PAIRS", *amx],
            "_tile_dpbf16ps(0, 1, 2); _tile_dpbssd(3, 4, 5); return v;",
        ),
    ):
        sets[name] = InstructionSet(sources, options, f"#include <immintrin.h>\n__m256 probe(__m256 v) {{ {body} }}")
    return sets


def say(text: str) -> None:
    """One line about the build, where pip -v and direct builds show it."""
    print(f"basisconv_kernels build: {text}", file=sys.stderr, flush=True)


def compiler() -> list[str]:
    """The command that compiles C++, as torch's extension builder takes it."""
    return shlex.split(os.environ.get("CXX") or "c++")


def complaint(probe: str, options: list[str]) -> str | None:
    """The compiler's first error on a few lines of C++, None where it translates them all the way to machine code."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*compiler(), "-std=c++20", *options, "-x", "c++", "-c", "-", "-o", os.path.join(folder, "probe.o")],
            input=probe, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message").strip()


def reason_against_native(mode: str) -> str | None:
    """Why nothing native is built; None when it is. Raises where the user asked for what cannot be."""
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"BASISCONV_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return "BASISCONV_BUILD=none"
    reason = None
    if importlib.util.find_spec("torch") is None:
        # An isolated build: use the torch of the environment that is installed into.
        sys.path.append(sysconfig.get_path("purelib"))
    if sys.platform == "win32":
        reason = "no native kernels for Windows yet"
    elif importlib.util.find_spec("torch") is None:
        reason = "torch is not importable here; install torch first, or pass --no-build-isolation"
    elif shutil.which(compiler()[0]) is None:
        reason = f"no C++ compiler ({compiler()[0]})"
    elif (error := complaint(instruction_sets()["base"].probe, [])) is not None:
        reason = f"{compiler()[0]} cannot compile C++20: {error}"
    if reason is not None and mode in ("cpu", "cuda"):
        raise SystemExit(f"BASISCONV_BUILD={mode} is impossible: {reason}")
    return reason


def sets_that_compile() -> tuple[dict[str, InstructionSet], str]:
    """The instruction sets up to the first that the compiler does not know, and what it said about that one."""
    sets = instruction_sets()
    with ThreadPoolExecutor() as pool:
        complaints = dict(zip(sets, pool.map(lambda s: complaint(s.probe, s.options), sets.values()), strict=True))
    first_bad = next((name for name, error in complaints.items() if error is not None), None)
    if first_bad is None:
        return sets, ""
    names = list(sets)
    left_out = names[names.index(first_bad) :]
    kept = {name: sets[name] for name in names if name not in left_out}
    return kept, f"without {', '.join(left_out)} ({compiler()[0]}: {complaints[first_bad]}), "


class Toolkit(NamedTuple):
    """A CUDA toolkit, as its nvcc tells about itself."""

    nvcc: list[str]
    version: str
    libraries: list[str]  # -L options


def toolkit() -> Toolkit | str:
    """The CUDA toolkit, or why there is none. nvcc itself is asked: it may be a wrapper, and ``CUDA_HOME`` unset."""
    home = os.environ.get("CUDA_HOME")
    names = [os.environ.get("NVCC"), "nvcc", os.path.join(home, "bin", "nvcc") if home else None]
    command = next((shlex.split(n) for n in names if n and shutil.which(shlex.split(n)[0])), None)
    if command is None:
        return "no nvcc"
    done = subprocess.run([*command, "--dryrun", "kernel.cu"], capture_output=True, text=True, check=False)
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release ([\d.]+)", told)
    libraries = re.search(r"LIBRARIES=(.*)", done.stderr)
    if version is None or libraries is None:
        return f"{command[0]} does not say what it is"
    return Toolkit(command, version.group(1), shlex.split(libraries.group(1)))


class Architectures(NamedTuple):
    """What ``TORCH_CUDA_ARCH_LIST`` asks for; ``options`` are those of ordinary kernels, ``hopper`` adds sm_90a's."""

    names: list[str]
    options: list[str]
    hopper: bool


def architectures() -> Architectures:
    """The architectures to build for. 9.0 has kernels of its own, for sm_90a, which runs nothing newer."""
    names = re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).strip())
    options = []
    for name in names:
        known = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if known is None or int(known[1]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: 8.0 or later, like {CUDA_ARCHITECTURES}, got {name!r}")
        number = known[1] + known[2]
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        options += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if known[3] else []
    return Architectures(names, options, any(name.startswith("9.0") for name in names))


def cuda_toolkit(mode: str, torch_cuda: str | None) -> Toolkit | str:
    """The toolkit to build CUDA kernels with, or why none are built. Raises where the user asked for them in vain."""
    if mode == "cpu":
        return "BASISCONV_BUILD=cpu"
    if mode == "auto" and torch_cuda is None:
        return "this torch has no CUDA; BASISCONV_BUILD=cuda builds them nevertheless"
    found = toolkit()
    if isinstance(found, str) and mode == "cuda":
        raise SystemExit(f"BASISCONV_BUILD=cuda is impossible: {found}")
    return found


def compile_cuda(kit: Toolkit, folder: Path, headers: list[str]) -> list[str]:
    """Object files of the CUDA kernels; those that are newer than their sources and were made the same way are kept."""
    wanted = architectures()
    common = [*kit.nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
    common += ["-ccbin", compiler()[0]]
    if not wanted.hopper:
        common.append("-DBASISCONV_WITHOUT_SM90A")
    # -gencode, never -arch=sm_90a: that would also assemble ordinary 9.0 code, which has no wgmma.
    jobs = [(source, wanted.options) for source in CUDA_KERNELS]
    if wanted.hopper:
        jobs += [(source, ["-gencode", "arch=compute_90a,code=sm_90a"]) for source in SM90A_KERNELS]

    def compiled(job):
        source, architecture = job
        made = folder / f"{Path(source).stem}.o"
        command = [*common, *architecture, "-c", source, "-o", str(made)]
        note = made.with_suffix(".command")
        newest = max(os.path.getmtime(path) for path in (source, *headers))
        if made.exists() and made.stat().st_mtime > newest and note.exists() and note.read_text() == repr(command):
            return str(made)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # C75xx: ptxas serialises wgmma, or ignores what keeps it fast: right results, several times slower.
        if done.returncode != 0 or "C75" in done.stderr:
            raise SystemExit(f"nvcc failed on {source}:\n{done.stderr}")
        note.write_text(repr(command))
        return str(made)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compiled, jobs))


def native() -> dict:
    """The arguments of ``setup`` for the native library, empty without one."""
    reason = reason_against_native(os.environ.get("BASISCONV_BUILD", "auto"))
    if reason is not None:
        say(f"no native kernels ({reason}); the PyTorch reference will run")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    kit = cuda_toolkit(os.environ.get("BASISCONV_BUILD", "auto"), torch.version.cuda)
    with_cuda = isinstance(kit, Toolkit)
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
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
    ]
    link = []
    if sanitizers := os.environ.get("BASISCONV_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g1"]
        # Checks as calls: inline, those of the unrolled kernels take GCC minutes a file.
        calls = ["--param", "asan-instrumentation-with-call-threshold=0"]
        flags += calls if complaint("", calls) is None else []
        link += [f"-fsanitize={sanitizers}"]
    if with_cuda:
        link += [*kit.libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    class BuildKernels(BuildExtension):
        """Compiles the CPU kernels once per instruction set, then the rest as usual."""

        def build_extension(self, ext):
            if ext.sources == [SHORT_WAY]:
                super().build_extension(ext)
                return
            sets, left_out = sets_that_compile()
            cuda = f"but no CUDA kernels ({kit})"
            if with_cuda:
                cuda = f"and CUDA kernels ({', '.join(architectures().names)}; nvcc {kit.version})"
            say(f"CPU kernels ({', '.join(sets)}) {left_out}{cuda}{slow_calls}, with torch {torch.__version__}")
            common = [*flags, f"-DBASISCONV_WIDEST={list(sets)[-1]}"]

            def compile_for(item):
                name, (sources, options, _) = item
                return self.compiler.compile(
                    sources,
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=list(ext.include_dirs),
                    debug=self.debug,
                    extra_postargs={"cxx": [*common, f"-DBASISCONV_ISA={name}", *options]},
                    depends=ext.depends,
                )

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                for objects in pool.map(compile_for, sets.items()):
                    ext.extra_objects += objects
            if with_cuda:
                ext.extra_objects += compile_cuda(kit, Path(self.build_temp) / "cuda", ext.depends)
                facts = {"CUDA": ",".join(architectures().names), "NVCC": kit.version}
                ext.extra_compile_args["cxx"] += [f"-DBASISCONV_{name}={value}" for name, value in facts.items()]
            ext.extra_compile_args["cxx"] += common
            super().build_extension(ext)

    python = [f"-I{sysconfig.get_path('include')}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]
    lacking = complaint("#include <Python.h>", python)
    slow_calls = f", calls without their short way ({lacking})" if lacking else ""
    kernels = CppExtension(
        "basisconv_kernels._C",
        [*ONCE, *(CUDA_GLUE if with_cuda else [])],
        py_limited_api=True,
        extra_compile_args={"cxx": []},
        extra_link_args=link,
        depends=headers,
    )
    short_way = Extension(
        "basisconv_kernels.core._eager",
        [SHORT_WAY],
        py_limited_api=True,
        extra_compile_args=[*flags, *python],
        extra_link_args=[option for option in link if option.startswith("-fsanitize")],
        language="c++",
    )
    return {
        "ext_modules": [kernels, *([] if lacking else [short_way])],
        "cmdclass": {"build_ext": BuildKernels.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**native())
