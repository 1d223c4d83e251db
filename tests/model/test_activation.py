"""int8 activations, the default on GPUs that have the kernel, against activations in their own dtype."""

import pytest
import torch

from model_patch import load_model, patch_model, set_activation
from model_patch.demo import EVALUATION_TEXT, MODEL
from model_patch.evaluate import evaluate, tokenize_file
from model_patch.load import load_tokenizer
from polar_kernels import PolarLinear


def test_set_activation() -> None:
    model = load_model(MODEL, device="cpu")
    patch_model(model)
    set_activation(model, "exact")
    assert {m.activation for m in model.modules() if isinstance(m, PolarLinear)} == {"exact"}


@pytest.mark.gpu
def test_int8_costs_little(device: torch.device) -> None:
    """At most 3 % more KL divergence to bf16, in windows short enough for the int8 kernel."""
    tokens = tokenize_file(load_tokenizer(MODEL), EVALUATION_TEXT)
    original, model = (load_model(MODEL, device=device, dtype=torch.bfloat16) for _ in range(2))
    patch_model(model)
    divergences = {}
    for activation in ("exact", "int8"):
        set_activation(model, activation)
        assert all(m.tiles is not None for m in model.modules() if isinstance(m, PolarLinear))
        divergences[activation] = evaluate(model, tokens, window=128, limit=60, reference=original).kl_divergence
    print(divergences)  # noqa: T201  shown with -s or on failure
    assert divergences["int8"] <= 1.03 * divergences["exact"]
