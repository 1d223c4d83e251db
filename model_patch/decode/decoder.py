"""The steps of an accelerated model: which there are, when they are captured, and a sequence's way through them."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from model_patch.decode.state import DecodeState
from model_patch.decode.step import Step
from model_patch.errors import UnsupportedModelError
from polar_kernels import ArgumentError, PolarError, PolarExperts, PolarModule

_SHORTEST = 512  # tokens a step attends to at the least; a step for each doubling, up to max_length


class Decoder:
    """State and steps of one model. `busy` is held while a batch is decoded; `grouped`: accelerate grouped layers."""

    grouped = False

    def __init__(self, model: PreTrainedModel, max_length: int, batch_size: int, compile: bool) -> None:
        self.model, self.max_length, self.batch_size = model, max_length, batch_size
        self._fuse = compile
        self.busy = threading.Lock()
        # Later versions of transformers renamed `past_key_values`.
        names = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise PolarError("an accelerated model cannot be copied: call decelerate(model) first")

    def refusal(
        self, rows: int, generation_config: GenerationConfig, model_kwargs: dict[str, Any], new_tokens: int
    ) -> str | None:
        """Why these prompts cannot be decoded here, or None when they can."""
        cache: Any = model_kwargs.get(self.cache_name)
        if rows > self.batch_size:
            return f"a batch of {rows} is more than accelerate(batch_size={self.batch_size})"
        if type(cache) is not DynamicCache or cache.offloading or generation_config.is_assistant:
            return f"its cache is of another kind ({type(cache).__name__})"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "attentions or hidden states are asked for"
        if self.model.training:
            return "the model is in training mode"
        positions = model_kwargs["position_ids"]
        if positions.dim() != self._state.positions.dim():
            return f"position_ids have {positions.dim()} dimensions"
        length = positions.shape[-1] + new_tokens - 1  # the last token is not read again
        if length > self.max_length:
            return f"prompt and new tokens need {length} places, more than accelerate(max_length={self.max_length})"
        return None

    def begin(self, rows: int, new_tokens: int, cache: Cache, model_kwargs: dict[str, Any]) -> None:
        """Take over from the prompts in `cache`, for up to `new_tokens` steps."""
        length = cache.get_seq_length()
        if length + new_tokens > self.max_length:
            raise ArgumentError(
                f"{length} tokens in the cache and {new_tokens} to come are more than max_length={self.max_length}; "
                f"position_ids tell of {model_kwargs['position_ids'].shape[-1]}: they must cover what the cache holds"
            )
        if self._built_for != self._fingerprint():
            self._prepare()
        self._rows, self._length = rows, length
        with self._explained():
            for window in self._windows(length + 1, length + new_tokens):
                self._step(rows, window)  # capturing overwrites the state, so that it is done before
        if self._on_gpu:
            # A step that an earlier call has queued ahead may still run, on another thread's stream.
            torch.cuda.synchronize(self.model.device)
        self._state.load(cache, rows, model_kwargs.get("attention_mask"), model_kwargs["position_ids"])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [rows], the newest ones -> logits [rows, 1, vocabulary] of those after them."""
        self._state.tokens[: self._rows].copy_(tokens[:, None])
        self._length += 1
        return self._step(self._rows, self._windows(self._length, self._length)[0])()

    def first_step(self, rows: int) -> Step:
        """The step of so many sequences over the shortest cache, for measurements. Running it spoils the state."""
        self._state.slot.zero_()
        return self._step(rows, self._windows(1, 1)[0])

    def end(self, cache: Cache) -> None:
        """Bring `cache`, which `begin` was given, up to date."""
        self._state.store(cache, self._rows, self._length)

    @torch.inference_mode(False)
    @torch.no_grad()  # inside, since leaving inference mode turns gradients on
    def _prepare(self) -> None:
        self._steps: dict[tuple[int, int], Step] = {}
        self._built_for: tuple[Any, ...] | None = None
        with self._explained():
            self._state = DecodeState(self.model, self.cache_name, self.batch_size, self.max_length)
            self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
            for rows in sorted({1, self.batch_size}):
                for window in self._windows(1, self.max_length):
                    self._step(rows, window)
        self._built_for = self._fingerprint()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of a capture as the project's own, with what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise PolarError(
                f"no memory for the cache of {self.batch_size} sequences of {self.max_length} tokens and the graphs "
                f"over it: lower batch_size or max_length ({str(error).splitlines()[0]})"
            ) from error
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise PolarError(f"torch.compile failed ({reason}); accelerate(compile=False) does without") from error

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def _windows(self, first: int, last: int) -> list[int]:
        """Lengths of the steps that sequences need while they grow from `first` to `last` tokens."""
        window = _SHORTEST
        while window < first:
            window *= 2
        windows = [window]
        while windows[-1] < last:
            windows.append(2 * windows[-1])
        return sorted({min(window, self.max_length) for window in windows})

    def _step(self, rows: int, window: int) -> Step:
        if (rows, window) not in self._steps:
            step = Step(self.model, self._state, self.cache_name, rows, window)
            if self._pool is not None:
                step.capture(self._pool, self._fuse)
            self._steps[rows, window] = step
        return self._steps[rows, window]

    def _fingerprint(self) -> tuple[Any, ...]:
        """What a captured step depends on: where the weights are, and how they are multiplied."""
        modules = [
            (id(module), module.activation if isinstance(module, PolarModule) else None)
            for module in self.model.modules()
        ]
        tensors = [(t.data_ptr(), t.dtype) for t in (*self.model.parameters(), *self.model.buffers())]
        return (*modules, *tensors)


def check_arguments(model: PreTrainedModel, max_length: int, batch_size: int) -> None:
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive integer, found {value!r}")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(str(device) for device in devices))
        raise UnsupportedModelError(f"accelerate wants the whole model on one CPU or CUDA device, found it on {found}")
    plain = [name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    plain = [name for name in plain if not isinstance(model.get_submodule(name), PolarExperts)]
    if model.device.type == "cuda" and plain:
        raise UnsupportedModelError(
            f"{plain[0]}: transformers' experts wait for the CPU within a step, which no graph can: quantise them "
            "(patch_model), or decode without accelerate (--plain)"
        )
