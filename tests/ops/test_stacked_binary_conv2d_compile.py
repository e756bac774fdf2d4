"""``stacked_binary_conv2d`` inside graphs: compiled with all batch sizes in one, exported, and the native ops alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import (
    StackedBinaryConv2d,
    stacked_binary_conv2d,
    stacked_binary_conv2d_form,
    stacked_binary_conv2d_pack,
    testing,
)
from basisconv_kernels.ops import stacked_binary_conv2d_native as native

needs_native = pytest.mark.skipif(not native.PRESENT, reason="the native library is not built, or without this op")


def layer(**changes):
    settings = {"bank": 6, "splits": 2, "padding": 1, "generator": torch.Generator().manual_seed(0), **changes}
    return StackedBinaryConv2d(12, 20, 3, **settings)


def image(batch=2):
    return torch.randn(batch, 12, 7, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_one_compiled_graph_serves_all_batches(fresh_compiler, frozen):
    module = layer().freeze() if frozen else layer()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            testing.check_same_layer(compiled(image(batch)), module(image(batch)))
    assert len(graphs) == 1


def test_a_compiled_training_step_has_the_same_gradients(fresh_compiler):
    module, other = layer(), layer()
    torch.compile(module, fullgraph=True, backend="aot_eager")(image()).square().sum().backward()
    other(image()).square().sum().backward()
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        testing.check_same_layer(one.grad, two.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_exported_program_keeps_the_result(frozen):
    module = layer(activation="relu").eval()
    module = module.freeze() if frozen else module
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (image(),), dynamic_shapes=({0: batch},))
        testing.check_same_layer(program.module()(image(5)), module(image(5)))


@needs_native
@pytest.mark.parametrize("name", ["odd_sizes", "channels_last", "groups"])
def test_the_native_ops_keep_what_their_fakes_promise(name):
    case = testing.stacked_case(name)
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    p = case.problem
    ops = torch.ops.basisconv
    torch.library.opcheck(ops.stacked_binary_conv2d_pack.default, (bank, index, p.groups, native.FORMAT))
    packed = stacked_binary_conv2d_pack(bank, index, groups=p.groups)
    arguments = (x, packed, scale, bias, list(bank.shape), list(index.shape), p.stride, p.padding, p.dilation, p.groups,
                 "real", p.activation)  # fmt: skip
    torch.library.opcheck(ops.stacked_binary_conv2d.default, arguments)
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        ops.stacked_binary_conv2d.default(x.requires_grad_(), *arguments[1:])


@needs_native
def test_packed_filters_spare_the_packing_and_are_checked():
    case = testing.stacked_case("odd_sizes")
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    packed = stacked_binary_conv2d_pack(bank, index)
    settings = {**case.arguments(), "backend": "cpu"}
    expected = stacked_binary_conv2d(x, bank, index, scale, bias, **settings)
    assert torch.equal(stacked_binary_conv2d(x, bank, index, scale, bias, packed=packed, **settings), expected)
    for wrong, words in (
        (stacked_binary_conv2d_pack(bank, index[:, [0, 0]])[:-4], "must be what stacked_binary_conv2d_pack gives"),
        (packed.clone().fill_(7), "was made for another bank or index"),
        (packed.float(), "must be what stacked_binary_conv2d_pack gives"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            stacked_binary_conv2d(x, bank, index, scale, bias, packed=wrong, **settings)
    with pytest.raises(RuntimeError, match=r"and -1 only, got 0\.5"):
        stacked_binary_conv2d_pack(bank * 0.5, index)
    with pytest.raises(RuntimeError, match="bank filters 0 to 4, got 5"):
        stacked_binary_conv2d_pack(bank, index * 0 + 5)
    with pytest.raises(RuntimeError, match="this library packs format"):
        torch.ops.basisconv.stacked_binary_conv2d_pack.default(bank, index, 1, native.FORMAT + 1)


@needs_native
def test_a_large_bank_runs_as_full_filters_and_says_so():
    assert stacked_binary_conv2d_form((16, 32, 3, 3), (64, 2)) == "stacked"
    assert stacked_binary_conv2d_form((128, 32, 3, 3), (64, 2)) == "expanded"
    assert stacked_binary_conv2d_form((64, 64, 3, 3), (64, 1)) == "expanded"


@needs_native
@pytest.mark.parametrize("name", ["n1_128_at28_bank32_splits2", "n1_256_at14_bank256_splits1"])
def test_the_number_of_threads_does_not_matter(threads, name):
    case = testing.stacked_case(name)
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(stacked_binary_conv2d(x, bank, index, scale, bias, backend="cpu", **case.arguments()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_native
def test_flops_count_the_bank_over_every_split_and_the_stacking():
    case = testing.stacked_case("groups")
    x, bank, index, scale, bias = testing.make_stacked_inputs(case).tensors
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stacked_binary_conv2d(x, bank, index, scale, bias, backend="cpu", **case.arguments())
    assert counter.get_total_flops() == 2 * case.problem.adds()


def test_copies_of_a_layer_forget_prepared_filters():
    module = layer()
    with torch.no_grad():
        expected = module(image())
        other = copy.deepcopy(module)
        other.bank_latent.neg_()
        other.bias.zero_()
        assert torch.equal(other(image()), -expected)
