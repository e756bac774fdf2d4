"""Training on the device: what it shows and steps is what loader and optimisers of PyTorch make; jobs side by side."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

from basisconv_kernels.demo import data
from basisconv_kernels.demo.networks import SmallVGG
from bench.experiments import graphed, schedule, setting
from bench.experiments.schedule import Job

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return data.Split(pixels, torch.randint(10, (20,), generator=generator))


@pytest.fixture
def resident(images):
    return graphed.DeviceImages(*images, MEAN, STD, 2, "cpu")


def test_images_are_normalised_as_the_loader_does_it(images, resident):
    got, labels = resident.plain(torch.tensor([3, 0, 19]))
    expected = data.ImageSet("x", images, images, MEAN, STD).normalise(images.images[[3, 0, 19]])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, images.labels[[3, 0, 19]])


def test_shifted_images_are_windows_of_the_padded_ones(images, resident):
    padded = nn.functional.pad(images.images, (2, 2, 2, 2))
    chosen, top = torch.tensor([4, 4, 7]), torch.tensor([0, 3, 4])
    left, flip = torch.tensor([1, 4, 0]), torch.tensor([False, True, True])
    got = resident.shifted(chosen, top, left, flip).permute(0, 3, 1, 2)
    for at, (image, y, x, mirrored) in enumerate(zip(chosen, top, left, flip, strict=True)):
        window = padded[image, :, y : y + 8, x : x + 8]
        assert torch.equal(got[at], window.flip(2) if mirrored else window)


def test_an_epoch_takes_no_image_twice_and_is_that_of_its_seed(monkeypatch, images, resident):
    monkeypatch.setattr(graphed, "CHUNK", 7)
    monkeypatch.setattr(resident, "labels", torch.arange(20))
    epochs = [graphed.draw(resident, 4, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert epochs[0].images.shape == (4, 4, 8, 8, 3)
    assert epochs[0].images.dtype == torch.uint8
    assert len(epochs[0].labels.unique()) == 16
    assert torch.equal(epochs[0].images, epochs[1].images)
    assert not torch.equal(epochs[0].labels, epochs[2].labels)


# Adam's first step is the sign of a gradient, whatever its size; a wrong rate would be off by a hundredth and more.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 1e-5), ("adam", 1e-3)])
def test_the_steps_are_those_of_the_optimisers_of_pytorch(resident, optimizer, tolerance):
    rates = [0.02, 0.01, 0.005, 0.002]
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(SmallVGG(3, (4, 8)).train())
    ours, theirs = networks
    trainer = graphed.Trainer(
        ours, list(ours.parameters()), resident, batch=8, rates=rates, optimizer=optimizer, autocast=None
    )
    generator = torch.Generator().manual_seed(1)
    sums = [trainer.epoch(generator) for _ in range(2)]
    if optimizer == "sgd":
        reference = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    else:
        reference = torch.optim.Adam(theirs.parameters(), lr=1.0)
    generator, losses, right = torch.Generator().manual_seed(1), [], 0
    for step, rate in enumerate(rates):
        if step % 2 == 0:
            epoch = graphed.draw(resident, 8, 2, generator)
        reference.param_groups[0]["lr"] = rate
        reference.zero_grad()
        outputs = theirs(resident.normalised(epoch.images[step % 2]))
        loss = nn.functional.cross_entropy(outputs, epoch.labels[step % 2])
        loss.backward()
        reference.step()
        losses.append(float(loss.detach()))
        right += int((outputs.argmax(1) == epoch.labels[step % 2]).sum())
    for got, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=tolerance)
    assert [s.loss for s in sums] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-3)
    assert sum(s.accuracy for s in sums) == pytest.approx(right / 16)


def test_a_teacher_s_softened_answers_are_learned_beside_the_labels(resident):
    torch.manual_seed(0)
    taught, alone = (SmallVGG(3, (4, 8)).train() for _ in range(2))
    alone.load_state_dict(taught.state_dict())
    teacher = SmallVGG(3, (4, 8)).eval().requires_grad_(False)
    before = [value.clone() for value in teacher.state_dict().values()]
    trainer = graphed.Trainer(
        taught, list(taught.parameters()), resident, batch=8, rates=[0.1], autocast=None, teacher=teacher, distill=0.75
    )
    sums = trainer.epoch(torch.Generator().manual_seed(1), 1)
    assert all(map(torch.equal, teacher.state_dict().values(), before))
    epoch = graphed.draw(resident, 8, 1, torch.Generator().manual_seed(1))
    images, labels = resident.normalised(epoch.images[0]), epoch.labels[0]
    outputs, softened = alone(images), (teacher(images) / 4).softmax(1)
    distance = (softened * (softened.log() - (outputs / 4).log_softmax(1))).sum(1).mean()
    loss = nn.functional.cross_entropy(outputs, labels)
    (0.25 * loss + 0.75 * 16 * distance).backward()
    torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True).step()
    for got, expected in zip(taught.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert sums.loss == pytest.approx(float(loss.detach()), rel=1e-4)  # the labels' part alone


def test_a_loss_that_is_no_number_is_an_error(resident):
    network = SmallVGG(3, (4, 8))
    with torch.no_grad():
        network.classifier.weight.fill_(float("nan"))
    trainer = graphed.Trainer(network, list(network.parameters()), resident, batch=8, rates=[0.1] * 2)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        trainer.epoch(torch.Generator())


def test_the_loader_of_device_batches_follows_its_generator(resident):
    loader = setting.ResidentBatches(resident, 8)
    passes = []
    for seed in (5, 5, 6):
        loader.generator.manual_seed(seed)
        passes.append(list(loader))
    assert len(passes[0]) == len(loader) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(passes[0], passes[1], strict=True))
    assert not torch.equal(passes[0][0][1], passes[2][0][1])


# --- jobs -------------------------------------------------------------------------------------------------------------


def work(name: str, seed: int) -> tuple[str, int, float]:
    """What the workers of these tests do."""
    if name == "fails":
        raise ValueError("as it shall")
    if name == "dies":
        os._exit(3)
    if name == "slow":
        time.sleep(60)
    return name, seed, time.monotonic()


def test_jobs_wait_for_what_they_start_from_and_failures_reach_no_further():
    jobs = [Job("second", 0, ("first", 0)), Job("lost", 1, ("fails", 0)), Job("fails", 0, None), Job("first", 0, None)]
    found = {}
    outcome = schedule.run(jobs, work, workers=2, seconds=60, finished=lambda job, got: found.update({job.name: got}))
    assert {job.name for job in outcome.done} == {"first", "second"}
    assert found["second"][2] > found["first"][2]
    assert {job.name for job in outcome.failed} == {"fails", "lost"}
    assert "as it shall" in outcome.failed[jobs[2]]
    assert outcome.left == []


def test_a_process_that_dies_loses_its_job_alone():
    jobs = [Job("dies", 0, None), Job("quick", 0, None)]
    outcome = schedule.run(jobs, work, workers=2, seconds=120, finished=lambda job, got: None)
    assert [job.name for job in outcome.done] == ["quick"]
    assert outcome.failed == {jobs[0]: "the process died"}
    assert outcome.left == []


def test_what_is_not_done_in_time_is_ended_and_told():
    jobs = [Job("slow", 0, None), Job("never", 0, ("slow", 0))]
    began = time.monotonic()
    outcome = schedule.run(jobs, work, workers=2, seconds=3, finished=lambda job, got: None)
    assert time.monotonic() - began < 50
    assert (outcome.done, outcome.failed, outcome.left) == ([], {}, jobs)
