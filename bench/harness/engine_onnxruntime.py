"""ONNX Runtime's CPU provider. No PyTorch in this process."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import onnxruntime

from bench.harness.case import PLAIN
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Array, Files, Method


def session_of(path: str) -> onnxruntime.InferenceSession:
    """A session with every graph optimisation, whose threads wait without spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OnnxRuntime:
    """Sessions with every graph optimisation and outputs bound to memory that stays."""

    def _method(self, form: str, session: onnxruntime.InferenceSession, x: Array) -> Method:
        binding = session.io_binding()
        given = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        binding.bind_ortvalue_input("x", given)
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(session.get_outputs()[0].shape, np.float32)
        binding.bind_ortvalue_output("y", made)

        def output() -> list[Array]:
            session.run_with_iobinding(binding)
            return [made.numpy().copy()]

        call: Callable[[], object] = lambda: session.run_with_iobinding(binding)  # noqa: E731 - as short as the call
        return Method(form, "nchw", call, output)

    def prepare(self, files: Files) -> list[Method]:
        """Dense and two-step in float32."""
        about = files.about
        if about["dtype"] != "float32":
            raise UnsupportedError(f"no {about['dtype']} convolution on the CPU")
        if about["kind"] == "training":
            raise UnsupportedError("inference only")
        found = [(form, files.folder / f"{form}.onnx") for form in about["forms"] if form in PLAIN]
        if not all(path.exists() for _, path in found):
            raise UnsupportedError("needs the onnx package")
        if not found:
            raise UnsupportedError("this case has no plain form")
        x = np.load(files.folder / "input.npy")
        return [self._method(form, session_of(str(path)), x) for form, path in found]
