"""Tiny random models of each architecture, quantised, and vLLM over them in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from single_experts import split_experts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from model_patch import PolarQuantConfig, load_model, patch_model
from model_patch.architectures import weight_name
from model_patch.checkpoint.reader import Checkpoint
from model_patch.patch import plan_model

ENGINE = Path(__file__).parent / "engine.py"

# Two ranks split every activation between 128-blocks, and no number of rows is one that vLLM pads to.
_DECODER = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # large enough for the tokens of greedy decoding to be far from ties
    "tie_word_embeddings": False,
}
_TIED = {"tie_word_embeddings": True}
_GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_SHARED = {"shared_expert_intermediate_size": 256}
_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_MEDIA = {"image_token_id": 490, "video_token_id": 491, "vision_start_token_id": 492, "vision_end_token_id": 493}


def _vision_language(config: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
    rope |= {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    text = _DECODER | _GATED_DELTA_NET | {"rope_parameters": rope} | more
    return config(text_config=text, vision_config=_VISION, **_MEDIA)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2_tied": lambda: Qwen2Config(**_DECODER | _TIED | {"hidden_size": 256}),  # its q, k and v have biases
    "qwen3": lambda: Qwen3Config(**_DECODER),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_DECODER | _EXPERTS),
    "qwen3_moe_large_vocabulary": lambda: Qwen3MoeConfig(**_DECODER | _EXPERTS | {"vocab_size": 4096}),
    "qwen3_narrow": lambda: Qwen3Config(**_DECODER | {"intermediate_size": 384}),  # not for two ranks
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**_DECODER | _GATED_DELTA_NET),
    "qwen3_5_text_tied": lambda: Qwen3_5TextConfig(**_DECODER | _GATED_DELTA_NET | _TIED),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeTextConfig(**_DECODER | _GATED_DELTA_NET | _EXPERTS | _SHARED),
    "qwen3_5": lambda: _vision_language(Qwen3_5Config),
    "qwen3_5_moe": lambda: _vision_language(Qwen3_5MoeConfig, **_EXPERTS, **_SHARED),
}


@dataclass
class Job:
    """What `engine.py` is asked for."""

    folder: str
    dtype: str = "float32"
    prompts: list[list[int]] = field(default_factory=lambda: [_ids(13, 7), _ids(40, 11), _ids(5, 3)])
    new_tokens: int = 12
    tensor_parallel: int = 1
    compiled: bool = False


def _ids(length: int, step: int) -> list[int]:
    return [1 + step * i % 480 for i in range(length)]


@dataclass
class Result:
    """tokens and logprobs of each prompt's continuation, or the error; log: of the process, so of all its jobs.

    quantized_bytes, plain_bytes: of the tensors that each rank holds, in the layers of ours and elsewhere.
    """

    log: str
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    quantized_bytes: list[int] = field(default_factory=list)
    plain_bytes: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass
class Quantized:
    """Quantised checkpoints of the tiny models by name, each made once."""

    root: Path
    _folders: dict[str, Path] = field(default_factory=dict)

    def folder(self, name: str, *, scales: str = "site", exclude: str = "", single_experts: bool = False) -> Path:
        """scales: "site", random AWQ scales that layers which read one activation share; "layer", of each layer its
        own, which vLLM cannot merge; "none". exclude: patterns of layers that stay plain, with spaces between.
        single_experts: stored one by one."""
        key = "-".join([name, scales, *exclude.replace("*", "").split()])
        if single_experts:
            return self._with_single_experts(self.folder(name, scales=scales, exclude=exclude))
        if key not in self._folders:
            model = self._model(name)
            config = PolarQuantConfig(modules_to_not_convert=exclude.split())
            patch_model(model, config, awq_scales=None if scales == "none" else _awq_scales(model, scales))
            self._folders[key] = self.root / key
            model.save_pretrained(self._folders[key])
        return self._folders[key]

    def _with_single_experts(self, fused: Path) -> Path:
        out = fused.with_name(f"{fused.name}-single")
        if not out.exists():
            shutil.copytree(fused, out)
            with safe_open(fused / "model.safetensors", framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
                tensors, metadata = split_experts(tensors, file.metadata())
            save_file(tensors, out / "model.safetensors", metadata=metadata)
        return out

    def _model(self, name: str) -> PreTrainedModel:
        torch.manual_seed(list(CONFIGS).index(name))
        config = CONFIGS[name]()
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1 and not key.endswith(("A_log", "dt_bias")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)  # biases and norms that show when lost
        return model.bfloat16()


def _awq_scales(model: PreTrainedModel, shared_by: str) -> dict[str, torch.Tensor]:
    """Scales from 0.5 to 2 for every linear layer that is quantised."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for names in plan_model(model, PolarQuantConfig()).sites().values():
        drawn = torch.empty(0)
        for index, name in enumerate(names):
            if index == 0 or shared_by == "layer":
                width = model.get_parameter(weight_name(name)).shape[-1]
                drawn = torch.rand(width, generator=generator).mul(2).sub(1).exp2()
            found[name] = drawn
    return found


@dataclass
class Engine:
    """vLLM over the checkpoints of `quantized`, and transformers to compare it with."""

    quantized: Quantized
    folders: Callable[[str], Path]

    def job(
        self, name: str, scales: str = "site", exclude: str = "", single_experts: bool = False, **options: Any
    ) -> Job:
        folder = self.quantized.folder(name, scales=scales, exclude=exclude, single_experts=single_experts)
        return Job(str(folder), **options)

    def result(self, tokens: list[list[int]], logprobs: list[list[float]]) -> Result:
        return Result("", tokens, logprobs)

    def environment(self) -> dict[str, str]:
        """This process's, without the interpreter that the tests of the kernels run in."""
        return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def run(self, jobs: list[Job]) -> list[Result]:
        """The jobs one after the other in one new process."""
        out = self.folders("engine") / "results.json"
        text = json.dumps([asdict(job) for job in jobs])
        command = [sys.executable, str(ENGINE), str(out)]
        process = subprocess.run(
            command, input=text, capture_output=True, text=True, env=self.environment(), timeout=600
        )
        log = process.stdout + process.stderr
        assert out.is_file(), log[-10000:]
        return [Result(log, **result) for result in json.loads(out.read_text())]

    def check_exact(self, job: Job, result: Result) -> None:
        """In fp32: transformers' own tokens, and its log-probabilities but for the order of sums."""
        assert result.error is None, result.log[-10000:]
        expected, below = reference_logprobs(job, result.tokens, torch.float32)
        assert below.max() == 0
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=1e-4, atol=1e-4)

    def check_rounded(self, job: Job, result: Result) -> None:
        """In bf16: as near to fp32 as transformers' bf16 is, and no token that fp32 would not find nearly as likely as
        its own."""
        assert result.error is None, result.log[-10000:]
        exact, below = reference_logprobs(job, result.tokens, torch.float32)
        rounded, _ = reference_logprobs(job, result.tokens, torch.bfloat16)
        error, allowed = (
            (scores - exact).square().mean().sqrt().item() for scores in (torch.tensor(result.logprobs), rounded)
        )
        assert error < 2 * allowed
        assert below.max() < 10 * allowed

    def check_bytes(self, job: Job, result: Result) -> None:
        """Held are the stored bytes, over the ranks, and what is small: tables, AWQ scales, rows that fill up to 64s,
        fp32 gates."""
        tensors = Checkpoint.open(Path(job.folder)).tensors
        split = sum(info.nbytes for name, info in tensors.items() if name.endswith((".packed", ".norms")))
        whole = sum(info.nbytes for name, info in tensors.items() if not name.endswith((".packed", ".norms")))
        ranks = job.tensor_parallel
        assert len(result.quantized_bytes) == len(result.plain_bytes) == ranks
        for quantized, plain in zip(result.quantized_bytes, result.plain_bytes, strict=True):
            assert split / ranks <= quantized < 1.05 * split / ranks
            assert plain < whole * (2 if job.dtype == "float32" else 1) + 1000  # on disk they are bf16


@torch.no_grad()
def reference_logprobs(job: Job, tokens: list[list[int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers, over the same checkpoint, gives to each of `tokens` after its prompt [prompts, new], and how
    far in log-probability each is below the likeliest."""
    model = load_model(job.folder, device="cpu", dtype=dtype)
    found, below = [], []
    for prompt, new in zip(job.prompts, tokens, strict=True):
        logits = model(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        scores = logits.float().log_softmax(-1)
        found.append(scores.gather(1, torch.tensor(new)[:, None])[:, 0])
        below.append(scores.amax(-1) - found[-1])
    return torch.stack(found), torch.stack(below)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(Quantized(tmp_path_factory.mktemp("quantized")), tmp_path_factory.mktemp)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        reason = "vllm is not installed: `make test-vllm` makes an environment that has it"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
