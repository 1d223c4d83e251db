"""PolarQuant weights: Hadamard-rotated blocks coded with Lloyd-Max levels, and products straight from the codes."""

from polar_kernels.codebook import lloyd_max_levels, published_levels
from polar_kernels.embedding import PolarEmbedding, TiedPolarHead
from polar_kernels.errors import ArgumentError, PolarError, QuantizationError
from polar_kernels.experts import PolarExpertProjection, PolarExperts
from polar_kernels.group import PolarGroup
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.linear import PolarLinear
from polar_kernels.module import NoDenseWeightError, PolarModule
from polar_kernels.packing import pack_codes, unpack_codes
from polar_kernels.quantize import quantize_weight
from polar_kernels.version import __version__
from polar_kernels.weight import PolarWeight

__all__ = [
    "BLOCK_SIZE",
    "ArgumentError",
    "NoDenseWeightError",
    "PolarEmbedding",
    "PolarError",
    "PolarExpertProjection",
    "PolarExperts",
    "PolarGroup",
    "PolarLinear",
    "PolarModule",
    "PolarWeight",
    "QuantizationError",
    "TiedPolarHead",
    "__version__",
    "lloyd_max_levels",
    "pack_codes",
    "published_levels",
    "quantize_weight",
    "unpack_codes",
]
