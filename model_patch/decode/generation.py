"""`generate` of an accelerated model: prompts by transformers' own forward, the tokens after them by captured steps."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from model_patch.decode.decoder import Decoder
from model_patch.decode.outbox import Outbox

if TYPE_CHECKING:
    from transformers.generation import GenerationMixin as _Base
else:
    _Base = object


class AcceleratedGeneration(_Base):
    """Comes before the model's own class; what it does not take goes there, with a warning."""

    _decoder: Decoder

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Greedy decoding and sampling: as GenerationMixin._sample, step by step the same choices."""
        decoder = self._decoder
        new_tokens = generation_config.max_length - input_ids.shape[1]
        reason = decoder.refusal(len(input_ids), generation_config, model_kwargs, new_tokens)
        if synced_gpus:
            reason = "several GPUs generate in step"
        if reason is None and not decoder.busy.acquire(blocking=False):
            reason = "another call is decoding on this model"
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if reason is not None:
            _warn(reason)
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        try:
            return self._decode(*arguments, streamer, model_kwargs)
        finally:
            decoder.busy.release()

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        _warn("beam search")
        return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        _warn("assisted decoding")
        return super()._assisted_decoding(*args, **kwargs)

    def _decode(
        self,
        ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        decoder, rows, last = self._decoder, len(ids), config.max_length
        outputs = self._prefill(ids, config, model_kwargs)
        logits, cache = outputs.logits, outputs[decoder.cache_name]
        kept = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        decoder.begin(rows, last - ids.shape[1] - 1, cache, model_kwargs)
        if not kept:
            cache.layers.clear()  # the state holds a copy; `generate` would keep this one to its end
        del outputs
        record = _Record(config)
        unfinished = torch.ones(rows, dtype=torch.long, device=ids.device)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        outbox = Outbox(rows, ids.device)
        while True:
            raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            scores = logits_processor(ids, raw)
            record.add(scores, raw)
            tokens = _choose(scores, config.do_sample)
            if ends:  # a row that is done goes on with padding
                tokens = tokens * unfinished + config._pad_token_tensor.to(ids.device) * (1 - unfinished)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~stopping_criteria(ids, record.scores)
            outbox.post(tokens, unfinished)
            # The GPU goes on before the host knows whether it has to; a cache that is kept must not see a step more.
            ahead = not kept and ids.shape[1] < last
            if ahead:
                logits = decoder.step(tokens)
            sent, goes_on = outbox.read()
            if streamer is not None:
                streamer.put(sent)
            if not goes_on:
                break
            if not ahead:
                logits = decoder.step(tokens)
        if streamer is not None:
            streamer.end()
        if kept:
            decoder.end(cache)
        if not config.return_dict_in_generate:
            return ids
        kept_cache = {decoder.cache_name: cache}
        return GenerateDecoderOnlyOutput(sequences=ids, scores=record.scores, logits=record.logits, **kept_cache)


class _Record:
    """Scores and logits of every step, where the config asks for them."""

    def __init__(self, config: GenerationConfig) -> None:
        kept = config.return_dict_in_generate
        self.scores: tuple[torch.Tensor, ...] | None = () if kept and config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if kept and config.output_logits else None

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)


def _choose(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    """scores [rows, vocabulary] -> tokens [rows]."""
    if sample:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return torch.argmax(scores, dim=-1)


def _warn(reason: str) -> None:
    warnings.warn(f"{reason}: this call decodes without the captured steps of accelerate(), slower", stacklevel=2)
