"""Quantising a whole checkpoint: calibration, search of the AWQ scales, the streaming writer, the absmax baseline."""

from model_patch.quantize.absmax import write_absmax
from model_patch.quantize.awq import search_awq_scales
from model_patch.quantize.calibrate import SiteStatistics, calibrate
from model_patch.quantize.calibrated import Calibrated, calibrate_plan
from model_patch.quantize.checkpoint import QuantizePlan, plan_checkpoint, quantize_checkpoint

__all__ = [
    "Calibrated",
    "QuantizePlan",
    "SiteStatistics",
    "calibrate",
    "calibrate_plan",
    "plan_checkpoint",
    "quantize_checkpoint",
    "search_awq_scales",
    "write_absmax",
]
