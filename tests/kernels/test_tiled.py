"""Products, dequantisation and lookups from tile layout, and layers that take it. On a CPU they are the reference."""

import itertools

import pytest
import torch
from int8_errors import INT8_ERROR, SHARED_ERROR

from polar_kernels import (
    ArgumentError,
    PolarEmbedding,
    PolarLinear,
    TiedPolarHead,
    lloyd_max_levels,
    ops,
    quantize_weight,
    reference,
)
from polar_kernels.kernels import tiled as kernels_tiled
from polar_kernels.tiles import level_table, tile_weight, untile_weight

BITS = [2, 3, 4, 5]
SHAPES = [(1, 128), (32, 128), (37, 200), (64, 384), (257, 1152)]
QWEN_SHAPES = [(12288, 4096), (4096, 12288), (1024, 4096)]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,)])
def test_lookup(device, tiled, relative_error, rounding, lead: tuple[int, ...], bits: int, ids_dtype) -> None:
    tiles, stored = tiled(70, 200, bits=bits)
    ids = torch.randint(0, 70, lead, device=device, dtype=ids_dtype)
    rows = ops.tiled_embedding(ids, *tiles, 70, 200, torch.float16)
    assert rows.shape == (*lead, 200)
    exact = reference.embedding(ids.long(), *stored, 200, torch.float64)
    assert not ids.numel() or relative_error(rows, exact) < rounding[torch.float16]


@pytest.mark.parametrize("wrong", [-1, 70])
def test_lookup_outside_the_table(device: torch.device, tiled, wrong: int) -> None:
    tiles, _ = tiled(70, 200)
    ids = torch.tensor([3, wrong, 69], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match="outside the table of 70 rows"):
            ops.tiled_embedding(ids, *tiles, 70, 200, torch.float16)
    else:
        rows = ops.tiled_embedding(ids, *tiles, 70, 200, torch.float16)
        assert rows.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 16, 33, 64, 65, 128, 192, 193, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(device, poisoned, tiled, relative_error, rows: int, dtype: torch.dtype, bias: bool) -> None:
    tiles, stored = tiled(257, 1152)
    x = torch.randn(rows, 1152, device=device).to(dtype)
    offset = torch.randn(257, device=device).to(dtype) if bias else None
    y = ops.tiled_linear(x, *tiles, offset, 257)
    exact = reference.linear(x.double(), *stored, offset)
    assert y.dtype == dtype
    assert y.shape == exact.shape
    assert not rows or relative_error(y, exact) < INT8_ERROR


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_product(device, poisoned, tiled, relative_error, rows: int, dtype: torch.dtype, bias: bool) -> None:
    """As close to fp64, within a factor of two, as the dense weight in the same dtype."""
    tiles, stored = tiled(257, 1152)
    x = torch.randn(rows, 1152, device=device).to(dtype)
    offset = torch.randn(257, device=device).to(dtype) if bias else None
    y = ops.tiled_linear(x, *tiles, offset, 257, exact=True)
    exact = reference.linear(x.double(), *stored, offset)
    assert y.dtype == dtype
    assert y.shape == exact.shape
    if rows:
        plain = torch.nn.functional.linear(x, reference.dequantize(*stored, 1152, dtype), offset)
        assert relative_error(y, exact) < 2 * relative_error(plain, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [64, 70, 200])
def test_product_of_many_rows_in_parts(
    device: torch.device, tiled, relative_error, rounding, monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool
) -> None:
    """Parts of 64 rows of the weight. On a CPU the kernel that fills the buffer is stood in for."""
    tiles, stored = tiled(rows, 384)

    def fill(tiles, tile_norms, awq_scales, level_table, out) -> None:
        parts = (*untile_weight(tiles, tile_norms, out.shape[0], 5), awq_scales, stored[3])
        out.copy_(reference.dequantize(*parts, 384, out.dtype))

    monkeypatch.setattr(kernels_tiled, "_SCRATCH_BYTES", 64 * 384 * 2)
    if device.type == "cpu":
        monkeypatch.setattr(kernels_tiled, "dequantize_tiles", fill)
    x = torch.randn(150, 384, device=device).half()
    offset = torch.randn(rows, device=device) if bias else None
    y = kernels_tiled.tiled_linear(x, *tiles, offset, rows, exact=True)
    assert relative_error(y, reference.linear(x.double(), *stored, offset)) < rounding[torch.float16]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 64, 100, 250])
def test_product_of_other_bits(device, poisoned, tiled, relative_error, rows: int, exact: bool, bits: int) -> None:
    tiles, stored = tiled(257, 1152, bits=bits)
    x = torch.randn(rows, 1152, device=device).half()
    y = ops.tiled_linear(x, *tiles, None, 257, exact)
    assert relative_error(y, reference.linear(x.double(), *stored)) < (0.001 if exact else INT8_ERROR)


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_shapes(device: torch.device, tiled, relative_error, shape: tuple[int, int], awq: bool) -> None:
    tiles, stored = tiled(*shape, awq)
    x = torch.randn(3, 5, shape[1], device=device).bfloat16()
    y = ops.tiled_linear(x, *tiles, None, shape[0])
    assert relative_error(y, reference.linear(x.double(), *stored)) < 1.5 * INT8_ERROR  # over few outputs


def test_product_in_fp32_is_exact(device: torch.device, tiled, relative_error) -> None:
    tiles, stored = tiled(70, 384)
    x = torch.randn(5, 384, device=device)
    exact = reference.linear(x.double(), *stored)
    assert relative_error(ops.tiled_linear(x, *tiles, None, 70), exact) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 204)])
def test_dequantize(device, poisoned, tiled, relative_error, rounding, shape, dtype: torch.dtype, bits: int) -> None:
    tiles, stored = tiled(*shape, bits=bits)
    dense = ops.tiled_dequantize(*tiles, *shape, dtype)
    exact = reference.dequantize(*stored, shape[1], torch.float64)
    assert dense.shape == shape
    assert relative_error(dense, exact) < rounding[dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [3, 20, 100])
def test_non_finite_activations_stay_in_their_row(device, tiled, value: float, rows: int, exact: bool) -> None:
    tiles, _ = tiled(64, 384, awq=False)
    x = torch.randn(rows, 384, device=device).half()
    clean = ops.tiled_linear(x, *tiles, None, 64, exact)
    x[1, 200] = value
    y = ops.tiled_linear(x, *tiles, None, 64, exact)
    others = torch.arange(rows) != 1
    assert torch.equal(y[others], clean[others])
    assert not y[1].isfinite().any()


def test_large_and_zero_activations(device: torch.device, tiled, relative_error) -> None:
    tiles, stored = tiled(64, 256)
    x = torch.zeros(2, 256, device=device).half()
    x[1] = 6000.0
    y = ops.tiled_linear(x, *tiles, None, 64)
    assert not y[0].any()
    exact = reference.linear(x.double(), *stored)
    # The worst case for one scale a block: equal values rotate into one large one beside small ones.
    assert relative_error(y[1], exact[1]) < 4 * INT8_ERROR


def test_gradients(device: torch.device, tiled, relative_error) -> None:
    tiles, stored = tiled(37, 200)
    x = torch.randn(4, 200, device=device, requires_grad=True)
    offset = torch.zeros(37, device=device, requires_grad=True)
    grad = torch.randn(4, 37, device=device)
    ops.tiled_linear(x, *tiles, offset, 37).backward(grad)
    dense = reference.dequantize(*stored, 200, torch.float64)
    assert relative_error(x.grad, grad.double() @ dense) < 1e-5
    assert torch.allclose(offset.grad, grad.sum(0))


@pytest.mark.parametrize("op", ["linear", "dequantize", "dequantize_into", "embedding"])
def test_opcheck(device: torch.device, tiled, op: str) -> None:
    tiles, _ = tiled(37, 200)
    if op == "linear":
        args = (torch.randn(4, 200, device=device).half(), *tiles, None, 37)
        torch.library.opcheck(ops.tiled_linear, args)
    elif op == "dequantize":
        torch.library.opcheck(ops.tiled_dequantize, (*tiles, 37, 200, torch.bfloat16))
    elif op == "dequantize_into":
        torch.library.opcheck(ops.tiled_dequantize_into, (*tiles, torch.zeros(37, 200, device=device).half()))
    else:
        ids = torch.tensor([[3, 36]], device=device)
        torch.library.opcheck(ops.tiled_embedding, (ids, *tiles, 37, 200, torch.bfloat16))


@pytest.mark.parametrize("name", ["tiles", "tile_norms", "level_table", "centroids", "x", "bias"])
def test_wrong_arguments(device: torch.device, tiled, name: str) -> None:
    tiles, _ = tiled(37, 200)
    args = dict(zip(("tiles", "tile_norms", "awq_scales", "level_table", "centroids"), tiles, strict=True))
    args |= {"x": torch.randn(2, 200, device=device), "bias": torch.zeros(37, device=device), "out_features": 37}
    args[name] = args[name][..., :-1]
    with pytest.raises(ArgumentError):
        torch.ops.polar.tiled_linear(**args)


@pytest.mark.gpu
def test_layer_on_a_gpu_keeps_one_copy(device: torch.device) -> None:
    layer = PolarLinear.from_linear(torch.nn.Linear(384, 70))
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(device)
    assert layer.packed is None
    assert layer.norms is None
    assert layer.tiles is not None
    assert {name: list(t.shape) for name, t in layer.state_dict().items()} == {
        n: list(t.shape) for n, t in stored.items()
    }
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in layer.state_dict().items())
    layer.cpu()
    assert layer.tiles is None
    assert torch.equal(layer.packed, stored["packed"])


@pytest.mark.gpu
def test_an_embedding_takes_tiles_once_a_head_is_tied_to_it(device: torch.device, relative_error) -> None:
    embedding = PolarEmbedding.from_embedding(torch.nn.Embedding(70, 256, device=device))
    ids, x = torch.tensor([0, 33, 69], device=device), torch.randn(2, 256, device=device)
    rows = embedding(ids)
    assert embedding.tiles is None
    head = TiedPolarHead(embedding)
    assert embedding.tiles is not None
    assert torch.equal(embedding(ids), rows)
    assert relative_error(head(x), x @ embedding.dequantize().T) < 1e-5


@pytest.mark.gpu
def test_layer_loads_a_state_dict_on_a_gpu(device: torch.device) -> None:
    source = PolarLinear.from_linear(torch.nn.Linear(384, 70))
    layer = PolarLinear(384, 70, device=device)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 384, device=device).bfloat16()
    assert torch.equal(layer(x), source.to(device)(x))


@pytest.mark.gpu
def test_exact_activation(device: torch.device, relative_error) -> None:
    layer = PolarLinear.from_linear(torch.nn.Linear(1152, 257, device=device))
    x = torch.randn(5, 1152, device=device).half()
    exact = reference.linear(x.double(), *_parts(layer), layer.bias)
    assert relative_error(layer(x), exact) > 0.003
    layer.activation = "exact"
    assert layer.tiles is not None
    assert relative_error(layer(x), exact) < 0.001
    with pytest.raises(ArgumentError, match="activation"):
        layer.activation = "int4"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 128, 1000])
@pytest.mark.parametrize("shape", QWEN_SHAPES)
def test_qwen_shapes(device, poisoned, relative_error, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, device=device) * torch.rand(shape[0], 1, device=device)
    layer = PolarLinear.from_weight(quantize_weight(weight, awq_scales=torch.rand(shape[1], device=device) + 0.5))
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    dense = layer.dequantize(torch.float32).double()
    exact = x.double() @ dense.T
    assert relative_error(layer(x), exact) < (SHARED_ERROR if rows > 32 else INT8_ERROR)
    layer.activation = "exact"
    plain = torch.nn.functional.linear(x, dense.to(dtype))
    assert relative_error(layer(x), exact) < 2 * relative_error(plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["int8", "exact"])
@pytest.mark.parametrize("rows", [3, 70, 300])
def test_graph_capture(device: torch.device, rows: int, activation: str) -> None:
    layer = PolarLinear.from_linear(torch.nn.Linear(1152, 257, device=device)).half()
    layer.activation = activation
    x = torch.randn(rows, 1152, device=device).half()
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["int8", "exact"])
@pytest.mark.parametrize("rows", [1, 8, 16, 48, 100])
def test_layers_in_a_row(device: torch.device, rows: int, activation: str) -> None:
    """Kernels that start before those ahead of them have ended give what they give when each is waited for."""
    sizes = (1024, 4096, 512, 8192, 1024, 1024)
    layers = [
        PolarLinear.from_linear(torch.nn.Linear(columns, features, device=device)).half()
        for columns, features in itertools.pairwise(sizes)
    ]
    for layer in layers:
        layer.activation = activation

    def chain(x: torch.Tensor, wait: bool) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
            if wait:
                torch.cuda.synchronize()
        return x

    x = torch.randn(rows, sizes[0], device=device).half()
    chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, False)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, chain(x, True))


def _parts(layer: PolarLinear) -> tuple:
    weight = layer.polar_weight
    return weight.packed, weight.norms, weight.awq_scales, weight.centroids


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [4, 40, 100, 300])
def test_activations_in_any_stride(device: torch.device, tiled, rows: int, exact: bool) -> None:
    tiles, _ = tiled(257, 1152)
    x = torch.randn(1, 1152, device=device).half()
    expanded = x.expand(rows, 1152)
    assert torch.equal(
        ops.tiled_linear(expanded, *tiles, None, 257, exact),
        ops.tiled_linear(expanded.clone(), *tiles, None, 257, exact),
    )
    strided = torch.randn(1152, 2 * rows, device=device).half().T[::2]
    assert torch.equal(
        ops.tiled_linear(strided, *tiles, None, 257, exact), ops.tiled_linear(strided.clone(), *tiles, None, 257, exact)
    )


@pytest.mark.gpu
def test_a_weight_of_more_than_2_to_the_31_elements(device: torch.device, relative_error) -> None:
    rows, columns = 262400, 8192
    packed = torch.randint(0, 256, (rows, columns * 5 // 8), dtype=torch.uint8, device=device)
    norms = torch.rand(rows, columns // 128, device=device).add(0.5).half()
    last = slice(rows - 64, rows)
    end = (packed[last].clone(), norms[last].clone(), None, lloyd_max_levels(5).to(device))
    tiles = (*tile_weight(packed, norms, 5), None, level_table(end[3]), end[3])
    del packed, norms
    for count in (1, 40):
        for exact in (False, True):
            x = torch.randn(count, columns, device=device).half()
            y = ops.tiled_linear(x, *tiles, None, rows, exact)[:, last]
            assert relative_error(y, reference.linear(x.double(), *end)) < 1.5 * INT8_ERROR


@pytest.mark.gpu
def test_on_a_gpu_that_is_not_the_current_one(relative_error) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layer = PolarLinear.from_linear(torch.nn.Linear(1152, 257, device="cuda:1"))
    for rows in (3, 40, 100, 300):
        x = torch.randn(rows, 1152, device="cuda:1").half()
        exact = reference.linear(x.double(), *_parts(layer), layer.bias)
        assert relative_error(layer(x), exact) < INT8_ERROR
    with pytest.raises(ArgumentError, match="is on cuda:1 but should be on cuda:0"):
        layer(torch.randn(3, 1152, device="cuda:0").half())
