"""Perplexity, its standard error and the distance to a reference, against a direct computation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from model_patch import CheckpointError, ConfigError, PolarQuantConfig, demo, patch_model
from model_patch.evaluate import Convention, evaluate, log_probabilities, text_windows, tokenize_file

LENGTH = 103


@pytest.fixture
def model(zoo: Any) -> PreTrainedModel:
    return zoo.model("qwen3")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 500, (LENGTH,), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def scored_losses(
    model: PreTrainedModel, tokens: torch.Tensor, window: int, stride: int, limit: int | None = None
) -> list[dict[int, float]]:
    """For each window, place in the text -> negative log likelihood in fp64, of the places no earlier window had."""
    found: list[dict[int, float]] = []
    seen: set[int] = set()
    start = 0
    while start + window <= len(tokens) and (limit is None or len(found) < limit):
        ids = tokens[start : start + window]
        log_probabilities = model(ids[None].to(model.device)).logits[0].double().log_softmax(-1).cpu()
        places = [start + i for i in range(1, window) if start + i not in seen]
        found.append({place: -float(log_probabilities[place - start - 1, tokens[place]]) for place in places})
        seen.update(places)
        start += stride
    return found


@pytest.mark.parametrize(
    ("window", "stride", "windows", "scored"),
    [
        (20, None, 5, 5 * 19),  # side by side: the first token of each is not scored
        (20, 20, 5, 5 * 19),
        (20, 7, 12, 19 + 11 * 7),
        (20, 19, 5, 5 * 19),
        (20, 1, 84, 102),
        (20, 30, 3, 3 * 19),  # text between the windows is left out
        (103, None, 1, 102),
        (103, 50, 1, 102),
        (102, 1, 2, 102),
    ],
)
def test_every_token_is_scored_once(
    model: PreTrainedModel, tokens: torch.Tensor, window: int, stride: int | None, windows: int, scored: int
) -> None:
    result = evaluate(model, tokens, window=window, stride=stride)
    expected = scored_losses(model, tokens, window, stride or window)
    losses = [loss for window_losses in expected for loss in window_losses.values()]
    assert len(losses) == scored
    assert (result.windows, result.tokens) == (windows, scored) == (len(expected), len(losses))
    assert (result.window, result.stride) == (window, stride or window)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.kl_divergence is None
    assert result.top1_agreement is None


@pytest.mark.parametrize("options", [{"stride": 7}, {"limit": 3}, {"convention": Convention.llama_cpp}])
@pytest.mark.parametrize("batch_size", [2, 50])
def test_windows_run_together_score_the_same(
    zoo: Any, model: PreTrainedModel, tokens: torch.Tensor, options: dict[str, Any], batch_size: int
) -> None:
    shapes = []
    model.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    one, together = (
        evaluate(model, tokens, window=20, reference=zoo.model("qwen3_5_text"), batch_size=size, **options)
        for size in (1, batch_size)
    )
    count = one.windows
    assert [shape[0] for shape in shapes[count:]] == [min(batch_size, count - i) for i in range(0, count, batch_size)]
    assert together.tokens == one.tokens
    assert together.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert together.kl_divergence == pytest.approx(one.kl_divergence, rel=1e-4)


def test_limit_counts_windows(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    result = evaluate(model, tokens, window=20, stride=10, limit=3)
    assert (result.windows, result.tokens) == (3, 19 + 2 * 10)
    assert result == evaluate(model, tokens[:40], window=20, stride=10)
    assert evaluate(model, tokens, window=20, limit=99).windows == 5


def test_standard_error_is_that_of_the_windows_means(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    result = evaluate(model, tokens, window=20, stride=7)
    means = [sum(losses.values()) / len(losses) for losses in scored_losses(model, tokens, 20, 7)]
    mean = sum(means) / len(means)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in means) / (len(means) - 1))
    assert result.perplexity_error == pytest.approx(result.perplexity * deviation / math.sqrt(len(means)), rel=1e-4)
    assert evaluate(model, tokens, window=103).perplexity_error == 0


def test_a_model_agrees_with_itself(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    result = evaluate(model, tokens, window=20, stride=7, reference=model)
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1


@torch.no_grad()
def test_distance_to_a_reference(zoo: Any, model: PreTrainedModel, tokens: torch.Tensor) -> None:
    quantized = zoo.model("qwen3")
    patch_model(quantized, PolarQuantConfig(3))
    result = evaluate(quantized, tokens, window=25, stride=25, reference=model)
    divergences, same = [], 0
    for ids in tokens[:100].view(4, 1, 25).to(model.device):
        expected, found = (m(ids).logits[0, :-1].double().softmax(-1) for m in (model, quantized))
        divergences += (expected * (expected / found).log()).sum(-1).tolist()
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    assert result.tokens == len(divergences) == 96
    assert result.kl_divergence == pytest.approx(sum(divergences) / 96, rel=1e-4)
    assert result.kl_divergence_99 == pytest.approx(sorted(divergences)[95], rel=1e-4)  # 95 of 96 are less than 99 %
    assert result.kl_divergence > 0.01
    assert result.top1_agreement == same / 96 < 1


@torch.no_grad()
def test_99_of_100_do_not_exceed_it(model: PreTrainedModel) -> None:
    """With 200 tokens, two are above; a reference is made up whose divergence at token i is known to be the i-th."""
    tokens = torch.randint(0, 500, (201,), generator=torch.Generator().manual_seed(4))
    found = log_probabilities(model, tokens.to(model.device), 200)

    def expect(index: int, ids: torch.Tensor, scored: int) -> torch.Tensor:
        return (found * torch.linspace(1, 2, scored, device=ids.device)[:, None]).log_softmax(-1)

    result = evaluate(model, tokens, window=201, reference=expect)
    expected = expect(0, tokens.to(model.device), 200)
    divergences = (expected.exp() * (expected - found)).sum(-1).cpu()
    assert int((divergences > result.kl_divergence_99).sum()) == 2


@torch.no_grad()
def test_llama_cpp_scores_the_second_half_of_each_window(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """perplexity.cpp: logits from n_ctx / 2 on predict the tokens after them, n_ctx - 1 - n_ctx / 2 a window."""
    result = evaluate(model, tokens, window=20, convention=Convention.llama_cpp)
    losses = [
        -float(log_probabilities(model, ids.to(model.device), 19)[place - 1, ids[place]])
        for ids in tokens[:100].view(5, 20)
        for place in range(11, 20)
    ]
    assert (result.windows, result.tokens, result.convention) == (5, 45, "llama.cpp")
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 45), rel=1e-5)
    with pytest.raises(ConfigError, match="side by side: leave out the stride 7"):
        evaluate(model, tokens, window=20, stride=7, convention=Convention.llama_cpp)


@pytest.mark.parametrize(("convention", "least"), [(Convention.llama_cpp, 3), (Convention.hugging_face, 2)])
def test_a_window_of_which_nothing_is_scored(
    model: PreTrainedModel, tokens: torch.Tensor, convention: Convention, least: int
) -> None:
    found = evaluate(model, tokens, window=least, convention=convention)
    assert found.tokens == found.windows == LENGTH // least
    with pytest.raises(ConfigError, match=f"window: with {convention.value} it must have at least {least} tokens"):
        evaluate(model, tokens, window=least - 1, convention=convention)


def test_perplexity_does_not_depend_on_the_reference(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    alone, beside = evaluate(model, tokens, window=20), evaluate(model, tokens, window=20, reference=model)
    assert (alone.perplexity, alone.perplexity_error) == (beside.perplexity, beside.perplexity_error)


def test_progress_is_told_of_every_window(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    steps: list[tuple[int, int]] = []
    evaluate(model, tokens, window=20, progress=lambda done, total, _: steps.append((done, total)))
    assert steps == [(i, 5) for i in range(1, 6)]


def test_text_windows(tokens: torch.Tensor) -> None:
    assert torch.equal(text_windows(tokens, 20), tokens[:100].view(5, 20))
    assert torch.equal(text_windows(tokens, 20, 2), tokens[:40].view(2, 20))
    assert text_windows(tokens, 104).shape == (0, 104)
    assert text_windows(tokens, 103, 7).shape == (1, 103)


def test_too_short_a_text_is_refused(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="103 tokens, fewer than one window of 104"):
        evaluate(model, tokens, window=104)


def test_tokens_the_model_does_not_know_are_refused(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    tokens[50] = 512
    with pytest.raises(CheckpointError, match="it has the token 512, and the model 512 of them"):
        evaluate(model, tokens, window=20)


def test_a_text_file_becomes_its_tokens_without_special_ones(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    text = "The river , which runs north , was named after a ship .\n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = tokenize_file(tokenizer, tmp_path / "text.txt")
    assert ids.dim() == 1
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("content", [b"caf\xe9 au lait", b"\xff\xfeT\x00e\x00"])
def test_a_file_that_is_no_utf8_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"text\.txt: cannot be read as UTF-8 text"):
        tokenize_file(AutoTokenizer.from_pretrained(demo.MODEL), tmp_path / "text.txt")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.txt: cannot be read"):
        tokenize_file(AutoTokenizer.from_pretrained(demo.MODEL), tmp_path / "none.txt")
