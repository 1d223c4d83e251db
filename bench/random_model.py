"""Models of a true shape with random weights, quantised ones built in their quantised form and never through bf16."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from model_patch.architectures import check_model_type
from model_patch.config import PolarQuantConfig
from model_patch.errors import ConfigError
from model_patch.patch import plan_model, swap_to_empty
from polar_kernels import PolarModule

# Name -> where its text config differs from its class's default, which is Qwen3.5-9B but where `_CLASSES` has another:
# Qwen3.5-35B-A3B, of experts, and Qwen3.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3.5-4b": {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
    "qwen3.5-9b": {},
    "qwen3.5-27b": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "linear_num_value_heads": 48,
    },
    "qwen3.5-35b-a3b": {},
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}
_CLASSES: dict[str, type[PreTrainedConfig]] = {"qwen3.5-35b-a3b": Qwen3_5MoeTextConfig, "qwen3-8b": Qwen3Config}


def model_config(name: str) -> PreTrainedConfig:
    """The config known by this name, or that of a checkpoint folder or Hub name. Raises ConfigError for neither."""
    if name in CONFIGS:
        return _CLASSES.get(name, Qwen3_5TextConfig)(**CONFIGS[name])
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        known = ", ".join(CONFIGS)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--config {name!r} is none of {known}, and no checkpoint's: {reason}") from error
    check_model_type(config.model_type)
    return config.get_text_config()


@torch.no_grad()
def random_model(
    config: PreTrainedConfig,
    bits: int | None,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A model with random weights on `device`: all layers quantised to `bits`, or plain when None. auto: transformers'
    class that makes it."""
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    if bits is not None:
        plan = plan_model(model, PolarQuantConfig(bits=bits))
        swap_to_empty(model, plan, awq=True, device=device)
    for module in model.modules():
        if isinstance(module, PolarModule):
            _fill(module)
        elif any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
    for module in model.modules():
        if not isinstance(module, PolarModule):
            model._init_weights(module)  # of a module without tensors too: a block may initialise its router's
    model.tie_weights()  # a plain head that shares the embedding was made apart from it
    return model.eval()


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _fill(module: PolarModule) -> None:
    """Random codes, and norms of a weight with standard deviation 0.02."""
    state = module.state_dict()
    state["packed"].random_(0, 256)
    state["norms"].normal_(0.02 * 128**0.5, 0.02)
    module.load_state_dict(state)
