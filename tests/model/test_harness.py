"""lm-eval on a quantised checkpoint gives the log-likelihoods that the checkpoint's own predictions have."""

import builtins
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from model_patch import ConfigError, PolarQuantConfig, load_model
from model_patch.harness import harness_model
from model_patch.load import load_tokenizer
from model_patch.quantize import plan_checkpoint, quantize_checkpoint
from polar_kernels import PolarEmbedding, PolarLinear

CONTEXT, CONTINUATION = "The kernel reads the weights", " and multiplies them."


@pytest.fixture
def quantized(tiny: Path, tmp_path: Path) -> Path:
    quantize_checkpoint(plan_checkpoint(tiny, PolarQuantConfig(4), awq=False), tmp_path / "out")
    return tmp_path / "out"


def test_log_likelihood_of_a_continuation(quantized: Path, device: torch.device) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval, the extra of that name")
    from lm_eval.api.instance import Instance

    harness = harness_model(str(quantized), device=device, dtype=torch.float32)
    request = Instance("loglikelihood", {}, (CONTEXT, CONTINUATION), 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    model, tokenizer = load_model(quantized, device=device, dtype=torch.float32), load_tokenizer(quantized)
    context, whole = (tokenizer(text, return_tensors="pt").input_ids[0] for text in (CONTEXT, CONTEXT + CONTINUATION))
    assert torch.equal(whole[: len(context)], context)
    with torch.no_grad():
        logits = model(whole[None, :-1].to(device)).logits[0].double().log_softmax(-1).cpu()
    expected = logits.gather(-1, whole[1:, None])[len(context) - 1 :].sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What lm-eval's model is made of, where a stand-in takes the place of lm-eval."""
    made: dict[str, Any] = {}
    stand_in = ModuleType("lm_eval.models.huggingface")
    stand_in.HFLM = made.update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return made


def test_lm_eval_is_given_the_checkpoint_as_it_loads(
    quantized: Path, device: torch.device, given: dict[str, Any]
) -> None:
    harness_model(str(quantized), device=device, dtype=torch.float32, batch_size=3, max_length=64)
    model, tokenizer = given.pop("pretrained"), given.pop("tokenizer")
    assert given == {"batch_size": 3, "max_length": 64}
    expected = load_model(quantized, device=device, dtype=torch.float32)
    assert not model.training
    assert {type(module) for module in model.modules()} >= {PolarLinear, PolarEmbedding}
    ids = tokenizer(CONTEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, load_tokenizer(quantized)(CONTEXT, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(model(ids.to(device)).logits, expected(ids.to(device)).logits)


def test_defaults_are_those_of_a_checkpoint(quantized: Path, device: torch.device, given: dict[str, Any]) -> None:
    harness_model(str(quantized))
    assert (given["batch_size"], given["max_length"]) == (1, None)
    assert (given["pretrained"].dtype, given["pretrained"].device.type) == (torch.bfloat16, device.type)


def test_it_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"lm-eval is not installed: pip install 'polar-kernels\[lm-eval\]'"):
        harness_model(str(tiny))
