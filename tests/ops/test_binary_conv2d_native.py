"""What only the native op of ``binary_conv2d`` has: packed weights, threads, instruction sets, checks of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basisconv_kernels import PackedTensor, binary_conv2d, binary_conv2d_pack, bitpack, testing
from basisconv_kernels.core import extension, registry
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.testing.binary_conv2d import BinaryCase, arguments

pytestmark = pytest.mark.skipif(registry.absent("cpu") is not None, reason=f"cpu: {registry.absent('cpu')}")

CPU = extension.facts().get("cpu", {})
OTHER_SETS = [s for s in CPU.get("built", []) if s != CPU["in_use"]]

PROGRAM = """
import functools, torch
from basisconv_kernels import binary_conv2d, bitpack, testing
from basisconv_kernels.core import extension
torch.set_num_threads(1)
for dtype in (torch.float32,):
    for case in testing.BINARY_CASES:
        testing.check_binary(case.at(dtype=dtype), functools.partial(binary_conv2d, backend="cpu"))
        testing.check_pack(case.at(dtype=dtype), functools.partial(bitpack, backend="cpu"))
print(extension.facts()["cpu"]["in_use"])
"""


@pytest.mark.parametrize("instruction_set", OTHER_SETS)
def test_every_instruction_set_passes_every_case(instruction_set):
    """The set is chosen once a process, so each has its own."""
    if CPU["built"].index(instruction_set) > CPU["built"].index(CPU["processor"]):
        pytest.skip(f"this processor has {CPU['processor']} at most")
    environment = {
        **os.environ,
        "BASISCONV_CPU_ISA": instruction_set,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == [instruction_set]


@pytest.mark.parametrize("case", testing.BINARY_CASES, ids=lambda case: case.name)
def test_weights_packed_once_change_nothing(case):
    inputs = testing.make_binary_inputs(case)
    call = functools.partial(binary_conv2d, inputs.input, output="int32", backend="cpu", **arguments(case))
    for weight in (inputs.weight, inputs.weight.double(), bitpack(inputs.weight)):
        packed = binary_conv2d_pack(weight, groups=case.problem.groups)
        assert torch.equal(call(weight, packed=packed), inputs.sums)


# Layers that run as products where there is a matrix unit: several tiles of pixels, of filters and of channels. Bits of
# the small cases of `testing` are mostly counted there too.
LARGE = (
    BinaryCase("signs", "float maps", BinaryConv2dProblem(N=2, C=72, H=21, W=19, K=50, padding=(1, 1, 1, 1))),
    BinaryCase("pixels_last", "channels beside each other", BinaryConv2dProblem(
        N=1, C=128, H=30, W=35, K=64, padding=(2, 0, 1, 2), padding_value=1, channels_last=True, dtype=torch.bfloat16)),
    BinaryCase("words", "packed signs, two rows and three columns apart", BinaryConv2dProblem(
        N=1, C=100, H=60, W=70, K=40, stride=(2, 3), dilation=(1, 2), padding=(1, 2, 2, 1), padding_value=-1,
        planes=1)),
    BinaryCase("codes", "four planes in groups that end inside a word", BinaryConv2dProblem(
        N=1, C=84, H=33, W=30, K=34, groups=2, padding=(1, 1, 1, 1), planes=4, unsigned=True)),
    BinaryCase("deep", "filters that one pass reads once", BinaryConv2dProblem(
        N=2, C=512, H=7, W=7, K=96, padding=(1, 1, 1, 1), planes=1)),
)  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_layers(case, count, threads):
    threads(count)
    testing.check_binary(case, functools.partial(binary_conv2d, backend="cpu"))


@pytest.mark.parametrize(
    "wrong", ["too short", "too long", "another type", "another device", "zeros", "other weights", "groups"]
)
def test_what_is_no_packing_of_these_weights_is_refused(wrong):
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(8, 6, 3, 3)
    packed = binary_conv2d_pack(weight)
    packed = {
        "too short": packed[:-1],
        "too long": torch.cat([packed, packed]),
        "another type": packed.float(),
        "another device": packed.to("meta"),
        "zeros": torch.zeros_like(packed),
        "other weights": binary_conv2d_pack(weight[1:]),
        "groups": binary_conv2d_pack(weight[:, :3], groups=2),
    }[wrong]
    with pytest.raises((RuntimeError, ValueError), match=r"binary_conv2d: packed "):
        binary_conv2d(x, weight, packed=packed, backend="cpu")


@pytest.mark.parametrize("output", ["int32", "packed", "float"])
def test_number_of_threads_does_not_change_a_bit(output, threads):
    x, weight = torch.randn(2, 70, 40, 40), torch.randn(130, 70, 3, 3)
    found = []
    for count in (1, 2, 3):
        threads(count)
        result = binary_conv2d(x, weight, padding=1, output=output, backend="cpu")
        found.append(result.words if isinstance(result, PackedTensor) else result)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sums_too_long_for_sixteen_bits():
    x, weight = torch.ones(1, 9000, 3, 3), torch.ones(3, 9000, 3, 3)
    weight[1, :17] = -1
    found = binary_conv2d(-x, weight, output="int32", backend="cpu")
    assert found.flatten().tolist() == [-81_000, -81_000 + 2 * 17 * 9, -81_000]


def test_it_counts_as_a_convolution():
    with FlopCounterMode(display=False) as counter:
        binary_conv2d(bitpack(torch.rand(2, 6, 8, 8), bits=2), torch.randn(4, 3, 3, 3), groups=2, backend="cpu")
    assert counter.get_total_flops() == 2 * 2 * 2 * 6 * 6 * 4 * 3 * 9


def raw(**change):
    settings = {
        "input": torch.randn(2, 6, 7, 8), "weight": torch.randn(4, 6, 3, 3), "scale": torch.ones(4),
        "bias": torch.ones(4), "pixel_scale": torch.ones(2, 1, 7, 8), "threshold": None, "flip": None, "packed": None,
        "stride": [1, 1], "padding": [1, 1, 1, 1], "padding_value": 0, "dilation": [1, 1], "groups": 1,
        "activation": None, "output": "float32", "channels": 6, "encoding": None, "packed_weight": False,
    }  # fmt: skip
    for name, value in change.items():
        settings[name] = value(settings[name]) if callable(value) else value
    return torch.ops.basisconv.binary_conv2d.default(*settings.values())


WORDS = bitpack(torch.randn(2, 6, 7, 8)).words
FILTERS = bitpack(torch.randn(4, 6, 3, 3)).words
THRESHOLD = {"threshold": torch.zeros(4, dtype=torch.int32), "flip": torch.zeros(4).bool(), "output": "packed"}
BAD = {
    "input rank": {"input": lambda t: t[0]},
    "input channels": {"input": lambda t: t[:, 1:]},
    "input dtype": {"input": lambda t: t.double()},
    "words as numbers": {"encoding": "sign"},
    "unknown encoding": {"input": WORDS, "encoding": "ternary"},
    "planes of signs": {"input": WORDS.repeat(1, 2, 1, 1, 1), "encoding": "sign"},
    "too many planes": {"input": WORDS.repeat(1, 5, 1, 1, 1), "encoding": "unsigned"},
    "word count": {"input": WORDS.repeat(1, 1, 1, 1, 2), "encoding": "sign"},
    "word type": {"input": WORDS.long(), "encoding": "sign"},
    "strided words": {"input": WORDS.repeat(1, 1, 1, 1, 2)[..., ::2], "encoding": "sign"},
    "weight rank": {"weight": lambda t: t[0]},
    "weight channels": {"weight": lambda t: t[:, 1:]},
    "weight dtype": {"weight": lambda t: t.int()},
    "no filter": {"weight": lambda t: t[:0]},
    "weight words": {"weight": FILTERS.repeat(1, 1, 1, 1, 2), "packed_weight": True},
    "scale size": {"scale": torch.ones(3)},
    "bias size": {"bias": torch.ones(5)},
    "pixel scale size": {"pixel_scale": torch.ones(2, 1, 7, 7)},
    "threshold size": {**THRESHOLD, "threshold": torch.zeros(3, dtype=torch.int32)},
    "threshold type": {**THRESHOLD, "threshold": torch.zeros(4)},
    "no flip": {**THRESHOLD, "flip": None},
    "stride zero": {"stride": [0, 1]},
    "one stride": {"stride": [1]},
    "dilation beyond the input": {"dilation": [2**40, 1]},
    "padding negative": {"padding": [1, -1, 1, 1]},
    "padding value": {"padding_value": 2},
    "padding value of codes": {"input": WORDS, "encoding": "unsigned", "padding_value": 1},
    "groups zero": {"groups": 0},
    "groups of another size": {"groups": 2},
    "activation": {"activation": "gelu"},
    "output": {"output": "float64"},
    "channels": {"channels": 0},
}  # fmt: skip


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_the_raw_op_protects_memory(change):
    assert raw().shape == (2, 4, 7, 8)
    assert raw(input=WORDS, encoding="sign", weight=FILTERS, packed_weight=True, **THRESHOLD).shape == (2, 1, 7, 8, 1)
    with pytest.raises(RuntimeError, match="binary_conv2d"):
        raw(**change)


def test_the_raw_ops_have_no_silent_gradient():
    with pytest.raises(RuntimeError, match=r"torch.ops.basisconv.binary_conv2d has no gradient of its own"):
        raw(weight=lambda t: t.requires_grad_())
    with pytest.raises(RuntimeError, match=r"torch.ops.basisconv.bitpack has no gradient of its own"):
        torch.ops.basisconv.bitpack.default(torch.randn(1, 2, 3, 4).requires_grad_(), None, None, 1, False)


@pytest.mark.parametrize("output", ["float", *(pytest.param(o, marks=pytest.mark.full) for o in ("int32", "packed"))])
def test_one_compiled_graph_serves_all_sizes(output, fresh_compiler):
    weight, packed = torch.randn(40, 20, 3, 3), None

    def network(x):
        bits = binary_conv2d(x, weight, padding=1, output="packed")
        found = binary_conv2d(bits, weight[:, :].repeat(1, 2, 1, 1), padding=1, output=output, packed=packed)
        return found.words if isinstance(found, PackedTensor) else found

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((1, 20, 6, 7), (2, 20, 9, 8)):
            x = torch.randn(size)
            assert torch.equal(compiled(x), network(x))


def test_the_op_is_exported_and_passes_opcheck():
    x, weight = torch.randn(1, 20, 6, 7), torch.randn(8, 20, 3, 3)
    arguments = (
        x, weight, torch.ones(8), None, None, None, None, None, [1, 1], [1, 1, 1, 1], 0, [1, 1], 1, "relu", "float32",
        20, None, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.basisconv.binary_conv2d.default, arguments)
    torch.library.opcheck(torch.ops.basisconv.bitpack.default, (x, None, None, 1, False))
    torch.library.opcheck(
        torch.ops.basisconv.binary_conv2d_pack.default, (weight, False, 20, 1, extension.facts()["binary_pack_format"])
    )

    class Network(torch.nn.Module):
        def forward(self, x):
            return binary_conv2d(bitpack(x), weight, padding=1)

    program = torch.export.export(Network(), (x,))
    assert torch.equal(program.module()(x), Network()(x))
