"""Cases, inputs, tolerances and comparison for the package's kernels and for kernels of your own.

A kernel is a function with the signature of ``basis_conv2d``::

    kernel(input, basis_weight, coefficients, bias, *, stride, padding, dilation, groups, activation, residual, precise)

with the arguments in normal form: pairs, and padding as (top, bottom, left, right). ``check`` runs it on a case and
raises a ``Mismatch`` (an AssertionError) that names the first thing that is wrong:

- every element against a float64 oracle on the same rounded inputs, within the two rules of ``testing.tolerances``;
- on whole numbers bit for bit, which shows a rounding too many or too few (where Winograd arithmetic is not allowed);
- shape, dtype, device and memory format of the result; elements never written, since fresh memory holds NaN;
- that no input and no memory beside an input was written, with NaN around and between all elements;
- that two runs give the same bits, each in memory of its own.

Example:
    >>> import torch
    >>> from basisconv_kernels import basis_conv2d, testing
    >>> def my_kernel(input, basis_weight, coefficients, bias=None, **settings):
    ...     return basis_conv2d(input, basis_weight, coefficients, bias, **settings, backend="reference")
    >>> report = testing.check(testing.case("odd_sizes"), my_kernel)
    >>> report.share <= 1
    True
    >>> for case in testing.CASES:
    ...     _ = testing.check(case.at(dtype=torch.bfloat16), my_kernel)
    >>> def forgets_the_bias(input, basis_weight, coefficients, bias=None, **settings):
    ...     return basis_conv2d(input, basis_weight, coefficients, **settings)
    >>> testing.check(testing.case("bias"), forgets_the_bias)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    basisconv_kernels.testing.compare.Mismatch: bias [...]: first mismatch at [n=0, k=0, y=0, x=0]: got ...

``pytest --candidate package.module:function`` runs the same over all cases and dtypes, gradients included where the
kernel has any. Layers and whole networks, computed in two ways, are compared by ``check_same_layer`` and
``check_same_network``. The loops of ``testing.naive`` are the lowest oracle, for maps of a few pixels.
"""

from basisconv_kernels.testing.binary_conv2d import (
    BINARY_CASES,
    BinaryCase,
    binary_case,
    check_binary,
    check_pack,
    make_binary_inputs,
)
from basisconv_kernels.testing.candidates import Kernel, load
from basisconv_kernels.testing.cases import CASES, DTYPES, PERFORMANCE_CASES, Case, case
from basisconv_kernels.testing.compare import Mismatch, Report, check, check_gradients, check_rounding, plain
from basisconv_kernels.testing.inputs import Inputs, make_inputs, poisoned_allocations
from basisconv_kernels.testing.same import check_same_layer, check_same_network
from basisconv_kernels.testing.stacked_binary_conv2d import (
    STACKED_CASES,
    STACKED_PERFORMANCE_CASES,
    StackedCase,
    check_stacked,
    make_stacked_inputs,
    stacked_case,
)
from basisconv_kernels.testing.tucker_conv2d import (
    TUCKER_CASES,
    TuckerCase,
    TuckerInputs,
    check_tucker,
    check_tucker_gradients,
    check_tucker_rounding,
    make_tucker_inputs,
    plain_tucker,
    tucker_case,
)

__all__ = [
    "BINARY_CASES",
    "CASES",
    "DTYPES",
    "PERFORMANCE_CASES",
    "STACKED_CASES",
    "STACKED_PERFORMANCE_CASES",
    "TUCKER_CASES",
    "BinaryCase",
    "Case",
    "Inputs",
    "Kernel",
    "Mismatch",
    "Report",
    "StackedCase",
    "TuckerCase",
    "TuckerInputs",
    "binary_case",
    "case",
    "check",
    "check_binary",
    "check_gradients",
    "check_pack",
    "check_rounding",
    "check_same_layer",
    "check_same_network",
    "check_stacked",
    "check_tucker",
    "check_tucker_gradients",
    "check_tucker_rounding",
    "load",
    "make_binary_inputs",
    "make_inputs",
    "make_stacked_inputs",
    "make_tucker_inputs",
    "plain",
    "plain_tucker",
    "poisoned_allocations",
    "stacked_case",
    "tucker_case",
]
