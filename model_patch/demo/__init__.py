"""What `polar demo` and the default calibration need, shipped with the package.

model/: a small trained Qwen3.5 (5.5 M parameters: three GatedDeltaNet layers, one attention layer, untied head).
text/: the beginnings of WikiText-2's valid split, for calibration, and of its test split, for evaluation, in their
tokenised form (CC BY-SA 3.0).
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
CALIBRATION_TEXT = Path(__file__).parent / "text" / "wikitext2.valid.excerpt.txt"
CALIBRATION_WINDOWS = 64  # of 512 tokens; 16 to 128 differ by less than a standard error on held-out valid text
EVALUATION_TEXT = Path(__file__).parent / "text" / "wikitext2.test.excerpt.txt"
EVALUATION_WINDOWS = 24
