"""The current stream of torch: looked up in the library that torch has loaded, or refused by name.

torch loads its CUDA libraries without putting their names in common, so a symbol that the native library declares
stays empty there. Each case is a fresh process with libraries of its own, and no torch at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What cuda_stream.cpp is called by here: the stream as a number, or the message of what it raised.
CALLED = """
#include <cstdint>
#include <cstdio>
#include <exception>
namespace basisconv { void* current_cuda_stream(int32_t device); }
extern "C" int64_t stream_of(int32_t device, char* message, int size) {
  try {
    return reinterpret_cast<int64_t>(basisconv::current_cuda_stream(device));
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return -1;
  }
}
"""
# Libraries in the place of torch's: one with the function, which fails for device 7, and one without it.
WHOLE = """
#include <cstdint>
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(int64_t{1000} + device);
  return device == 7;
}
"""
EMPTY = "int nothing_of_torch;"
ASK = """
import ctypes, os, sys
ours, theirs = sys.argv[1:]
if theirs:
    ctypes.CDLL(theirs, mode=os.RTLD_LOCAL | os.RTLD_NOW)
stream_of = ctypes.CDLL(ours, mode=os.RTLD_LOCAL | os.RTLD_NOW).stream_of
stream_of.restype = ctypes.c_int64
for device in (0, 3, 7):
    message = ctypes.create_string_buffer(1000)
    print(device, stream_of(device, message, 1000), message.value.decode().replace(chr(10), " "))
"""
NO_FUNCTION = "no aoti_torch_get_current_cuda_stream in libtorch_cuda.so; is this torch built with CUDA?"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The three libraries: ours, and the two that play torch's."""
    if sys.platform != "linux":
        pytest.skip("torch has CUDA builds for Linux")
    torch_headers = pytest.importorskip("torch.utils.cpp_extension").include_paths()
    folder = tmp_path_factory.mktemp("stream")
    found = {}
    for name, text, more in (
        ("ours", CALLED, [str(ROOT / "csrc/ops/cuda_stream.cpp"), *(f"-I{path}" for path in torch_headers)]),
        ("whole", WHOLE, ["-Wl,-soname,libtorch_cuda.so"]),
        ("empty", EMPTY, ["-Wl,-soname,libtorch_cuda.so"]),
    ):
        made = folder / name / ("libours.so" if name == "ours" else "libtorch_cuda.so")
        made.parent.mkdir()
        source = folder / f"{name}.cpp"
        source.write_text(text, encoding="utf-8")
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command = [os.environ.get("CXX") or "c++", *options, str(source), *more, "-ldl", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = made
    return found


def asked(ours: Path, theirs: Path | None, **environment: str) -> list[str]:
    """The lines of a fresh process, in which torch's library is loaded or not."""
    command = [sys.executable, "-c", ASK, str(ours), str(theirs or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_is_found_in_a_library_whose_names_are_local(compiled: Any) -> None:
    zero, three, failed = asked(compiled["ours"], compiled["whole"])
    assert (zero.strip(), three.strip()) == ("0 1000", "3 1003")
    assert failed.startswith("7 -1 ")
    assert "torch has no current CUDA stream" in failed


@pytest.mark.parametrize("theirs", ["empty", None])
def test_where_it_is_missing_the_error_says_so(compiled: Any, theirs: str | None) -> None:
    """Also on the second call; and no library is loaded that torch has not loaded itself."""
    on_the_path = {"LD_LIBRARY_PATH": str(compiled["whole"].parent)}
    lines = asked(compiled["ours"], theirs and compiled[theirs], **on_the_path)
    assert [line.split()[1] for line in lines] == ["-1"] * 3
    assert all(NO_FUNCTION in line for line in lines)
