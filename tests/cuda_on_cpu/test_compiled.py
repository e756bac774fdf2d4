"""What nvcc makes of the CUDA sources: no spills, the right instructions, no more registers than were reviewed.

Numbers belong to a version of the compiler: ``resources.json`` holds those that were looked at. Another version must
still spill nothing and use the same instructions.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu import building

REVIEWED = building.HERE / "resources.json"
KERNELS = {
    "sm_80": ("basis_conv2d_sm80.cu", "80"),
    "sm_90a": ("basis_conv2d_sm90a.cu", "90a"),
    "chain_sm_80": ("tucker_conv2d.cu", "80"),
    "chain_sm_90": ("tucker_conv2d.cu", "90"),
    "packing": ("basis_conv2d.cu", "80"),
    "bits_sm_80": ("binary_conv2d_sm80.cu", "80"),
    "bits_sm_90": ("binary_conv2d_sm80.cu", "90"),
    "bits_sm_90a": ("binary_conv2d_sm90a.cu", "90a"),
    "bits_in_slabs": ("binary_conv2d_sm90a_slabs.cu", "90a"),
    "ternary_sm_90a": ("ternary_conv2d_sm90a.cu", "90a"),
    "packing_of_filters": ("binary_conv2d.cu", "80"),
    "packing_of_ternary_filters": ("ternary_conv2d.cu", "80"),
    "packing_of_bits": ("bitpack.cu", "80"),
}
# The tests of a source share its compilation, those of several are shared out.
kernels = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"compiled {name}")) for name in KERNELS]
)
# float16 differs from bfloat16 in one conversion: it and ``precise``, most of the time, are left to the long run.
SHORTER = (
    ("launch_filters<f16>", "launch_filters<bf16>"),
    ("launch_ranks<f16>", "launch_ranks<bf16>"),
    ("launch_of<f16>", "launch_of<bf16>"),
    ("<T, Q16, true, stages>", "<T, Q16, false, stages>"),
)


def setup_module_of_the_package():
    """``setup.py``, which knows how nvcc is found."""
    spec = importlib.util.spec_from_file_location("basisconv_setup", building.ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler(name: str) -> str:
    """``cuobjdump`` of the toolkit, else of the Triton wheel."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(inside) if inside.exists() else None
    if found is None:
        pytest.skip(f"no {name}: it comes with the CUDA toolkit or with Triton")
    return found


# What a true template argument says.
FLAGS = {"binary_conv2d_sm90a": "pairs", "ternary_conv2d_sm90a": "shared out",
         "tucker_conv2d": "tall"}  # fmt: skip


def short(mangled: str) -> str:
    """``basis_conv2d_sm90a bf16 64 9 1 shared out`` or ``binary_conv2d_sm80 2 8`` from a mangled name."""
    name = re.search(
        r"\d((?:basis|binary|ternary)_conv2d_(?:sm\d+a?(?:_slabs)?|pack(?:_[a-z]+?)?)|tucker_conv2d|bitpack_[a-z]+?)(?:I|EN)",
        mangled,
    )
    assert name, mangled
    dtype = re.search(r"(b?f16)E|_[a-z]+I([fi])L", mangled)
    numbers, flag = re.findall(r"Li(\d+)E", mangled), FLAGS.get(name[1], "precise")
    makers = re.search(r"MakersE(\d)", mangled)  # of Z, an enumeration of basis_conv2d_sm90a.cu
    taps = re.search(r"TapsE(\d)", mangled)  # likewise
    words = [name[1], {"f": "f32", "i": "i32"}.get(dtype[2], dtype[1]) if dtype else "", *numbers]
    words += [("any taps", "nine taps", "sliding")[int(taps[1])]] if taps else []
    words += [flag] if "Lb1E" in mangled else []
    words += [("", "shared out", "of a cluster")[int(makers[1])]] if makers else []
    return " ".join(filter(None, words))


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """The version of nvcc and a function name → (log of ptxas, disassembly) that compiles when it is first asked."""
    kit = setup_module_of_the_package().toolkit()
    if isinstance(kit, str):
        pytest.skip(f"{kit}: the CUDA sources are not compiled here")
    folder = tmp_path_factory.mktemp("cubins")
    dump = disassembler("cuobjdump")
    csrc = folder / "csrc"
    shutil.copytree(building.ROOT / "csrc", csrc)
    if not request.config.getoption("--full"):
        for path in [*(csrc / "cuda").glob("*_conv2d_sm*.cu"), csrc / "cuda" / "tucker_conv2d.cu"]:
            text = path.read_text(encoding="utf-8")
            for whole, part in SHORTER:
                text = text.replace(whole, part)
            path.write_text(text, encoding="utf-8")

    def one(job):
        source, number = job
        cubin = folder / f"{Path(source).stem}_{number}.cubin"
        gencode = f"arch=compute_{number},code=sm_{number}"
        command = [*kit.nvcc, "-std=c++17", "-gencode", gencode, "-cubin", "-Xptxas", "-v,-warn-spills"]
        done = subprocess.run(
            [*command, csrc / "cuda" / source, "-o", cubin], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        sass = subprocess.run([dump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        return done.stderr, sass

    return kit.version, functools.cache(lambda name: one(KERNELS[name]))


def resources(log: str) -> dict[str, dict[str, int]]:
    """{kernel: registers, stack, spilled bytes} as ptxas reports them."""
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert numbers, entry
        assert registers, entry
        found[short(entry.split("'")[0])] = {
            "registers": int(registers[1]),
            "stack": int(numbers[1]),
            "spilled": int(numbers[2]) + int(numbers[3]),
        }
    return found


@kernels
def test_nothing_spills_and_nothing_is_serialised(compiled, name):
    log = compiled[1](name)[0]
    assert "C75" not in log, log
    for kernel, used in resources(log).items():
        assert (used["stack"], used["spilled"]) == (0, 0), kernel


@kernels
def test_registers_are_those_that_were_reviewed(compiled, name):
    version, sources = compiled
    reviewed = json.loads(REVIEWED.read_text(encoding="utf-8"))
    twice = " on sm_90" if name.endswith("_sm_90") else ""  # sources that two architectures compile here
    found = {f"{kernel}{twice}": used["registers"] for kernel, used in resources(sources(name)[0]).items()}
    if version not in reviewed:
        pytest.skip(f"nvcc {version} was not reviewed; {REVIEWED.name} has {', '.join(reviewed)}. Found: {found}")
    assert found == {kernel: n for kernel, n in reviewed[version].items() if kernel in found}


INSTRUCTIONS = {
    # name: (in every kernel, in none)
    "sm_80": ({"HMMA", "LDSM", "LDGSTS"}, {"LDL", "STL"}),
    "sm_90a": ({"HGMMA", "LDSM", "UTMALDG", "UBLKCP", "UBLKPF", "SYNCS"}, {"HMMA", "LDL", "STL"}),
    "packing": (set(), {"LDL", "STL"}),
    "chain_sm_80": ({"HMMA", "LDSM", "LDGSTS"}, {"LDL", "STL"}),
    "chain_sm_90": ({"HMMA", "LDSM", "LDGSTS"}, {"LDL", "STL"}),
    "bits_sm_80": ({"BMMA", "LDSM", "LDGSTS"}, {"LDL", "STL", "CALL"}),
    "bits_sm_90": ({"BMMA", "LDSM", "LDGSTS"}, {"LDL", "STL", "CALL"}),
    "bits_sm_90a": ({"BGMMA", "LDSM", "ACQBULK"}, {"BMMA", "LDL", "STL", "CALL"}),
    "bits_in_slabs": ({"BGMMA", "LDSM", "ACQBULK", "UBLKCP", "LDGSTS", "SYNCS"}, {"BMMA", "LDL", "STL", "CALL"}),
    "ternary_sm_90a": ({"HGMMA", "LDSM", "UTMALDG", "UBLKCP", "SYNCS"}, {"HMMA", "LDL", "STL"}),
    "packing_of_filters": (set(), {"LDL", "STL"}),
    "packing_of_ternary_filters": (set(), {"LDL", "STL"}),
    "packing_of_bits": (set(), {"LDL", "STL", "CALL"}),
}


def calls(function: str) -> list[str]:
    """Calls of anything; for sm_80 ptxas leaves some loops by a call of the instruction behind the next."""
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d+ )?CALL\S* (.*?);", function, re.MULTILINE)
    return [to for at, to in found if to.strip() != f"{int(at, 16) + 32:#x}"]


@kernels
def test_the_right_instructions(compiled, name):
    wanted, unwanted = INSTRUCTIONS[name]
    functions = compiled[1](name)[1].split("Function : ")[1:]
    assert functions
    for function in functions:
        kernel = short(function.split("\n")[0])
        used = set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", function, re.MULTILINE))
        if not calls(function):
            used.discard("CALL")
        assert wanted <= used, f"{kernel} lacks {wanted - used}"
        assert not unwanted & used, f"{kernel} has {unwanted & used}"
