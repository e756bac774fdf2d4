"""C functions of the ops: their declarations, and programs that call them."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import basisconv_kernels as bk
from basisconv_kernels.core import extension, serving

pytestmark = pytest.mark.skipif(extension.load() is not None, reason="the native library is not built")
NAMES = ("basis_conv2d", "binary_conv2d", "bitpack", "stacked_binary_conv2d", "ternary_conv2d")


def test_declarations_follow_from_the_schemas():
    declared = bk.inductor_configs()["aot_inductor.custom_ops_to_c_shims"]
    assert {op._schema.name.partition("::")[2] for op in declared} == set(NAMES)
    assert declared[torch.ops.basisconv.bitpack.default] == [
        "AOTITorchError aoti_torch_cpu_bitpack(AtenTensorHandle input, AtenTensorHandle* threshold, "
        "AtenTensorHandle* flip, int64_t bits, int32_t codes, AtenTensorHandle* result)"
    ]


def test_without_a_library_it_is_said_so(monkeypatch):
    monkeypatch.setattr(serving.extension, "load", lambda: "not built")
    serving._library.cache_clear()
    for asked in (bk.inductor_configs, bk.open_library):
        with pytest.raises(bk.BackendUnavailable, match="not built"):
            asked()


def test_errors_are_told_and_none_leaves_the_function(capfd):
    function = serving._library().aoti_torch_cpu_bitpack
    function.restype = ctypes.c_int32
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    capsule_of = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    result = ctypes.c_void_p()

    def call(tensor, bits):
        (handle,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
        lent = ctypes.c_void_p(pointer_of(handle, None))
        return function(lent, None, None, ctypes.c_int64(bits), ctypes.c_int32(1), ctypes.byref(result))

    assert call(torch.ones(1, 3, 2, 2), 2) == 0
    (made,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule_of(result.value, None, None)])
    assert torch.equal(made, bk.bitpack(torch.ones(1, 3, 2, 2), bits=2).words)
    capfd.readouterr()
    assert call(torch.ones(1, 3, 2, 2), 9) != 0
    assert "bitpack: bits must be 1 to 4" in capfd.readouterr().err
    assert call(torch.ones(1, 3, 2, 2, requires_grad=True), 2) != 0
    assert "has no gradient of its own" in capfd.readouterr().err


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_frozen_network_calls_the_kernels_directly_and_packs_nothing(fresh_compiler):
    """A layer of every kind that has an op of its own, with filters of all their forms."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        bk.BasisConv2d(8, 16, 3, 4, padding=1, activation="relu", generator=generator),
        bk.TernaryConv2d(16, 16, 3, padding=1, generator=generator).pack(),
        bk.StackedBinaryConv2d(16, 16, 3, bank=8, splits=2, padding=1).freeze(),
        bk.BinaryConv2d(16, 8, 3, padding=1, bias=False).freeze(),
    ).eval()
    x = torch.randn(2, 8, 6, 6, generator=generator)
    with torch.no_grad(), torch._inductor.config.patch(bk.inductor_configs() | {"cpp_wrapper": True}):
        expected = model(x)
        out, codes = run_and_get_code(torch.compile(model), x)
    torch.testing.assert_close(out, expected)
    body = codes[-1].partition("inductor_entry_impl")[2]
    for name in ("basis_conv2d", "ternary_conv2d", "stacked_binary_conv2d", "binary_conv2d"):
        assert f"aoti_torch_cpu_{name}(" in body
    assert "basisconv::" not in body  # neither an op by the dispatcher nor packing
