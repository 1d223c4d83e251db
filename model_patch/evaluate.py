"""Perplexity of a text, and distance to a reference model: KL divergence and top-1 agreement.

Two conventions of which tokens of a window are scored. Hugging Face's guide: windows begin every `stride` tokens and
score only what no earlier one has; a window's first token has no context and is not scored. llama.cpp: windows side by
side, each scoring its second half, so that every scored token has at least half a window before it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_patch.errors import CheckpointError, ConfigError
from model_patch.progress import Progress, no_progress

_LOGIT_BYTES = 1 << 29  # of the fp32 logits of a batch of windows

# Window's number, its token ids [T], how many are scored -> fp32 log-probabilities [scored, V].
Reference = Callable[[int, torch.Tensor, int], torch.Tensor]


class Convention(StrEnum):
    """Which tokens of a window are scored."""

    hugging_face = "hugging-face"
    llama_cpp = "llama.cpp"


@dataclass(frozen=True)
class Evaluation:
    """perplexity_error: standard error from the spread of the windows' means (0 for one window). kl_divergence: mean
    over the scored tokens, nats, of the reference's distribution to the model's; kl_divergence_99: what 99 % of them
    do not exceed; top1_agreement: share of them at which both rank the same token first; None without a reference."""

    windows: int
    window: int
    stride: int
    convention: str
    tokens: int
    perplexity: float
    perplexity_error: float
    kl_divergence: float | None = None
    kl_divergence_99: float | None = None
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
    convention: Convention = Convention.hugging_face,
    reference: PreTrainedModel | Reference | None = None,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> Evaluation:
    """Score `tokens` [T] with `model`, and compare with `reference` if given; a last, short window is left out.

    batch_size: windows that the model is run on at a time.

    Raises CheckpointError when the text has no whole window, ConfigError as `check_windows` does.
    """
    check_windows(convention, window, stride)
    stride = stride or window
    windows = tokens.unfold(0, window, stride)[:limit] if len(tokens) >= window else tokens[:0]
    if not len(windows):
        raise CheckpointError("text", f"it has {len(tokens)} tokens, fewer than one window of {window}")
    check_vocabulary(tokens, model)
    expect = model_reference(reference, tokens) if isinstance(reference, PreTrainedModel) else reference
    device = next(model.parameters()).device
    losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    agreement = torch.zeros((), dtype=torch.long, device=device)
    for index in range(len(windows)):
        if index % batch_size == 0:
            batch = windows[index : index + batch_size].to(device)
            outputs = model(batch, use_cache=False).logits
        ids = batch[index % batch_size]
        scored = count_scored(convention, index, window, stride)
        logits = _predictions(outputs[index % batch_size], scored)
        losses.append(-logits.gather(-1, ids[-scored:, None]).squeeze(-1).double().cpu())
        if expect is not None:
            expected = _same_vocabulary(expect(index, ids, scored), logits)
            divergences.append((expected.exp() * (expected - logits)).sum(-1).cpu())
            agreement += (expected.argmax(-1) == logits.argmax(-1)).sum()
        progress(index + 1, len(windows), "scoring")
    scores = _perplexity(losses) | (_distance(torch.cat(divergences), int(agreement)) if divergences else {})
    return Evaluation(len(losses), window, stride, convention.value, sum(len(loss) for loss in losses), **scores)


def check_windows(convention: Convention, window: int, stride: int | None) -> None:
    """Raise ConfigError for a window of which nothing is scored, and for a stride that llama.cpp does not have."""
    least = 3 if convention is Convention.llama_cpp else 2
    if window < least:
        problem = f"it must have at least {least} tokens, found {window}: none would be scored"
        raise ConfigError(f"window: with {convention.value} {problem}")
    if convention is Convention.llama_cpp and stride not in (None, window):
        raise ConfigError(f"llama.cpp's windows lie side by side: leave out the stride {stride}")


def count_scored(convention: Convention, index: int, window: int, stride: int) -> int:
    """How many tokens at the end of window `index` are scored."""
    if convention is Convention.llama_cpp:
        return window - 1 - window // 2
    return window - 1 if index == 0 else min(stride, window - 1)


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """fp32 log-probabilities [scored, V] of the distributions that predict the window's last `scored` tokens."""
    return _predictions(model(ids[None], use_cache=False).logits[0], scored)


def _predictions(logits: torch.Tensor, scored: int) -> torch.Tensor:
    return logits[-scored - 1 : -1].float().log_softmax(-1)


def model_reference(model: PreTrainedModel, tokens: torch.Tensor) -> Reference:
    """The predictions of `model`, which must know the tokens. Calls raise CheckpointError for predictions with NaN."""
    check_vocabulary(tokens, model)

    def predict(_: int, ids: torch.Tensor, scored: int) -> torch.Tensor:
        found = log_probabilities(model, ids.to(model.device), scored).to(ids.device)
        return check_predictions(found)

    return predict


def check_predictions(found: torch.Tensor) -> torch.Tensor:
    """Raise CheckpointError for a reference's predictions with NaN."""
    if found.isnan().any():
        raise CheckpointError("reference", "its predictions have NaN: NaN or infinity in the weights?")
    return found


def windows_at_a_time(model: PreTrainedModel, window: int) -> int:
    """Windows of so many tokens to run a model on: one on a CPU, as many as there is room for on a GPU."""
    weight = model.get_output_embeddings().weight
    return max(1, _LOGIT_BYTES // (4 * window * weight.shape[0])) if weight.is_cuda else 1


def check_vocabulary(tokens: torch.Tensor, model: PreTrainedModel) -> None:
    """Raise CheckpointError for tokens the model does not know."""
    size = model.config.get_text_config().vocab_size
    if (largest := int(tokens.max())) >= size:
        problem = f"it has the token {largest}, and the model {size} of them: another tokenizer?"
        raise CheckpointError("text", problem)


def _same_vocabulary(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    if expected.shape != found.shape:
        sizes = f"its vocabulary has {expected.shape[-1]} tokens, that of the model {found.shape[-1]}"
        raise CheckpointError("reference", sizes)
    return expected


def _perplexity(losses: list[torch.Tensor]) -> dict[str, float]:
    mean = float(torch.cat(losses).mean())
    if not math.isfinite(mean):
        raise CheckpointError("model", f"its predictions have a mean loss of {mean}: NaN or infinity in the weights?")
    means = torch.stack([loss.mean() for loss in losses])
    spread = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else 0.0
    perplexity = math.exp(mean)
    return {"perplexity": perplexity, "perplexity_error": perplexity * spread}


def _distance(divergences: torch.Tensor, agreement: int) -> dict[str, float]:
    count = len(divergences)
    return {
        "kl_divergence": float(divergences.double().mean()),
        "kl_divergence_99": float(divergences.kthvalue(math.ceil(0.99 * count)).values),
        "top1_agreement": agreement / count,
    }
