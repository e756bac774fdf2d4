"""Repeated calls of a ``BasisConv2d``: they go the short way, and nothing that changes is overlooked there."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from basisconv_kernels import BasisConv2d, use_backend
from basisconv_kernels.core import registry
from basisconv_kernels.layers import basis_conv2d as module
from tests.ops.planned_calls import same

pytestmark = [
    pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}"),
    pytest.mark.skipif(module.planned.plans.native is None, reason="calls have no short way here"),
    pytest.mark.usefixtures("cache", "no_gradients"),
]


def image(seed=0, size=(2, 8, 9, 7)):
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


def layer(**settings):
    """A layer that has been called twice, so that the next call can go the short way."""
    made = BasisConv2d(8, 12, 3, 5, padding=1, generator=torch.Generator().manual_seed(1), **settings).eval()
    made(image()), made(image())
    return made


def long_way(made, *inputs):
    """The result of a layer that remembers nothing."""
    return copy.deepcopy(made)(*inputs)


def test_repeated_calls_go_the_short_way_with_equal_bits(short):
    made = layer(activation="relu6", stride=2)
    short.clear()
    for seed in range(3):
        same(made(image(seed)), long_way(made, image(seed)))
    assert len(short) == 3
    assert all(out is not None for out in short)
    nchw = image().contiguous()
    same(made(nchw), long_way(made, nchw))
    other = image(size=(1, 8, 20, 3))
    same(made(other), long_way(made, other))


def test_a_residual_comes_and_goes(short):
    made = layer()
    residual = image(5, (2, 12, 9, 7))
    short.clear()
    same(made(image(), residual), long_way(made, image(), residual))
    same(made(image()), long_way(made, image()))
    assert len(short) == 2
    assert all(out is not None for out in short)


CHANGES = {
    "weight in place": lambda made: made.basis_weight.mul_(2),
    "coefficients in place": lambda made: made.coefficients.add_(1),
    "bias in place": lambda made: made.bias.add_(1),
    "weight replaced": lambda made: setattr(made, "basis_weight", made.basis_weight * 2),
    "coefficients replaced": lambda made: setattr(made, "coefficients", nn.Parameter(made.coefficients * 2)),
    "bias replaced": lambda made: setattr(made, "bias", nn.Parameter(made.bias + 1)),
    "no bias": lambda made: setattr(made, "bias", None),
    "data replaced": lambda made: setattr(made.coefficients, "data", made.coefficients.data * 2),
    "data transposed in place": lambda made: setattr(made.basis_weight, "data", made.basis_weight.data.transpose(2, 3)),
    "state loaded": lambda made: made.load_state_dict({k: v * 2 for k, v in made.state_dict().items()}),
    "state assigned": lambda made: made.load_state_dict({k: v * 2 for k, v in made.state_dict().items()}, assign=True),
    "stride": lambda made: setattr(made, "stride", (2, 1)),
    "padding": lambda made: setattr(made, "pad_amounts", (0, 0, 2, 2)),
    "padding mode": lambda made: setattr(made, "padding_mode", "circular"),
    "dilation": lambda made: setattr(made, "dilation", (2, 2)),
    "activation": lambda made: setattr(made, "activation", "relu"),
    "precise": lambda made: setattr(made, "precise", True),
    "backend": lambda made: setattr(made, "backend", "reference"),
    "norm": lambda made: setattr(made, "basis_norm", nn.BatchNorm2d(5, affine=False).eval()),
    "trained basis": lambda made: made.train_basis(),
    "by the dict": lambda made: made.__dict__.update(stride=(2, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_counts_at_once(change):
    made = layer()
    change(made)
    for _ in range(3):
        same(made(image()), long_way(made, image()))


def test_weights_of_another_dtype():
    made = layer().to(torch.bfloat16)
    with pytest.raises(TypeError):
        made(image())
    same(made(image().bfloat16()), long_way(made, image().bfloat16()))


def test_what_others_want_to_see_they_see(short):
    made = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(image()).dtype == torch.bfloat16
    with use_backend("reference"):
        same(made(image()), long_way(made, image()))
    with torch.enable_grad():
        assert made(image().requires_grad_()).requires_grad
        assert made(image()).requires_grad  # of the coefficients
        made.requires_grad_(False)
        assert not made(image()).requires_grad
        assert made(image(), image(1, (2, 12, 9, 7)).requires_grad_()).requires_grad
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(made)(image()[None])
    seen = []
    handle = made.register_forward_hook(lambda *_: seen.append(1))
    made(image())
    handle.remove()
    assert seen == [1]
    short.clear()
    made(image()), made(image())
    assert short[-1] is not None


def test_the_backend_of_the_environment(monkeypatch):
    made = layer()
    monkeypatch.setenv("BASISCONV_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="abacus"):
        made(image())
    monkeypatch.setenv("BASISCONV_BACKEND", "reference")
    same(made(image()), long_way(made, image()))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda x: x[:, 1:], ValueError), (lambda x: x.double(), TypeError), (lambda x: x[0, 0], ValueError),
        (lambda x: x.numpy(), TypeError), (lambda x: None, TypeError), (lambda x: x.to("meta"), ValueError),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_the_words_of_the_long_way(wrong, error):
    made = layer()
    with pytest.raises(error) as after:
        made(wrong(image()))
    with pytest.raises(error) as before:
        long_way(made, wrong(image()))
    assert str(after.value) == str(before.value)
    same(made(image()), long_way(made, image()))


def test_one_image_without_its_batch():
    made = layer()
    same(made(image()[0]), long_way(made, image()[0]))


def test_copies_and_pickles_remember_nothing(short):
    made = layer()
    for other in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
        other.coefficients = nn.Parameter(made.coefficients * 2)
        same(other(image()), long_way(other, image()))
        same(made(image()), long_way(made, image()))


def test_tensors_of_a_functional_call_are_those_that_count():
    made = layer()
    doubled = {name: tensor * 2 for name, tensor in made.state_dict().items()}
    other = copy.deepcopy(made)
    other.load_state_dict(doubled)
    for _ in range(3):
        same(torch.func.functional_call(made, doubled, (image(),)), other(image()))
        same(made(image()), long_way(made, image()))


def test_inference_tensors_count_no_versions_and_go_the_long_way(short):
    with torch.inference_mode():
        made = layer()
        made.coefficients.mul_(2)
        same(made(image()), long_way(made, image()))
    assert not short


def test_threads_share_a_layer():
    made = layer()
    expected = [long_way(made, image(seed)) for seed in range(4)]
    wrong = []

    def work(seed):
        for turn in range(200):
            if turn % 50 == 0:
                made.repack()
            with torch.no_grad():
                if not torch.equal(made(image(seed)), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forgotten_layer_is_freed():
    made = layer()
    freed = []
    made.witness = Witness(freed)
    del made
    assert freed == [1]


class Witness:
    def __init__(self, freed):
        self.freed = freed

    def __del__(self):
        self.freed.append(1)
