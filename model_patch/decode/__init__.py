"""Fast decoding: one CUDA graph a step over a cache at fixed addresses, used by transformers' own `generate`."""

from model_patch.decode.accelerate import accelerate, decelerate

__all__ = ["accelerate", "decelerate"]
