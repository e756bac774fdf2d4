"""The new-process check must fail when a file is not what was saved."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import fold_batchnorm, load, save
from basisconv_kernels.__main__ import main
from basisconv_kernels.demo import measure, models, run, summary, verify
from basisconv_kernels.demo.data import Split
from basisconv_kernels.demo.inference import channels_last, inference_form
from basisconv_kernels.demo.verify import Task, compare

IMAGES, BATCH = 64, 32


def test_a_changed_file_is_noticed(quick_run, tmp_path):
    """Three files in one process: the untouched one, one with a flipped bit, one with other weights."""
    source = quick_run.folder / quick_run.results["levels"][0]["file"]
    content = source.read_bytes()
    (tmp_path / "same").write_bytes(content)
    (tmp_path / "flipped").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    network = load(source, models.build("small-vgg", 1))
    with torch.no_grad():
        network.classifier.weight.neg_()
    save(network, tmp_path / "other")
    task = Task("fashion-mnist", "small-vgg", IMAGES, BATCH)
    logits = _logits(tmp_path / "same", task)
    found = verify.verify(task, dict.fromkeys(("same", "flipped", "other"), logits), tmp_path)
    assert found["passed"] is False
    assert found["files"]["same"]["passed"] is True
    assert found["files"]["same"]["bit_identical"] is True
    assert found["files"]["flipped"]["passed"] is False
    assert "truncated or edited" in found["files"]["flipped"]["error"]
    assert found["files"]["other"]["passed"] is False
    assert found["files"]["other"]["different"] > 0


def _logits(file, task):
    """What the network in a file says, in this process."""
    data = models.DATA[task.data]()
    split = Split(data.test.images[: task.test_images], data.test.labels[: task.test_images])
    example = channels_last(data.normalise(split.images[: task.batch_size]))
    network = load(file, models.build(task.network, 1)).eval()
    return measure.predict(inference_form(fold_batchnorm(network, example)[0], example), data, split, task.batch_size)


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        verify.verify(Task("fashion-mnist", "small-vgg", IMAGES, BATCH), {"a": torch.zeros(2, 10)}, tmp_path)


def test_compare():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert compare(logits, logits)["bit_identical"] is True
    near = compare(logits + 1e-6, logits)
    assert (near["passed"], near["bit_identical"]) == (True, False)
    far = compare(logits.flip(1), logits)
    assert (far["passed"], far["different"]) == (False, 2)
    assert "were expected" in compare(logits[:1], logits)["error"]


def test_the_command_fails_when_verification_does(quick_run, monkeypatch, capsys, tmp_path):
    failed = {**quick_run.results, "verification": {"passed": False, "process": 1}}
    failed["levels"] = [
        {**level, "verification": {"passed": False, "images": 1, "error": "edited"}} for level in failed["levels"]
    ]
    monkeypatch.setattr(run, "run_demo", lambda settings: failed)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "VERIFICATION FAILED" in captured.out
    assert "predicted otherwise" in captured.err
    assert "edited" in " ".join(summary.conclusions(failed))
