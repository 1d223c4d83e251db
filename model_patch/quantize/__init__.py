"""Quantising a whole checkpoint: calibration, AWQ scales, bits for a target, the streaming writer, the baseline."""

from model_patch.quantize.absmax import write_absmax
from model_patch.quantize.awq import search_awq_scales
from model_patch.quantize.calibrate import SiteStatistics, calibrate
from model_patch.quantize.calibrated import Calibrated, calibrate_plan
from model_patch.quantize.checkpoint import QuantizePlan, plan_checkpoint, quantize_checkpoint
from model_patch.quantize.sensitivity import Target, measure_parts, plan_for_target

__all__ = [
    "Calibrated",
    "QuantizePlan",
    "SiteStatistics",
    "Target",
    "calibrate",
    "calibrate_plan",
    "measure_parts",
    "plan_checkpoint",
    "plan_for_target",
    "quantize_checkpoint",
    "search_awq_scales",
    "write_absmax",
]
