"""Quantising a whole checkpoint: calibration, search of the AWQ scales, and the streaming writer."""

from model_patch.quantize.awq import search_awq_scales
from model_patch.quantize.calibrate import SiteStatistics, calibrate
from model_patch.quantize.checkpoint import QuantizePlan, plan_checkpoint, quantize_checkpoint

__all__ = ["QuantizePlan", "SiteStatistics", "calibrate", "plan_checkpoint", "quantize_checkpoint", "search_awq_scales"]
