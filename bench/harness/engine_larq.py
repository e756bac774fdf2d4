"""Larq Compute Engine with indirect BGEMM, in an environment of its own: it needs TensorFlow, and no PyTorch.

python -m venv larq
larq/bin/pip install larq larq-compute-engine 'tensorflow-cpu==2.16.*' 'tf_keras==2.16.*' 'numpy<2'
BASISCONV_LARQ_PYTHON=larq/bin/python python -m bench run --suite C7
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # Larq's layers are of Keras 2

import larq
import larq_compute_engine
import numpy as np
import tensorflow as tf
from larq_compute_engine.tflite.python.interpreter import Interpreter

from bench.harness.errors import UnsupportedError
from bench.harness.protocol import Array, Files, Method


class Larq:
    """QuantConv2D converted to a flat buffer: signs of the input, packing, convolution and float results in a call.

    Its interpreter takes batches image by image, so the model is one of a single image.
    """

    def prepare(self, files: Files) -> list[Method]:
        """The binary form."""
        about = files.about
        if "binary" not in about["forms"]:
            raise UnsupportedError("this case has no binary form")
        if about["padding"] != 1:
            raise UnsupportedError("3×3 with padding 1 only")
        x = np.ascontiguousarray(np.load(files.folder / "input.npy").transpose(0, 2, 3, 1))
        filters = np.load(files.folder / "filters.npy")
        runner = Interpreter(
            self._converted(x, filters), num_threads=int(os.environ["OMP_NUM_THREADS"]), use_indirect_bgemm=True
        )

        def output() -> list[Array]:
            return [np.ascontiguousarray(runner.predict(x).transpose(0, 3, 1, 2))]

        version = larq_compute_engine.__version__
        return [Method("binary", "channels_last", lambda: runner.predict(x), output, f"{version}, indirect BGEMM")]

    def _converted(self, x: Array, filters: Array) -> Any:
        shape = x.shape[1:]
        model = tf.keras.Sequential(
            [
                tf.keras.layers.Input(shape, batch_size=1),
                larq.layers.QuantConv2D(
                    len(filters), filters.shape[2:], padding="same", pad_values=0, input_quantizer="ste_sign",
                    kernel_quantizer="ste_sign", use_bias=False,
                ),
            ]
        )  # fmt: skip
        model.layers[-1].set_weights([filters.transpose(2, 3, 1, 0)])
        return larq_compute_engine.convert_keras_model(
            model, inference_input_type=tf.float32, inference_output_type=tf.float32
        )
