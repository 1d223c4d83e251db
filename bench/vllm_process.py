"""One engine of vLLM, timed: a process of its own that `vllm_engine.py` starts.

Given are a job, as JSON, and the file that its result goes to, {start_seconds, points: [{requests, steps, seconds:
[[short, long]], prompts, tokens, logprobs}]}; the last three of the first requests. Nothing here imports model_patch:
vLLM finds it by itself.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

_COMPARED_TOKENS = 8


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and time each number of requests."""
    from vllm import LLM

    config = json.loads((Path(job["folder"]) / "config.json").read_text())
    limit = config.get("text_config", config)["max_position_embeddings"]
    most = max(job["requests"])
    started = time.perf_counter()
    engine = LLM(
        job["folder"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        load_format="dummy" if job["dummy"] else "auto",
        max_model_len=min(limit, 2048),
        max_num_seqs=most,
        max_num_batched_tokens=max(most * job["prompt"], min(limit, 2048)),  # all prompts in one step
        enable_prefix_caching=False,
        gpu_memory_utilization=job["memory"],
        enforce_eager=job["eager"],
        compilation_config={} if job["eager"] else {"cudagraph_capture_sizes": sorted(job["requests"])},
        additional_config={"gdn_prefill_backend": "triton"},  # FlashInfer's would be compiled first, or be missing
        **({"language_model_only": True} if "vision_config" in config else {}),
    )
    seconds = time.perf_counter() - started
    vocabulary = config.get("text_config", config)["vocab_size"]
    return {"start_seconds": seconds, "points": [_point(engine, job, count, vocabulary) for count in job["requests"]]}


def _point(engine: Any, job: dict[str, Any], count: int, vocabulary: int) -> dict[str, Any]:
    def generate(tokens: int, logprobs: int | None = None) -> tuple[float, list[list[int]], list[Any]]:
        from vllm import SamplingParams

        prompts = [_prompt(job["prompt"], vocabulary) for _ in range(count)]
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
        started = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        seconds = time.perf_counter() - started
        found = [output.outputs[0] for output in outputs]
        if any(len(output.token_ids) != tokens for output in found):
            raise RuntimeError(f"{tokens} tokens were asked for, found {[len(o.token_ids) for o in found]}")
        return seconds, prompts, found

    _, prompts, outputs = generate(_COMPARED_TOKENS, logprobs=1)
    seconds = [(generate(job["short"])[0], generate(job["long"])[0]) for _ in range(job["runs"] + 1)][1:]
    some = outputs[: job["compared"]]
    return {
        "requests": count,
        "steps": job["long"] - job["short"],
        "seconds": seconds,
        "prompts": prompts[: len(some)],
        "tokens": [list(output.token_ids) for output in some],
        "logprobs": [
            [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)] for output in some
        ],
    }


def _prompt(length: int, vocabulary: int) -> list[int]:
    return [random.randrange(vocabulary) for _ in range(length)]  # noqa: S311  (no secret)


def main() -> None:
    result = run(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM's own processes import this file too
    main()
