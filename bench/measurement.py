"""What one time of a kernel is, as `polar bench` writes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """kernel: linear, dequantize or experts (`experts.py`); microseconds: None where the error was too large to report
    a time; bandwidth: bytes a second of the weight as it is stored (and of what dequantize writes); bandwidth_fraction:
    of the read rate measured in this run (of the copy rate for dequantize)."""

    kernel: str
    provider: str
    mode: str
    N: int
    K: int
    M: int
    error: float
    microseconds: float | None
    spread: float | None
    bf16_microseconds: float | None
    ratio: float | None
    bandwidth: float | None
    bandwidth_fraction: float | None
