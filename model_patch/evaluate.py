"""Perplexity of a text, and distance to a reference model: KL divergence and top-1 agreement.

Windows as Hugging Face's guide has them: they begin every `stride` tokens, are `window` tokens long, and each scores
only the tokens that no earlier one has scored; a window's first token has no context and is not scored.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_patch.errors import CheckpointError
from model_patch.progress import Progress, no_progress


@dataclass(frozen=True)
class Evaluation:
    """perplexity_error: standard error from the spread of the windows' means (0 for one window). kl_divergence: mean
    over the scored tokens, nats, of the reference's distribution to the model's; top1_agreement: share of them at
    which both rank the same token first; both None without a reference."""

    windows: int
    window: int
    stride: int
    tokens: int
    perplexity: float
    perplexity_error: float
    kl_divergence: float | None = None
    top1_agreement: float | None = None


def tokenize_file(tokenizer: PreTrainedTokenizerBase, text: Path) -> torch.Tensor:
    """Token ids [T] of a text file, without special tokens."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(text, f"cannot be read as UTF-8 text: {error}") from error
    return tokenizer(content, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def text_windows(tokens: torch.Tensor, window: int, limit: int | None = None) -> torch.Tensor:
    """The first `limit` whole windows [W, window] of tokens, side by side."""
    count = min(len(tokens) // window, limit or len(tokens))
    return tokens[: count * window].view(count, window)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    reference: PreTrainedModel | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Score `tokens` [T] with `model`, and compare with `reference` if given; a last, short window is left out.

    Raises CheckpointError when the text has no whole window.
    """
    stride = stride or window
    starts = list(range(0, len(tokens) - window + 1, stride))[:limit]
    if not starts:
        raise CheckpointError("text", f"it has {len(tokens)} tokens, fewer than one window of {window}")
    _check_vocabulary(tokens, model, reference)
    device = next(model.parameters()).device
    losses: list[torch.Tensor] = []
    divergence, agreement = 0.0, 0
    for index, start in enumerate(starts):
        ids = tokens[start : start + window].to(device)
        scored = window - 1 if index == 0 else min(stride, window - 1)
        logits = _log_probabilities(model, ids, scored)
        losses.append(-logits.gather(-1, ids[-scored:, None]).squeeze(-1).double().cpu())
        if reference is not None:
            expected = _log_probabilities(reference, ids, scored)
            divergence += float((expected.exp() * (expected - logits)).sum())
            agreement += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        progress(index + 1, len(starts), "scoring")
    return _summary(losses, window, stride, *((divergence, agreement) if reference is not None else (None, None)))


def _check_vocabulary(tokens: torch.Tensor, model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
    """Raise CheckpointError for tokens the model does not know, and for a reference with another vocabulary."""
    size = model.config.get_text_config().vocab_size
    if (largest := int(tokens.max())) >= size:
        raise CheckpointError("text", f"it has the token {largest}, and the model {size} of them: another tokenizer?")
    if reference is not None and (other := reference.config.get_text_config().vocab_size) != size:
        raise CheckpointError("reference", f"its vocabulary has {other} tokens, that of the model {size}")


def _log_probabilities(model: PreTrainedModel, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """fp32 log-probabilities [scored, V] of the distributions that predict the window's last `scored` tokens."""
    return model(ids[None], use_cache=False).logits[0, -scored - 1 : -1].float().log_softmax(-1)


def _summary(
    losses: list[torch.Tensor], window: int, stride: int, divergence: float | None, agreement: int | None
) -> Evaluation:
    everything = torch.cat(losses)
    mean, tokens = float(everything.mean()), len(everything)
    if not math.isfinite(mean):
        raise CheckpointError("model", f"its predictions have a mean loss of {mean}: NaN or infinity in the weights?")
    means = torch.stack([loss.mean() for loss in losses])
    spread = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0
    perplexity = math.exp(mean)
    return Evaluation(
        windows=len(losses),
        window=window,
        stride=stride,
        tokens=tokens,
        perplexity=perplexity,
        perplexity_error=perplexity * spread,
        kl_divergence=None if divergence is None else divergence / tokens,
        top1_agreement=None if agreement is None else agreement / tokens,
    )
