"""Checkpoints of the published PolarQuant layouts, read strictly and rewritten in this package's format."""

from model_patch.checkpoint.published.convert import ConvertReport, convert_checkpoint

__all__ = ["ConvertReport", "convert_checkpoint"]
