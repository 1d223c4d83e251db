"""A dequantised model is a plain one: torchao quantises it further."""

from typing import Any

import pytest
import torch
from torch import nn

from model_patch.load import load_model
from polar_kernels import PolarModule

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def test_torchao_takes_a_dequantised_model(zoo: Any) -> None:
    """int4 on a GPU; int8 on a CPU, where torchao has no int4."""
    model = load_model(zoo.quantized("qwen3_5_text"), device=zoo.device, dtype=torch.bfloat16)
    model.dequantize()
    assert not any(isinstance(module, PolarModule) for module in model.modules())
    ids = torch.arange(1, 20, device=zoo.device)[None]
    plain = torch.bfloat16, nn.Parameter
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.weight.dtype, type(layer.weight)) == plain
    with torch.no_grad():
        expected = model(ids).logits.float()
        if zoo.device.type == "cuda":
            config = torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
        else:
            config = torchao.Int8WeightOnlyConfig()
        torchao.quantize_(model, config)
        assert type(layer.weight.data) is not torch.Tensor  # torchao's own
        error = (model(ids).logits.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.6  # int4 of random weights
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 23)
