"""Compressed networks without Python, and in ONNX Runtime."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import basisconv_kernels as bk
from basisconv_kernels.core import registry

ROOT = Path(__file__).parents[2]
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
METHODS = {
    "0": bk.BasisConfig(fraction=0.3, keep_dense="never"),
    "3": bk.TuckerConfig(fraction=0.5, keep_dense="never"),
    "5": bk.TernaryConfig(method="twn"),
    "7": bk.StackedBinaryConfig(splits=2, bank=0.5),
}


def network() -> nn.Module:
    """A layer of every method, one of them grouped, one strided."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.Flatten(),
        nn.Linear(32 * 49, 5),
    ).eval()  # fmt: skip
    return bk.freeze_bits(bk.compress(dense, METHODS, example_inputs=IMAGE)[0]).eval()


def test_onnx_runtime_gives_the_outputs_of_the_compressed_network():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    small = network()
    kinds = {type(module).__name__ for module in small}
    assert {"BasisConv2d", "TuckerConv2d", "TernaryConv2d", "StackedBinaryConv2d"} <= kinds
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the other exporter needs onnxscript
        torch.onnx.export(
            bk.to_plain(small), (IMAGE,), file, dynamo=False, input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
        )  # fmt: skip
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for image in (IMAGE, torch.cat([IMAGE, -IMAGE, IMAGE.flip(3)])):
        (found,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, small(image).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("configs", [dict, bk.inductor_configs], ids=["through torch", "directly"])
def test_a_program_without_python_runs_the_native_kernels(configs, tmp_path):
    """Export, compile ahead of time, and run from C++ in an environment that has no Python."""
    small = network()
    with torch.no_grad():
        program = torch.export.export(small, (IMAGE,))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "network.pt2"), inductor_configs=configs()
        )
        expected = small(IMAGE)
    called = {str(node.target).partition(".default")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert {"basisconv.basis_conv2d", "basisconv.ternary_conv2d", "basisconv.stacked_binary_conv2d"} <= called
    built = tmp_path / "serve"
    torch_root = Path(torch.__file__).parent
    subprocess.run(
        [
            "g++", "-std=c++20", "-O1", str(ROOT / "examples/serve.cpp"), "-o", str(built),
            f"-I{torch_root}/include", f"-I{torch_root}/include/torch/csrc/api/include", f"-L{torch_root}/lib",
            f"-Wl,-rpath,{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
        ],
        check=True,
    )  # fmt: skip
    shape = struct.pack("<5q", 4, *IMAGE.shape)
    (tmp_path / "input").write_bytes(shape + IMAGE.numpy().tobytes())
    library = next((ROOT / "basisconv_kernels").glob("_C*.so"))
    files = [str(tmp_path / name) for name in ("input", "output")]
    done = subprocess.run(
        [str(built), str(tmp_path / "network.pt2"), str(library), *files, "3"],
        env={"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ms a call" in done.stdout
    linked = subprocess.run(
        ["ldd", str(built)], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}
    ).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked
    content = (tmp_path / "output").read_bytes()
    assert struct.unpack("<3q", content[:24]) == (2, *expected.shape)
    found = torch.frombuffer(bytearray(content[24:]), dtype=torch.float32).view(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    missing = subprocess.run([str(built), "none.pt2", "none.so", "a", "b"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "none.so" in missing.stderr
