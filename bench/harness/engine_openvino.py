"""OpenVINO's CPU plugin, in the precision of the case. No PyTorch in this process."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import openvino

from bench.harness.case import PLAIN
from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Array, Files, Method

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def to_bfloat16(values: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """The upper half of each float32, rounded to nearest even; no NaN expected."""
    words = values.view(np.uint32)
    half = np.uint32(16)
    odd = (words >> half) & np.uint32(1)
    rounded: np.ndarray[tuple[int, ...], np.dtype[np.uint16]] = (words + np.uint32(0x7FFF) + odd >> half).astype(
        np.uint16
    )
    return rounded


def from_bfloat16(words: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> Array:
    """float32 with the same value."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


class OpenVino:
    """Compiled models whose input and output already have the precision and the layout that is measured."""

    def __init__(self) -> None:
        self.core = openvino.Core()

    def _compile(self, path: Path, dtype: str, layout: str, maps: bool) -> openvino.CompiledModel:
        process = openvino.preprocess.PrePostProcessor(self.core.read_model(str(path)))
        element = openvino.Type.bf16 if dtype == "bfloat16" else openvino.Type.f32
        for side, is_map in ((process.input(), True), (process.output(), maps)):
            side.tensor().set_element_type(element)
            if layout == "channels_last" and is_map:
                side.tensor().set_layout(openvino.Layout("NHWC"))
                side.model().set_layout(openvino.Layout("NCHW"))
        settings = {
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "ENABLE_CPU_PINNING": False,
        }
        return self.core.compile_model(process.build(), "CPU", settings)

    def _method(self, form: str, path: Path, dtype: str, layout: str, x: Array) -> Method:
        last = layout == "channels_last"
        maps = self.core.read_model(str(path)).output().get_partial_shape().rank.get_length() == 4
        request = self._compile(path, dtype, layout, maps).create_infer_request()
        values = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x
        if dtype == "bfloat16":
            given = openvino.Tensor(openvino.Type.bf16, openvino.Shape(values.shape))
            given.data.view(np.uint16)[...] = to_bfloat16(values)
        else:
            given = openvino.Tensor(values)
        request.set_input_tensor(given)

        def output() -> list[Array]:
            request.infer(share_outputs=True)
            made = request.get_output_tensor().data
            made = from_bfloat16(made.view(np.uint16)) if dtype == "bfloat16" else made.copy()
            return [np.ascontiguousarray(made.transpose(0, 3, 1, 2)) if last and maps else made]

        return Method(form, layout, functools.partial(request.infer, share_outputs=True), output, HINTS[dtype])

    def prepare(self, files: Files) -> list[Method]:
        """Dense and two-step, in both layouts."""
        about = files.about
        if about["dtype"] not in HINTS:
            raise UnsupportedError(f"no {about['dtype']} precision on the CPU")
        if about["kind"] == "training":
            raise UnsupportedError("inference only")
        forms = [form for form in about["forms"] if form in PLAIN]
        if not forms:
            raise UnsupportedError("this case has no plain form")
        if not all((files.folder / f"{form}.onnx").exists() for form in forms):
            raise UnsupportedError("needs the onnx package")
        x = np.load(files.folder / "input.npy")
        layouts = ("channels_last", "nchw") if x.ndim == 4 else ("nchw",)
        return [
            self._method(form, files.folder / f"{form}.onnx", about["dtype"], layout, x)
            for form in forms
            for layout in layouts
        ]
