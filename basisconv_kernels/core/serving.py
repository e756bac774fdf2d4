"""Compiled programs that call the kernels of the CPU directly: what Inductor must be told of them.

A program of AOTInductor, or of ``torch.compile`` with the C++ wrapper, reaches an op of another library through torch's
dispatcher: arguments boxed, the op's schema copied. Inductor takes C functions instead where it is given their
declarations. The library has one for every op of a network (``csrc/ops/shim_glue.h``); declarations follow from the
schemas.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from basisconv_kernels.core import extension
from basisconv_kernels.core.errors import BackendUnavailable

_PREFIX = "aoti_torch_cpu_"  # of names, by Inductor's rule
_TYPES = {
    "Tensor": "AtenTensorHandle {}",
    "Optional[Tensor]": "AtenTensorHandle* {}",
    "List[int]": "const int64_t* {0}, int64_t {0}_count",
    "int": "int64_t {}",
    "bool": "int32_t {}",
    "str": "const char* {}",
    "Optional[str]": "const char** {}",
}


@functools.cache
def _library() -> ctypes.CDLL:
    reason = extension.load()
    path = extension.path()
    if reason is not None or path is None:
        raise BackendUnavailable(f"no kernels that programs could call directly: {reason}")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def open_library() -> None:
    """Make the functions visible to compiled programs that this process loads from here on.

    ``inductor_configs`` does it too; a process that only loads a package, say by ``torch._inductor.aoti_load_package``,
    calls this before. A program in C++ opens the library with ``RTLD_GLOBAL``, as ``examples/serve.cpp`` does.

    Raises:
        BackendUnavailable: there is no native library.
    """
    _library()


def declaration(schema: Any) -> str:
    """The C function of an op with this schema, of which all arguments and the one result have types known here."""
    arguments = [_TYPES[str(argument.type)].format(argument.name) for argument in schema.arguments]
    name = schema.name.partition("::")[2]
    return f"AOTITorchError {_PREFIX}{name}({', '.join([*arguments, 'AtenTensorHandle* result'])})"


def inductor_configs() -> dict[str, Any]:
    """Settings of Inductor under which programs call the CPU kernels directly, weights folded and packed before.

    For ``torch._inductor.aoti_compile_and_package(program, inductor_configs=bk.inductor_configs())``; and for
    ``torch.compile``, whose first call, without gradients, is then made inside
    ``torch._inductor.config.patch(bk.inductor_configs() | {"cpp_wrapper": True})`` (its ``options`` come too late for
    the folding of weights). Each call of a layer costs about 8 us less. What a program cannot call so, on a GPU say, it
    calls as always.

    Returns:
        dict: ``freezing`` and ``aot_inductor.custom_ops_to_c_shims``.

    Raises:
        BackendUnavailable: there is no native library.

    Example:
        >>> import basisconv_kernels as bk
        >>> sorted(bk.inductor_configs())
        ['aot_inductor.custom_ops_to_c_shims', 'freezing']
    """
    library = _library()
    names = [
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("basisconv::")
    ]
    ops = [getattr(torch.ops.basisconv, name).default for name in sorted(names) if hasattr(library, _PREFIX + name)]
    return {"freezing": True, "aot_inductor.custom_ops_to_c_shims": {op: [declaration(op._schema)] for op in ops}}
