"""PolarEmbedding: `nn.Embedding` whose rows are decoded as they are looked up, and the output head tied to one."""

import torch
from torch import nn

from polar_kernels import ops
from polar_kernels.module import PolarModule
from polar_kernels.quantize import quantize_weight
from polar_kernels.weight import PolarWeight


class PolarEmbedding(PolarModule):
    """A drop-in for `nn.Embedding` at inference.

    ids: int32 or int64 [...]; result: [..., embedding_dim] in the module's dtype, which follows `.to(dtype)`.
    An id outside the table raises IndexError on a CPU; on a GPU, where that cannot be seen, its row is NaN.
    """

    _output: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int = 5,
        awq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero table to load a state dict into. `padding_idx` is kept for callers; it has no effect."""
        self._serves_head = False
        super().__init__(num_embeddings, embedding_dim, bits, awq, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # Carries the output dtype, since no stored tensor has it.
        self.register_buffer("_output", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_weight(
        cls, weight: PolarWeight, dtype: torch.dtype = torch.bfloat16, padding_idx: int | None = None
    ) -> "PolarEmbedding":
        """A module around an already quantised table; tensors are shared, not copied."""
        layer = cls(weight.out_features, weight.in_features, padding_idx, bits=weight.bits, device="meta")
        layer._set_weight(weight)
        layer._output = torch.empty(0, dtype=dtype, device=weight.packed.device)
        return layer

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, bits: int = 5, *, centroids: torch.Tensor | None = None
    ) -> "PolarEmbedding":
        """Quantise an embedding on its device; see `quantize_weight` for the errors."""
        weight = quantize_weight(embedding.weight.detach(), bits, centroids=centroids)
        layer = cls.from_weight(weight, embedding.weight.dtype, embedding.padding_idx)
        return layer.train(embedding.training)

    @property
    def dtype(self) -> torch.dtype:
        return self._output.dtype

    def serve_head(self) -> None:
        """Expect to be multiplied by as well: on a GPU that has tile layout, take it."""
        self._serves_head = True
        self.settle()

    def _multiplies(self) -> bool:
        return self._serves_head

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W_hat [num_embeddings, embedding_dim], a new tensor."""
        return self._dense(dtype or self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tiles is not None:
            parts = (self.tiles, self.tile_norms, self.awq_scales, self.level_table, self.centroids)
            return ops.tiled_embedding(ids, *parts, self.num_embeddings, self.embedding_dim, self.dtype)
        return ops.embedding(
            ids, self.packed, self.norms, self.awq_scales, self.centroids, self.embedding_dim, self.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, dtype={self.dtype}"


class TiedPolarHead(nn.Module):
    """The output projection of a model whose head and embedding are one weight: it reads the embedding's codes.

    x: [..., embedding_dim]; y: [..., num_embeddings] in x's dtype. It has no tensors of its own, so the shared ones
    are moved, saved and loaded once, by the embedding.
    """

    def __init__(self, embedding: PolarEmbedding) -> None:
        super().__init__()
        self._shared = (embedding,)  # in a tuple, so that it is not registered as a child a second time
        embedding.serve_head()

    @property
    def embedding(self) -> PolarEmbedding:
        return self._shared[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding.multiply(x, None)
