"""Who may import whom, in Python and in C++; who may read the environment; what importing the package may not load."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "basisconv_kernels"
OPS = ("bitpack", "basis_conv2d", "tucker_conv2d", "binary_conv2d", "stacked_binary_conv2d", "ternary_conv2d")

# From the ground up: each may import itself and what stands before it.
LEVELS = (
    "core",
    "reference",
    "testing",
    "triton_kernels",
    "ops",
    "layers",
    "compression",
    "tiny_runs",
    "diagnostics",
    "demo",
    "cli",
)
# The files beside the folders. __init__ collects the public names; assets holds data and the scripts that made it.
TOP = {"__init__": "compression", "__main__": "cli", "assets": "cli", "hub": "cli"}

# What only some of the package may need: importing the package loads none of it.
OPTIONAL = (
    "triton",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "openvino",
    "pytest",
    "hypothesis",
)


def python_files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])


def level_of(path: Path) -> str:
    """The folder of a file, or the name of a file that lies beside the folders."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "triton_kernels":
        return "triton_kernels"
    return parts[1].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names of all imports, at any depth of the code; ``from a import b`` gives ``a.b``."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.append("." * node.level)
            else:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def readable(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


files = pytest.mark.parametrize("path", python_files(), ids=readable)


def offence(level: str, name: str) -> str | None:
    """What is wrong with importing a dotted name at a level; None where nothing is.

    The package itself, ``import basisconv_kernels``, is its ``__init__``, which imports everything up to compression:
    from there or below that would be a circle, which works or fails by the order of imports; above it is in order.
    """
    allowed = LEVELS[: LEVELS.index(TOP.get(level, level)) + 1]
    top, _, rest = name.partition(".")
    if name.startswith("."):
        return "write imports in full"
    if top in ("bench", "tests"):
        return f"the package must not import {top}"
    if top == "triton_kernels":
        return f"the package's Triton kernels are {PACKAGE}.triton_kernels"
    if name == PACKAGE:
        circle = LEVELS.index(TOP.get(level, level)) <= LEVELS.index(TOP["__init__"])
        return f"{level} must not import the whole package, which imports {level}" if circle else None
    if top == PACKAGE and rest.split(".")[0] not in allowed:
        return f"{level} must not import {name}"
    return None


@files
def test_imports_come_from_below(path):
    offences = {name: offence(level_of(path), name) for name in imported(path)}
    assert {name: what for name, what in offences.items() if what} == {}


@pytest.mark.parametrize(
    ("level", "name", "wrong"),
    [
        ("core", f"{PACKAGE}.core.env", False),
        ("core", f"{PACKAGE}.ops", True),
        ("ops", f"{PACKAGE}.triton_kernels.basis_conv2d", False),
        ("ops", "triton_kernels", True),
        ("layers", f"{PACKAGE}.compression.model.compress", True),
        ("demo", "bench", True),
        ("demo", ".data", True),
        ("core", PACKAGE, True),
        ("compression", PACKAGE, True),
        ("__init__", PACKAGE, True),
        ("diagnostics", PACKAGE, False),
        ("cli", PACKAGE, False),
        ("cli", "torch", False),
    ],
)
def test_the_rule_itself(level, name, wrong):
    assert bool(offence(level, name)) == wrong


@files
def test_ops_do_not_import_each_other(path):
    if path.stem in OPS:
        others = [
            n for n in imported(path) if level_of(path) in n.split(".") and set(n.split(".")) & set(OPS) - {path.stem}
        ]
        assert others == [], "what two ops share moves down a level"


@files
def test_only_one_file_reads_the_environment(path):
    if readable(path) == f"{PACKAGE}/core/env.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
            assert node.attr not in ("environ", "getenv", "environb", "putenv"), f"line {node.lineno}: ask core.env"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"line {node.lineno}: ask core.env"


@files
def test_no_assert_and_no_print(path):
    speaks = level_of(path) in ("cli", "demo", "__main__", "assets")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise a named error; python -O drops asserts"
        if isinstance(node, ast.Call) and not speaks:
            assert getattr(node.func, "id", "") != "print", f"line {node.lineno}: use core.log"


def cpp_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


TORCH = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11)', re.MULTILINE)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
# Which folders of csrc a folder's files may include.
BELOW = {
    "common": {"common"},
    "ops": {"common", "ops"},
    "cpu": {"common", "ops", "cpu"},
    "cuda": {"common", "ops", "cuda"},
    "python": set(),
}


@pytest.mark.parametrize("path", cpp_files(), ids=readable)
def test_torch_headers_live_in_the_glue_alone(path):
    glue = path.parent == ROOT / "csrc" / "ops" and (path.suffix == ".cpp" or path.stem.endswith("_glue"))
    assert glue or not TORCH.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", cpp_files(), ids=readable)
def test_python_is_seen_in_one_folder_alone(path):
    assert path.parent == ROOT / "csrc" / "python" or "Python.h" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", cpp_files(), ids=readable)
def test_includes_come_from_below(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    # The glue of an op calls its kernels through the headers of every device.
    allowed = {*BELOW, folder} if folder == "ops" and path.suffix == ".cpp" else BELOW.get(folder, set(BELOW))
    for include in INCLUDE.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / include).resolve()
        assert target.is_relative_to(ROOT / "csrc"), f"{include} lies outside csrc"
        assert target.relative_to(ROOT / "csrc").parts[0] in allowed, f"{folder} must not include {include}"


def test_importing_the_package_loads_nothing_optional():
    program = (
        "import sys, torch.utils.flop_counter; before = set(sys.modules); "  # torch itself may load Triton
        "import basisconv_kernels, basisconv_kernels.testing; "
        f"print(*sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {set(OPTIONAL)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("BASISCONV_LOG", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""
