"""One decoding step: a token for each row in, its logits out; on a GPU, a CUDA graph."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from model_patch.decode.attention import decode_attention_of
from model_patch.decode.fusion import fused
from model_patch.decode.gated_delta_net import delta_steps
from model_patch.decode.layer_step import layer_steps
from model_patch.decode.state import DecodeState

_WARM_UPS = 2  # the first compiles kernels, the second allocates as the capture will


class Step:
    """Reads `state.tokens`, writes the cache, and moves places on by one.

    Nothing that changes from token to token is a Python number in here: the graph would repeat it for ever.
    """

    def __init__(self, model: PreTrainedModel, state: DecodeState, cache_name: str, rows: int, length: int) -> None:
        self._model, self._state = model, state
        self._config = model.config.get_text_config(decoder=True)
        self._tokens, self._positions = state.tokens[:rows], state.positions[..., :rows, :]
        self._mask = state.mask[:rows, :, :, :length]
        self._cache = {cache_name: state.view(rows, length)}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Logits [rows, 1, vocabulary], op by op."""
        self._mask.index_fill_(3, self._state.slot, True)
        with decode_attention_of(self._config):
            out = self._model(
                input_ids=self._tokens,
                attention_mask=self._mask,
                position_ids=self._positions,
                use_cache=True,
                return_dict=True,
                logits_to_keep=1,
                **self._cache,
            )
        self._state.slot.add_(1)
        self._positions.add_(1)
        return out.logits

    @torch.inference_mode(False)
    def capture(self, pool: Any, fuse: bool) -> None:
        """Make the CUDA graph, in memory shared with the other graphs of `pool`; of fused kernels, or of those that
        run without. Overwrites the state."""
        with delta_steps(self._model), layer_steps(self._model), fused(self._model) if fuse else nullcontext():
            self._capture(pool)

    def __call__(self) -> torch.Tensor:
        """Logits [rows, 1, vocabulary]; those of a graph are overwritten by its next step."""
        if self._graph is None:
            return self.run()
        self._graph.replay()
        assert self._logits is not None  # capture made both
        return self._logits

    def _capture(self, pool: Any) -> None:
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.device(self._model.device):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._rewind()
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self._rewind()
            graph = torch.cuda.CUDAGraph()
            # Another thread, a streamer's say, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._logits = self.run()
        self._graph = graph

    def _rewind(self) -> None:
        self._state.slot.zero_()
        self._state.positions.zero_()
