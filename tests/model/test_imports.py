"""What importing the package asks for and does."""

import subprocess
import sys

IMPORTS = """
import sys
sys.modules["triton"] = None  # importing it fails, as on a CPU machine without it
import torch
import model_patch, model_patch.cli
from model_patch.demo import MODEL
assert not torch.cuda.is_initialized(), "CUDA initialised"
model = model_patch.load_model(MODEL, device="cpu")
model_patch.patch_model(model)
model_patch.accelerate(model, max_length=16, compile=False)
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
"""


def test_a_cpu_needs_no_triton() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
