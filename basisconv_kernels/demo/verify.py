"""The proof that a saved file holds the whole network: a new process loads it and must predict the same.

``python -m basisconv_kernels.demo.verify REQUEST.json`` prints one JSON object and exits with 0 if every prediction of
every file is the same, with 1 otherwise. ``verify`` writes the request, starts the process and reads the answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from basisconv_kernels.compression.files import load
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.named import first_line
from basisconv_kernels.core.errors import FileFormatError
from basisconv_kernels.demo import measure, models
from basisconv_kernels.demo.data import Split
from basisconv_kernels.demo.inference import channels_last, inference_form
from basisconv_kernels.diagnostics import PACKAGE

TIMEOUT = 900  # seconds; the process reads a file and predicts once


@dataclass(frozen=True)
class Task:
    """How to build the network and which images to predict; the same in both processes.

    Attributes:
        data, network: names as in ``models``.
        test_images: the first so many of the test images.
        batch_size: images a batch.
    """

    data: str
    network: str
    test_images: int
    batch_size: int


def verify(task: Task, expected: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Load files in a new process and compare what the networks in them say with the logits given.

    Args:
        task (Task): what to build and to predict.
        expected: {file name: logits [N, classes] before it was saved}.
        folder (Path): where the files are.

    Returns:
        dict: ``passed`` (bool), ``process`` (its id), ``files``: {name: {``passed``, ``images``, ``different``,
        ``largest_difference``, ``bit_identical``, ``error``}}.

    Raises:
        RuntimeError: the process gave no answer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        logits, request = Path(temporary, "logits.safetensors"), Path(temporary, "request.json")
        safetensors.torch.save_file({name: values.clone() for name, values in expected.items()}, logits)
        request.write_text(
            json.dumps({"task": asdict(task), "folder": str(folder.resolve()), "logits": str(logits)}), "utf-8"
        )
        done = subprocess.run(
            [sys.executable, "-m", "basisconv_kernels.demo.verify", str(request)],
            cwd=PACKAGE.parent,  # a plain checkout is found there
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"verify: the new process ended with exit code {done.returncode}: {reason}") from error
    return answer


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the new process finds; ``request`` as ``verify`` writes it."""
    task = Task(**request["task"])
    images = models.DATA[task.data]()
    split = Split(images.test.images[: task.test_images], images.test.labels[: task.test_images])
    example = channels_last(images.normalise(split.images[: task.batch_size]))
    files = {}
    for name, expected in safetensors.torch.load_file(request["logits"]).items():
        network = models.build(task.network, split.images.shape[1])
        try:
            network = load(Path(request["folder"], name), network).eval()
        except (FileFormatError, OSError, ValueError) as error:
            files[name] = {"passed": False, "images": len(split.labels), "error": first_line(error)}
            continue
        folded = inference_form(fold_batchnorm(network, example)[0], example)
        files[name] = compare(measure.predict(folded, images, split, task.batch_size), expected)
    return {"passed": all(entry["passed"] for entry in files.values()), "process": os.getpid(), "files": files}


def compare(logits: Tensor, expected: Tensor) -> dict[str, Any]:
    """Two sets of logits [N, classes]: how many images get another class, and how far the numbers lie apart."""
    if logits.shape != expected.shape:
        shapes = f"{list(logits.shape)} logits where {list(expected.shape)} were expected"
        return {"passed": False, "images": len(logits), "error": shapes}
    different = int((logits.argmax(1) != expected.argmax(1)).sum())
    return {
        "passed": different == 0,
        "images": len(expected),
        "different": different,
        "largest_difference": float((logits - expected).abs().max()),
        "bit_identical": bool((logits == expected).all()),
        "error": None,
    }


def main(arguments: list[str]) -> int:
    """The new process."""
    found = answer(json.loads(Path(arguments[0]).read_text("utf-8")))
    print(json.dumps(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
