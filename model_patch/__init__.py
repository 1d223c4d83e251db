"""PolarQuant in Qwen models: patch, quantise, save, load. Importing this registers `quant_method: polarquant`."""

from model_patch.config import PolarQuantConfig
from model_patch.decode import accelerate, decelerate
from model_patch.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from model_patch.groups import group_projections, ungroup_projections
from model_patch.hf import register
from model_patch.load import load_model
from model_patch.patch import PatchReport, patch_model, set_activation
from polar_kernels import PolarError
from polar_kernels.version import __version__

__all__ = [
    "CheckpointError",
    "ConfigError",
    "OutputError",
    "PatchReport",
    "PolarError",
    "PolarQuantConfig",
    "UnsupportedModelError",
    "__version__",
    "accelerate",
    "decelerate",
    "group_projections",
    "load_model",
    "patch_model",
    "register",
    "set_activation",
    "ungroup_projections",
]

register()
