"""PolarEmbedding as a drop-in for nn.Embedding."""

import copy
import pickle

import pytest
import torch
from torch import nn

from polar_kernels import (
    ArgumentError,
    NoDenseWeightError,
    PolarEmbedding,
    PolarLinear,
    TiedPolarHead,
    published_levels,
    quantize_weight,
)
from polar_kernels.checks import FLOATS

N, K = 37, 200
STORED = {"packed": torch.uint8, "norms": torch.float16, "centroids": torch.float32}


@pytest.fixture
def table(device: torch.device) -> nn.Embedding:
    return nn.Embedding(N, K, padding_idx=3, device=device)


@pytest.fixture
def layer(table: nn.Embedding) -> PolarEmbedding:
    return PolarEmbedding.from_embedding(table)


def test_from_embedding(table: nn.Embedding, layer: PolarEmbedding) -> None:
    stored = quantize_weight(table.weight.detach())
    assert torch.equal(layer.packed, stored.packed)
    assert torch.equal(layer.norms, stored.norms)
    assert (layer.num_embeddings, layer.embedding_dim, layer.bits) == (N, K, 5)
    assert layer.awq_scales is None
    error = (layer.dequantize() - table.weight).square().mean() / table.weight.square().mean()
    assert error < 0.004


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
def test_rows(device: torch.device, layer: PolarEmbedding, shape: tuple[int, ...], ids_dtype: torch.dtype) -> None:
    ids = torch.randint(0, N, shape, device=device, dtype=ids_dtype)
    rows = layer(ids)
    assert rows.shape == (*shape, K)
    torch.testing.assert_close(rows, layer.dequantize()[ids.long()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_dtype_follows_the_embedding(device: torch.device, dtype: torch.dtype) -> None:
    layer = PolarEmbedding.from_embedding(nn.Embedding(N, K, device=device, dtype=dtype))
    ids = torch.tensor([1, 2], device=device)
    assert layer.dtype == layer(ids).dtype == layer.dequantize().dtype == dtype
    assert PolarEmbedding(N, K, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_dtype_follows_casts(device: torch.device, layer: PolarEmbedding, dtype: torch.dtype) -> None:
    ids, before = torch.tensor([1, 2], device=device), {k: v.clone() for k, v in layer.state_dict().items()}
    expected = layer(ids)
    assert layer.to(dtype) is layer
    assert layer(ids).dtype == dtype
    torch.testing.assert_close(layer(ids).float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == STORED
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_cast_by_a_model(device: torch.device, layer: PolarEmbedding) -> None:
    model = nn.Sequential(layer, nn.Linear(K, 2, device=device)).bfloat16()
    assert model(torch.tensor([1], device=device)).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [N, -1])
def test_id_outside_the_table(device: torch.device, layer: PolarEmbedding, bad: int) -> None:
    ids = torch.tensor([1, bad, 2], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError):
            layer(ids)
        return
    rows = layer(ids)
    assert rows[1].isnan().all()
    assert torch.equal(rows[[0, 2]], layer(ids[[0, 2]]))


def test_padding_idx(device: torch.device, table: nn.Embedding, layer: PolarEmbedding) -> None:
    assert layer.padding_idx == 3
    assert PolarEmbedding(N, K).padding_idx is None
    assert not layer(torch.tensor([3], device=device)).any()
    assert not table.weight[3].any()


@pytest.mark.parametrize("awq", [False, True])
def test_state_dict_round_trip(device: torch.device, awq: bool) -> None:
    scales = torch.rand(K) + 0.5 if awq else None
    stored = quantize_weight(torch.randn(N, K, device=device), 6, awq_scales=scales, centroids=published_levels(6))
    layer = PolarEmbedding.from_weight(stored)
    assert layer.dtype == torch.bfloat16
    state = layer.state_dict()
    assert set(state) == {*STORED, *(["awq_scales"] if awq else [])}
    fresh = PolarEmbedding(N, K, bits=6, awq=awq, device=device, dtype=torch.bfloat16)
    assert fresh.load_state_dict(state) == ([], [])
    ids = torch.arange(N, device=device)
    assert torch.equal(fresh(ids), layer(ids))


@pytest.mark.parametrize("missing", STORED)
def test_missing_key(layer: PolarEmbedding, missing: str) -> None:
    state = {key: value for key, value in layer.state_dict().items() if key != missing}
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{missing}"'):
        PolarEmbedding(N, K).load_state_dict(state)


def test_empty_copies_of_a_meta_layer(device: torch.device, layer: PolarEmbedding) -> None:
    fresh = PolarEmbedding(N, K, device="meta").to_empty(device=device)
    fresh.load_state_dict(layer.state_dict())
    ids = torch.arange(N, device=device)
    assert torch.equal(fresh(ids), layer(ids))


def test_a_fresh_layer_is_zero(device: torch.device) -> None:
    rows = PolarEmbedding(N, K, device=device)(torch.arange(N, device=device))
    assert torch.equal(rows, torch.zeros(N, K, device=device))


def test_no_dense_weight(layer: PolarEmbedding) -> None:
    with pytest.raises(NoDenseWeightError, match="PolarEmbedding holds 5-bit codes and no dense weight"):
        _ = layer.weight
    assert not hasattr(layer, "weight")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(device: torch.device, layer: PolarEmbedding, duplicate) -> None:
    twin, ids = duplicate(layer.half()), torch.arange(N, device=device)
    assert torch.equal(twin(ids), layer(ids))
    assert twin(ids).dtype == torch.float16
    assert twin.packed.data_ptr() != layer.packed.data_ptr()


def test_tensors_are_shared_with_the_weight(device: torch.device) -> None:
    """A tied head and embedding hold one tensor."""
    stored = quantize_weight(torch.randn(N, K, device=device))
    layer = PolarEmbedding.from_weight(stored, torch.float16, padding_idx=1)
    assert layer.packed is layer.polar_weight.packed is stored.packed
    assert (layer.dtype, layer.padding_idx, layer.polar_weight.in_features) == (torch.float16, 1, K)


def test_wrong_ids(device: torch.device, layer: PolarEmbedding) -> None:
    with pytest.raises(ArgumentError, match=r"ids must be int32 or int64, found torch\.float32"):
        layer(torch.ones(2, device=device))


def test_training_mode_and_parameters(table: nn.Embedding) -> None:
    layer = PolarEmbedding.from_embedding(table.eval())
    assert not layer.training
    assert list(layer.parameters()) == []


def test_repr(layer: PolarEmbedding) -> None:
    assert repr(layer) == "PolarEmbedding(37, 200, bits=5, dtype=torch.float32)"


def test_tied_head(device: torch.device, layer: PolarEmbedding) -> None:
    head, x = TiedPolarHead(layer), torch.randn(2, 3, K, device=device)
    assert head.embedding is layer
    assert torch.equal(head(x), PolarLinear.from_weight(layer.polar_weight)(x))
    assert [*head.state_dict(), *head.parameters(), *head.buffers(), *head.children()] == []
    with torch.autocast(device.type, torch.bfloat16):
        assert head(x).dtype == torch.bfloat16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_model_stays_tied(device: torch.device, layer: PolarEmbedding, duplicate) -> None:
    model = duplicate(nn.ModuleDict({"embedding": layer, "head": TiedPolarHead(layer)}))
    assert model["head"].embedding is model["embedding"]
    assert model["embedding"] is not layer
    other = PolarEmbedding.from_embedding(nn.Embedding(N, K, device=device))
    model["embedding"].load_state_dict(other.state_dict())
    x = torch.randn(2, K, device=device)
    assert torch.equal(model["head"](x), TiedPolarHead(other)(x))


@pytest.mark.gpu
def test_stays_on_the_gpu(layer: PolarEmbedding) -> None:
    assert {buffer.device.type for buffer in layer.buffers()} == {"cuda"}
    assert {buffer.device.type for buffer in layer.cpu().buffers()} == {"cpu"}
    assert layer(torch.tensor([1, 2])).device.type == "cpu"
