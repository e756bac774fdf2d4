"""Convolutions with shared filter bases: fused kernels, drop-in layers, conversion and training."""

from basisconv_kernels.core.errors import BackendUnavailable, FileFormatError
from basisconv_kernels.core.registry import use_backend
from basisconv_kernels.ops.basis_conv2d import BasisConv2dFunction, basis_conv2d, basis_conv2d_pack

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BasisConv2dFunction",
    "FileFormatError",
    "basis_conv2d",
    "basis_conv2d_pack",
    "use_backend",
]
