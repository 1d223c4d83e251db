"""The plug into vLLM: checkpoints of the format served with its batching, its paged attention and tensor parallelism.

vLLM finds `register` by its entry point, in every process it starts; a user imports nothing.
"""


def register() -> None:
    """Make vLLM know `quant_method: polarquant`. Harmless to call again, and in a vLLM that is too old."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from model_patch.config import METHOD
    from model_patch.vllm.config import VllmPolarConfig
    from model_patch.vllm.versions import is_supported

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(VllmPolarConfig)
    if is_supported():  # an old one is refused where a checkpoint asks for it, since others must go on working
        from model_patch.vllm.embedding import register_embedding

        register_embedding()
