"""ONNX Runtime's 8-bit convolution, codes in and out. No PyTorch in this process."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime

from bench.harness.engine_onnxruntime import session_of
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Array, Files, Method


class OnnxRuntimeInt8:
    """QLinearConv with input and output bound to memory that stays."""

    def prepare(self, files: Files) -> list[Method]:
        """The int8 form."""
        if "int8" not in files.about["forms"]:
            raise UnsupportedError("this case has no int8 form")
        path = files.folder / "int8.onnx"
        if not path.exists():
            raise UnsupportedError("needs the onnx package")
        steps = json.loads((files.folder / "int8.json").read_text())
        session = session_of(str(path))
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(np.load(files.folder / "codes.npy")))
        shape = session.get_outputs()[0].shape
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8)
        binding.bind_ortvalue_output("y", made)

        def run() -> None:
            session.run_with_iobinding(binding)

        def output() -> list[Array]:
            run()
            return [((made.numpy().astype(np.float32) - steps["centre"]) * steps["output_step"]).astype(np.float32)]

        return [Method("int8", "nchw", run, output, "QLinearConv")]
