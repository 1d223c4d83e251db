"""What the package offers, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import polar_kernels

ROOT = Path(__file__).parents[2]
IMPORTS = """
import sys, torch
before = set(sys.modules)
import polar_kernels
assert not {"triton", "transformers"} & (set(sys.modules) - before), "heavy imports"
assert not any(name.startswith("polar_kernels.kernels") for name in sys.modules), "kernels imported"
assert not torch.cuda.is_initialized(), "CUDA initialised"
"""


def test_public_names() -> None:
    assert polar_kernels.__all__ == [
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
    assert all(hasattr(polar_kernels, name) for name in polar_kernels.__all__)


def test_importing_is_light() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
