"""Training whose images and whole step stay on the device: on a GPU one CUDA graph a step, elsewhere the same eagerly.

Small networks are bound by the launches of their many small kernels; a graph of the whole step is launched once. What
a step needs of chance, the order of the images, their shifts and mirrorings, is drawn and done for an epoch at a time;
the step counts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from basisconv_kernels.compression.basis import orthogonality_loss

CHUNK = 8192  # images that are shifted at once: their indices take eight times their pixels
WARM_UP = 3  # steps before a capture, undone afterwards
MOMENTUM, DECAY = 0.9, 5e-4  # of SGD
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
TEMPERATURE = 4.0  # at which the answers of a teacher are compared


class DeviceImages:
    """uint8 images [N, C, H, W] and labels on a device, and what augments and normalises them.

    Args:
        images, labels: of a split, on any device.
        mean, std: of the normalisation, by channel.
        crop: pixels of zeros around an image, and of the largest shift.
        device: where they shall lie.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], crop: int, device: str
    ) -> None:
        self.size = images.shape[2]
        self.crop, self.device = crop, torch.device(device)
        padded = nn.functional.pad(images.to(device), (crop,) * 4).permute(0, 2, 3, 1)
        self.pixels = padded.reshape(-1, images.shape[1]).contiguous()  # a row a pixel
        self.labels = labels.to(device)
        self.factor = 1 / (torch.tensor(std, device=device) * 255)
        self.offset = -255 * torch.tensor(mean, device=device) * self.factor
        self.range = torch.arange(self.size, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def shifted(self, chosen: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Images [B, H, W, C], still uint8, of the indices ``chosen`` [B].

        Args:
            top, left: shift in pixels, 0..2·crop; ``crop`` is none.
            flip: whether to mirror, bool.
        """
        size, wide = self.size, self.size + 2 * self.crop
        columns = torch.where(flip[:, None], size - 1 - self.range, self.range) + left[:, None]
        rows = (chosen * wide + top)[:, None] + self.range
        index = (rows * wide)[:, :, None] + columns[:, None, :]
        return self.pixels.index_select(0, index.flatten()).view(len(chosen), size, size, -1)

    def normalised(self, images: Tensor) -> Tensor:
        """[B, H, W, C] as uint8 → [B, C, H, W] as float32, channels_last."""
        return torch.addcmul(self.offset, images.float(), self.factor).permute(0, 3, 1, 2)

    def plain(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A normalised batch and its labels, neither shifted nor mirrored."""
        shift = torch.full_like(chosen, self.crop)
        images = self.shifted(chosen, shift, shift, torch.zeros_like(chosen, dtype=torch.bool))
        return self.normalised(images), self.labels.index_select(0, chosen)


class Epoch(NamedTuple):
    """The augmented images of an epoch [steps, B, H, W, C], uint8, and their labels [steps, B]."""

    images: Tensor
    labels: Tensor


def draw(images: DeviceImages, batch: int, steps: int, generator: torch.Generator) -> Epoch:
    """An epoch of ``steps`` batches without images twice; chance is drawn on the CPU, the same for every device."""
    count = steps * batch
    order = torch.randperm(len(images), generator=generator)[:count]
    shifts = torch.randint(0, 2 * images.crop + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    drawn = [part.to(images.device) for part in (order, shifts[0], shifts[1], flip)]
    parts = [images.shifted(*few) for few in zip(*(part.split(CHUNK) for part in drawn), strict=True)]
    made = torch.cat(parts)
    return Epoch(made.view(steps, batch, *made.shape[1:]), images.labels[drawn[0]].view(steps, batch))


class Sums(NamedTuple):
    """Of an epoch: means of loss and of the orthogonality loss, share of right answers while training."""

    loss: float
    orthogonality: float
    accuracy: float


class Trainer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, or Adam without decay, on the parameters given.

    Args:
        model: the network, on the device of ``images``; trained in place, in the mode it is in at the first epoch.
        parameters: what is trained.
        images: the training split.
        batch: images a step.
        rates: learning rate of each step of the whole training.
        optimizer: ``"sgd"`` or ``"adam"``.
        orthogonality: weight of that loss of trained bases.
        autocast: dtype of the network's arithmetic, or None.
        graph: capture the step; needs a GPU.
        after: called after each update, within the step: what holds weights in bounds.
        teacher: a network whose answers to the same images are learned too; it stays as it is.
        distill: weight of that, the labels have the rest; 0 without a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        images: DeviceImages,
        *,
        batch: int,
        rates: Sequence[float],
        optimizer: str = "sgd",
        orthogonality: float = 0.0,
        autocast: torch.dtype | None = torch.bfloat16,
        graph: bool = True,
        after: Callable[[], None] | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
    ) -> None:
        self.model, self.parameters, self.images, self.batch = model, list(parameters), images, batch
        self.weight, self.dtype, self.after = orthogonality, autocast, after
        self.teacher, self.distill = teacher, distill
        place = images.device
        self.rates = torch.tensor([*rates, *(0.0,) * WARM_UP], dtype=torch.float32, device=place)
        self.state = [torch.zeros_like(p) for p in self.parameters for _ in range(1 if optimizer == "sgd" else 2)]
        self.update = self._sgd if optimizer == "sgd" else self._adam
        self.steps = len(images) // batch
        self.done = torch.zeros(1, dtype=torch.int64, device=place)  # steps of all epochs
        self.at = torch.zeros(1, dtype=torch.int64, device=place)  # of this one
        self.sums = torch.zeros(3, device=place)
        self.plan: Epoch | None = None
        self.captured: torch.cuda.CUDAGraph | None = None
        self.graph = graph and place.type == "cuda"

    def epoch(self, generator: torch.Generator, steps: int | None = None) -> Sums:
        """One epoch of at most ``steps`` steps in an order that the generator draws.

        Raises:
            FloatingPointError: the loss is no longer a finite number.
        """
        count = self.steps if steps is None else min(steps, self.steps)
        plan = draw(self.images, self.batch, count, generator)
        if self.plan is None or self.plan.labels.shape != plan.labels.shape:
            self.plan, self.captured = plan, None
        else:
            for held, drawn in zip(self.plan, plan, strict=True):
                held.copy_(drawn)
        if self.graph and self.captured is None:
            self._capture()
        self.at.zero_()
        self.sums.zero_()
        for _ in range(count):
            if self.captured is not None:
                self.captured.replay()
            else:
                self._step()
        # A replayed graph writes unseen by PyTorch; what layers remember of their weights must not outlive them.
        torch.autograd.graph.increment_version([*self.model.parameters(), *self.model.buffers()])
        loss, extra, right = (float(value) for value in self.sums.cpu())
        if not loss - loss == 0:  # infinite or no number
            raise FloatingPointError(f"experiments: the loss became {loss}; lower the learning rate")
        return Sums(loss / count, extra / count, right / (count * self.batch))

    def _step(self) -> None:
        assert self.plan is not None
        images = self.images.normalised(self.plan.images.index_select(0, self.at)[0])
        labels = self.plan.labels.index_select(0, self.at)[0]
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.model(images)
            loss = nn.functional.cross_entropy(outputs, labels)
        learned = loss if self.teacher is None else self._taught(self.teacher, images, outputs, loss)
        extra = orthogonality_loss(self.model) if self.weight else torch.zeros_like(loss)
        (learned + self.weight * extra if self.weight else learned).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.update(self.rates.index_select(0, self.done)[0])
            right = (outputs.argmax(1) == labels).sum()
            self.sums += torch.stack([loss.detach(), extra.detach(), right.to(loss.dtype)])
            self.at += 1
            self.done += 1
            if self.after is not None:
                self.after()

    def _taught(self, teacher: nn.Module, images: Tensor, outputs: Tensor, loss: Tensor) -> Tensor:
        """The loss of Hinton, Vinyals, Dean 2015: softened answers of the teacher beside the labels."""
        with torch.no_grad(), torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype is not None):
            answers = teacher(images)
        ours, theirs = (torch.log_softmax(logits.float() / TEMPERATURE, dim=1) for logits in (outputs, answers))
        distance = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - self.distill) * loss + self.distill * TEMPERATURE**2 * distance

    def _sgd(self, rate: Tensor) -> None:
        """As ``torch.optim.SGD`` does it, with a rate that lies on the device."""
        gradients = self._gradients()
        torch._foreach_add_(gradients, self.parameters, alpha=DECAY)
        torch._foreach_mul_(self.state, MOMENTUM)
        torch._foreach_add_(self.state, gradients)
        torch._foreach_add_(gradients, self.state, alpha=MOMENTUM)
        torch._foreach_mul_(gradients, rate)
        torch._foreach_sub_(self.parameters, gradients)

    def _adam(self, rate: Tensor) -> None:
        """As ``torch.optim.Adam`` does it, with rate and count of the steps on the device."""
        gradients, mean, square = self._gradients(), self.state[::2], self.state[1::2]
        count = (self.done + 1).to(rate.dtype)[0]
        torch._foreach_lerp_(mean, gradients, 1 - BETAS[0])
        torch._foreach_mul_(square, BETAS[1])
        torch._foreach_addcmul_(square, gradients, gradients, 1 - BETAS[1])
        below = torch._foreach_sqrt(square)
        torch._foreach_div_(below, (1 - BETAS[1] ** count).sqrt())
        torch._foreach_add_(below, EPSILON)
        change = torch._foreach_div(mean, below)
        torch._foreach_mul_(change, rate / (1 - BETAS[0] ** count))
        torch._foreach_sub_(self.parameters, change)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def _capture(self) -> None:
        """Capture a step, or train eagerly where it cannot be; what the steps that warm up change is put back."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        held = [value.clone() for value in (*self.state, self.done)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.at.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None
        graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            print(f"experiments: the step is not captured, {str(error).splitlines()[0]}", flush=True)
            graph, self.graph = None, False
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(kept[name])
            for value, old in zip((*self.state, self.done), held, strict=True):
                value.copy_(old)
        self.captured = graph
