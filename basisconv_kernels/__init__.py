"""Convolutions with shared filter bases: fused kernels, drop-in layers, conversion and training."""

from pathlib import Path as _Path

from basisconv_kernels.compression.basis import orthogonality_loss
from basisconv_kernels.compression.binary import BinaryConfig
from basisconv_kernels.compression.chains import pack_activations
from basisconv_kernels.compression.config import BasisConfig, Sensitivity
from basisconv_kernels.compression.files import load, read_recipe, save
from basisconv_kernels.compression.finetune import finetune, trainable_parameters
from basisconv_kernels.compression.fold import fold_batchnorm
from basisconv_kernels.compression.model import compress, to_plain
from basisconv_kernels.compression.prune_config import PruneConfig
from basisconv_kernels.compression.report import CompressionReport, LayerReport
from basisconv_kernels.compression.search import SearchReport, search
from basisconv_kernels.compression.stacked_binary import StackedBinaryConfig, freeze_bits
from basisconv_kernels.compression.ternary import train_layerwise
from basisconv_kernels.compression.ternary_config import TernaryConfig
from basisconv_kernels.compression.ternary_report import TernaryLayerReport, TernaryReport
from basisconv_kernels.compression.tucker_config import TuckerConfig
from basisconv_kernels.core.errors import ArchitectureError, BackendUnavailable, FileFormatError
from basisconv_kernels.core.packed import PackedTensor, Threshold
from basisconv_kernels.core.registry import use_backend
from basisconv_kernels.core.serving import inductor_configs, open_library
from basisconv_kernels.core.version import __version__ as __version__
from basisconv_kernels.layers.basis_conv2d import BasisConv2d
from basisconv_kernels.layers.binary_conv2d import BinaryConv2d
from basisconv_kernels.layers.packed_max_pool2d import PackedMaxPool2d
from basisconv_kernels.layers.stacked_binary_conv2d import StackedBinaryConv2d
from basisconv_kernels.layers.ternary_conv2d import TernaryConv2d
from basisconv_kernels.layers.ternary_linear import TernaryLinear
from basisconv_kernels.layers.tucker_conv2d import TuckerConv2d
from basisconv_kernels.ops.basis_conv2d import BasisConv2dFunction, basis_conv2d
from basisconv_kernels.ops.basis_conv2d_native import basis_conv2d_pack
from basisconv_kernels.ops.binary_conv2d import BinaryConv2dFunction, binary_conv2d
from basisconv_kernels.ops.binary_conv2d_native import binary_conv2d_pack
from basisconv_kernels.ops.binary_conv2d_scaling import filter_scale, magnitude_map
from basisconv_kernels.ops.bitpack import bitpack, unpack
from basisconv_kernels.ops.bitpack_pool import packed_max_pool2d
from basisconv_kernels.ops.stacked_binary_conv2d import StackedBinaryConv2dFunction, stacked_binary_conv2d
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_form, stacked_binary_conv2d_pack
from basisconv_kernels.ops.ternary_conv2d import TernaryConv2dFunction, ternary_conv2d, ternary_planes, ternary_weight
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.ops.tucker_conv2d import TuckerConv2dFunction, tucker_conv2d
from basisconv_kernels.ops.tucker_conv2d_native import tucker_conv2d_pack

__all__ = [
    "ArchitectureError",
    "BackendUnavailable",
    "BasisConfig",
    "BasisConv2d",
    "BasisConv2dFunction",
    "BinaryConfig",
    "BinaryConv2d",
    "BinaryConv2dFunction",
    "CompressionReport",
    "FileFormatError",
    "LayerReport",
    "PackedMaxPool2d",
    "PackedTensor",
    "PruneConfig",
    "SearchReport",
    "Sensitivity",
    "StackedBinaryConfig",
    "StackedBinaryConv2d",
    "StackedBinaryConv2dFunction",
    "TernaryConfig",
    "TernaryConv2d",
    "TernaryConv2dFunction",
    "TernaryLayerReport",
    "TernaryLinear",
    "TernaryReport",
    "Threshold",
    "TuckerConfig",
    "TuckerConv2d",
    "TuckerConv2dFunction",
    "basis_conv2d",
    "basis_conv2d_pack",
    "binary_conv2d",
    "binary_conv2d_pack",
    "bitpack",
    "compress",
    "filter_scale",
    "finetune",
    "fold_batchnorm",
    "freeze_bits",
    "inductor_configs",
    "load",
    "magnitude_map",
    "open_library",
    "orthogonality_loss",
    "pack_activations",
    "packed_max_pool2d",
    "read_recipe",
    "save",
    "search",
    "stacked_binary_conv2d",
    "stacked_binary_conv2d_form",
    "stacked_binary_conv2d_pack",
    "ternary_conv2d",
    "ternary_conv2d_pack",
    "ternary_planes",
    "ternary_weight",
    "to_plain",
    "train_layerwise",
    "trainable_parameters",
    "tucker_conv2d",
    "tucker_conv2d_pack",
    "unpack",
    "use_backend",
]

# A plain checkout has the Triton kernels beside the package, an installation inside.
_root = _Path(__file__).resolve().parents[1]
if not (_Path(__path__[0]) / "triton_kernels").exists() and (_root / "pyproject.toml").exists():
    __path__.append(str(_root))
