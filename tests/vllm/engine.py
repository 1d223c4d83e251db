"""vLLM in a process of its own, for the tests: jobs as JSON on stdin, their results as JSON in a file.

A job is {folder, dtype, prompts: [[id]], new_tokens, tensor_parallel, compiled}. Its result, of greedy decoding, is
{tokens: [[id]], logprobs: [[float]], quantized_bytes and plain_bytes: [of each rank]}, or {error: text} where vLLM did
not start. Nothing here imports model_patch.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def weigh(model: Any) -> tuple[int, int]:
    """Bytes of the tensors in the layers of ours, and of the other parameters."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    quantized = [tensor.nbytes for name, tensor in named.items() if ".polar." in name]
    return sum(quantized), sum(p.nbytes for p in model.parameters())


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = None
    try:
        engine = LLM(
            job["folder"],
            dtype=job["dtype"],
            tensor_parallel_size=job["tensor_parallel"],
            enforce_eager=not job["compiled"],
            skip_tokenizer_init=True,
            max_model_len=64,
            limit_mm_per_prompt={"image": 0, "video": 0},
        )
        count = job["new_tokens"]
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
        outputs = [r.outputs[0] for r in engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy)]
        quantized, plain = zip(*engine.apply_model(weigh), strict=True)
        return {
            "quantized_bytes": quantized,
            "plain_bytes": plain,
            "tokens": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
                for output in outputs
            ],
        }
    except Exception as error:  # noqa: BLE001  (of any kind: the tests look for our text in it)
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `weigh`, sent to the workers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    jobs = json.load(sys.stdin)
    if any(job["tensor_parallel"] > 1 for job in jobs):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    Path(sys.argv[1]).write_text(json.dumps([run(job) for job in jobs]))


if __name__ == "__main__":  # vLLM's workers import this file too
    main()
