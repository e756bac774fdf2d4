"""Names of devices, facts of this machine, and what worker processes are started with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from bench.harness import engines, machine, memory
from bench.harness.paths import ROOT


@pytest.mark.parametrize(
    ("cpu", "folder"),
    [
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14-96-core-processor"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "intel-xeon-platinum-8488c-cpu"),
        ("Intel(R) Core(TM) i7-1185G7", "intel-core-i7-1185g7"),
        ("", "unknown-cpu"),
    ],
)
def test_slug(cpu: str, folder: str) -> None:
    assert machine.slug(cpu) == folder


def test_a_hidden_model_is_told_apart_by_its_numbers() -> None:
    found = machine.results_folder({"cpu": "Intel(R) Xeon(R) Processor", "family": "6-143"})
    assert found.name == "intel-xeon-processor-6-143"
    assert machine.results_folder({"cpu": "AMD EPYC 7B13", "family": "25-1"}).name == "amd-epyc-7b13"


def test_context_states_device_versions_and_environment() -> None:
    environment = engines.timing_environment(2)
    found = machine.context(2, environment)
    assert found["threads"] == 2
    assert found["device"]["cpu"]
    assert found["versions"]["torch"]
    assert set(found["git"]) == {"commit", "dirty"}
    assert found["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["environment"]["MALLOC_MMAP_THRESHOLD_"] == found["environment"]["MALLOC_TRIM_THRESHOLD_"]


def test_foreign_engines_and_the_worker_do_not_load_pytorch() -> None:
    code = "import sys, bench.harness.worker, bench.harness.engines\n"
    for module in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(module) is not None:
            code += f"import bench.harness.engine_{module}\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_peak_memory_sees_what_a_call_touches() -> None:
    size = 64 * 2**20
    found = memory.added_by(lambda: bytes(b"x" * size))
    if "unsupported" in found:
        pytest.skip(found["unsupported"])
    assert size * 0.9 <= found["added_bytes"] <= size * 1.5
    assert memory.added_by(lambda: None)["added_bytes"] < size * 0.1
