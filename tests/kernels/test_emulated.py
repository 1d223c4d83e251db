"""Kernels written in assembly, in Triton's interpreter, which runs none: here it is carried out for all threads of a
program at once. What cannot be seen so: the order in which threads, and kernels that overlap, do things."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from emulated_wgmma import Bands, ExactBands, multiply_groups, unswizzle
from emulator import emulate

from polar_kernels import reference
from polar_kernels.kernels import (
    exact_wgmma,
    expert_pairs,
    expert_wgmma,
    int8_dense,
    int8_wgmma,
    norm_quantize,
    quantize_activation,
    quantize_chunks,
    requantize_tiles,
    tiled_experts,
)
from polar_kernels.kernels.band_programs import Program
from polar_kernels.kernels.exact_matmul import exact_linear
from polar_kernels.kernels.int8_matmul import int8_linear, multiply_quantized, padded_rows
from polar_kernels.kernels.wgmma_forms import EXACT_FORMS, FORMS, Form
from polar_kernels.packing import unpack_codes
from polar_kernels.tiles import LEVEL_STEP, level_table, tile_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
E, H, MIDDLE, K = 2, 160, 16, 2


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)


@pytest.fixture
def stack(random_weight) -> Callable[..., tuple[tiled_experts.Tiled, tuple]]:
    """A projection of experts in tile layout and as it is stored."""

    def make(rows: int, columns: int, bits: int) -> tuple[tiled_experts.Tiled, tuple]:
        packed, norms, scales, centroids = random_weight(E * rows, columns, bits)
        norms /= 8
        tiled = tiled_experts.Tiled(*tile_weight(packed, norms, bits), scales, level_table(centroids), centroids)
        return tiled, (packed.unflatten(0, (E, rows)), norms.unflatten(0, (E, rows)), scales, centroids)

    return make


@pytest.mark.parametrize(
    ("form", "tokens", "bits", "exact"),
    [
        ("whole bands", 2, 5, False),
        ("whole bands", 2, 4, True),
        ("half bands", 2, 4, False),
        ("half bands", 2, 5, True),
        ("groups of 8", 4, 5, False),
        ("groups of 16", 5, 4, False),
        ("groups of 16", 5, 5, True),
        ("groups of 32", 21, 5, False),
    ],
)
def test_experts(stack, relative_error, monkeypatch, form: str, tokens: int, bits: int, exact: bool) -> None:
    """With one token that chooses an expert that does not exist."""
    gate_up, down = stack(2 * MIDDLE, H, bits), stack(H, MIDDLE, bits)
    shape = expert_pairs.Shape(4, 2 if form == "half bands" else 1)
    monkeypatch.setattr(expert_pairs, "_choose_shape", lambda bands: shape)
    monkeypatch.setattr(tiled_experts, "_FEW_PAIRS", 0 if form.startswith("groups") else 128)
    top_k = 5 if form == "whole bands" else K  # more than the warps of a program
    weights, index = torch.rand(tokens, top_k), torch.randint(E, (tokens, top_k))
    x = torch.randn(tokens, H).half()
    exactly = reference.experts(x.double(), index, weights, *gate_up[1], *down[1])
    index[1, 1] = E
    out = tiled_experts.tiled_experts(x, index, weights, gate_up[0], down[0], E, MIDDLE, exact)
    others = torch.arange(tokens) != 1
    assert relative_error(out[others], exactly[others]) < (2e-3 if exact else 0.03)
    assert out[1].isnan().all()


@pytest.mark.parametrize(("x_rows", "rows"), [(9, 72), (3, 300)])
def test_product_of_most_rows(random_weight, relative_error, monkeypatch, x_rows: int, rows: int) -> None:
    """But for what `multiply_groups` does: both operands' chunks, parts of the weight, where results are stored."""
    columns = 512
    packed, norms, scales, centroids = random_weight(rows, columns, 5)
    monkeypatch.setattr(int8_dense, "multiply_groups", multiply_groups)
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows)
    x[1, 3] = torch.nan
    own = (*tile_weight(packed, norms, 5), scales, level_table(centroids), bias, rows)
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    sound = torch.arange(len(x)) != 1
    for scratch_bytes in (1 << 20, 128 * columns):
        monkeypatch.setattr(int8_dense, "_SCRATCH_BYTES", scratch_bytes)
        y = int8_dense.int8_dense_linear(x, *own)
        assert y[1].isnan().all()
        assert relative_error(y[sound], exact[sound]) < 0.02


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_requantized_weight(random_weight, relative_error, bits: int) -> None:
    """Integers times scales are the weight in the rotated domain, rounded: a step is about 1 / 40 of its deviation."""
    rows, columns = 150, 1024
    packed, norms, _, centroids = random_weight(rows, columns, bits)
    norms[3, :4] = 0
    tiles, tile_norms = tile_weight(packed, norms, bits)
    table = level_table(centroids)
    chunks, own = (torch.full((2, 8, requantize_tiles.CHUNK_WORDS), -1, dtype=torch.int32) for _ in range(2))
    scales = requantize_tiles.requantize_tiles(tiles, tile_norms, table, 8, chunks)
    x, awq_scales = torch.randn(3, columns).bfloat16(), torch.rand(columns).add(0.5).half()
    words, own_scales = requantize_tiles.quantize_both(x, awq_scales, tiles, tile_norms, table, own, 2)
    alone = quantize_chunks.quantize_chunks(x, awq_scales, table, 128)
    assert torch.equal(own[0], chunks[0])
    assert torch.equal(own_scales, scales)
    assert torch.equal(words[0, :, 0, : 3 * 32], alone[0, :, 0, : 3 * 32])  # the three rows of x
    scales_and_halves = (128 * 32 + torch.tensor([0, 1, 2, 3, 4, 6])).view(1, -1)  # in the last of four blocks
    assert torch.equal(words[0, 3::4, 0, scales_and_halves], alone[0, 3::4, 0, scales_and_halves])
    integers = np.stack([unswizzle(chunk.numpy().reshape(128, 8, 4)) for chunk in chunks.flatten(0, 1)])
    levels = torch.from_numpy(integers).view(2, 8, 128, 128).transpose(1, 2).reshape(256, 8, 128)[:rows]
    delta = table[LEVEL_STEP].view(torch.float32)
    found = levels * (scales * delta).T[:rows].repeat_interleave(4, 1)[..., None]
    exact = centroids[unpack_codes(packed, bits).long()].double().view(rows, 8, 128) * norms[..., None].double()
    assert torch.equal(found[3, :4], torch.zeros(4, 128).double())
    assert relative_error(found, exact) < 0.01
    assert 100 <= levels.abs().max() <= 127


@pytest.mark.parametrize(
    ("form", "x_rows", "rows", "columns", "split_blocks"),
    [
        (FORMS[0], 67, 70, 128, 8),  # two programs of rows
        (FORMS[1], 9, 72, 1160, 8),
        (FORMS[1], 70, 70, 1160, 4),  # one share has less than the others, two programs that share K
        (FORMS[2], 9, 136, 1160, 4),  # two programs of columns, and three that share K
        (FORMS[3], 9, 72, 256, 8),
        (FORMS[4], 130, 72, 1160, 4),
    ],
)
def test_product_of_many_rows(
    random_weight, relative_error, monkeypatch, form: Form, x_rows: int, rows: int, columns: int, split_blocks: int
) -> None:
    """But for what `multiply_bands` does: the chunks, the halves, how sums are added up and stored."""
    packed, norms, scales, centroids = random_weight(rows, columns, 5)
    tiles, tile_norms = tile_weight(packed, norms, 5)
    monkeypatch.setattr(int8_wgmma, "multiply_bands", Bands(tiles, tile_norms, level_table(centroids), columns))
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows)
    x[1, 3] = torch.nan
    own = (tiles, tile_norms, scales, level_table(centroids), bias, rows)
    y = int8_wgmma.int8_wgmma_linear(x, *own, (form, split_blocks))
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    sound = torch.arange(len(x)) != 1
    assert y[1].isnan().all()
    assert relative_error(y[sound], exact[sound]) < 0.02


@pytest.mark.parametrize(
    ("form", "x_rows", "rows", "columns", "split_blocks", "bits"),
    [
        (EXACT_FORMS[0], 33, 136, 128, 8, 5),  # two programs of rows, two of columns
        (EXACT_FORMS[1], 9, 70, 1160, 4, 3),  # one share has less than the others, two programs that share K
        (EXACT_FORMS[2], 9, 72, 1160, 4, 5),
        (EXACT_FORMS[3], 70, 72, 1160, 64, 5),  # one share has nothing
        (EXACT_FORMS[4], 130, 72, 256, 4, 4),
    ],
)
def test_exact_product_of_many_rows(
    random_weight,
    relative_error,
    monkeypatch,
    form: Form,
    x_rows: int,
    rows: int,
    columns: int,
    split_blocks: int,
    bits: int,
) -> None:
    """But for what `multiply_bands_exactly` does."""
    packed, norms, scales, centroids = random_weight(rows, columns, bits)
    tiles, tile_norms = tile_weight(packed, norms, bits)
    bands = ExactBands(tiles, tile_norms, centroids, columns, bits)
    monkeypatch.setattr(exact_wgmma, "multiply_bands_exactly", bands)
    monkeypatch.setattr(exact_wgmma, "open_pairs", lambda table, thread, *_: thread)
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows)
    x[1, 3] = torch.nan
    own = (tiles, tile_norms, scales, level_table(centroids), bias, rows)
    y = exact_wgmma.exact_wgmma_linear(x, *own, (form, split_blocks))
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    sound = torch.arange(len(x)) != 1
    assert y[1].isnan().all()
    assert relative_error(y[sound], exact[sound]) < 6e-4


def test_groups_of_64(stack, relative_error, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 64 pairs for one of the experts, and one that does not exist for a pair."""
    gate_up, down = stack(2 * MIDDLE, H, 5), stack(H, MIDDLE, 5)
    weights, index = torch.rand(70, 1), (torch.arange(70)[:, None] == 7).long()
    x = torch.randn(70, H).half()
    exactly = reference.experts(x.double(), index, weights, *gate_up[1], *down[1])
    index[1] = -1

    def told(words: Any, grouped: Any, out: torch.Tensor, tiles: torch.Tensor, *others: Any) -> Any:
        own = gate_up[0] if tiles is gate_up[0].tiles else down[0]
        columns = H if own is gate_up[0] else MIDDLE
        bands = Bands(own.tiles, own.tile_norms, own.level_table, columns)
        monkeypatch.setattr(expert_wgmma, "multiply_bands", bands)
        return product(words, grouped, out, tiles, *others)

    product = expert_wgmma.expert_wgmma
    monkeypatch.setattr(expert_wgmma, "expert_wgmma", told)
    monkeypatch.setattr(tiled_experts, "_FEW_PAIRS", 0)
    monkeypatch.setattr(tiled_experts, "has_wgmma", lambda device: True)
    out = tiled_experts.tiled_experts(x, index, weights, gate_up[0], down[0], E, MIDDLE, False)
    others = torch.arange(70) != 1
    assert relative_error(out[others], exactly[others]) < 0.03
    assert out[1].isnan().all()


@pytest.mark.parametrize("linear", [int8_linear, exact_linear])
@pytest.mark.parametrize(
    ("x_rows", "rows", "columns", "bits", "awq", "program"),
    [
        (1, 40, 200, 5, True, Program(8, 128, 2)),
        (9, 70, 680, 4, False, Program(4, 128)),
        (4, 32, 128, 2, True, Program(16, 128, 2)),
        (16, 70, 1160, 5, False, Program(8, 128)),
        (9, 40, 200, 3, True, Program(4, 128, 2)),
        (3, 32, 2200, 5, True, Program(16, 128)),
    ],
)
def test_product_of_few_rows(
    random_weight,
    relative_error,
    monkeypatch,
    linear: Callable,
    x_rows: int,
    rows: int,
    columns: int,
    bits: int,
    awq: bool,
    program: Program,
) -> None:
    """With rows that are not finite, which stay by themselves."""
    monkeypatch.setattr(import_module(linear.__module__), "choose_program", lambda *shape, **mode: program)
    packed, norms, scales, centroids = random_weight(rows, columns, bits, awq=awq)
    own = (*tile_weight(packed, norms, bits), scales, level_table(centroids))
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows) if awq else None
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    y = linear(x, *own, bias, rows)
    assert y.dtype == x.dtype
    assert relative_error(y, exact) < (6e-4 if linear is exact_linear else 0.02)
    if x_rows > 2:
        x[1, 3], x[2, 100] = torch.nan, torch.inf
        sound = (torch.arange(x_rows) != 1) & (torch.arange(x_rows) != 2)
        z = linear(x, *own, bias, rows)
        assert torch.equal(z[sound], y[sound])
        assert z[~sound].isnan().all()


def test_exact_products_of_extreme_activations(random_weight, relative_error) -> None:
    """Zeros are zeros; the largest of fp16 and far beyond its range are as good as any."""
    packed, norms, _, centroids = random_weight(40, 1024, 5)
    norms /= 1024
    own = (*tile_weight(packed, norms, 5), None, level_table(centroids))
    x = torch.randn(4, 1024).clamp(-1, 1).half()
    x[1] = 0
    x[2, :384] = 0
    x[3] *= 65504
    y = exact_linear(x, *own, None, 40)
    exact = reference.linear(x.double(), packed, norms, None, centroids)
    assert not y[1].any()
    for row in (0, 2, 3):
        assert relative_error(y[row], exact[row]) < 6e-4
    x = torch.stack([torch.randn(1024) * scale for scale in (1e-27, 1e-10, 1e20, 1e34)]).bfloat16()
    y = exact_linear(x, *own, None, 40)
    exact = reference.linear(x.double(), packed, norms, None, centroids)
    for row in range(4):
        assert relative_error(y[row], exact[row]) < 2**-7  # the interpreter cuts off where a GPU rounds


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("columns", [200, 640])
def test_norm_before_a_product(random_weight, relative_error, columns: int, centered: bool) -> None:
    """The words are those of the norm's rounded output, and so is what it writes."""
    *_, scales, centroids = random_weight(40, columns, 5)
    table = level_table(centroids)
    x, weight = 3 * torch.randn(3, columns).half(), torch.randn(columns).half()
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    y = (y * (1 + weight.float())).half() if centered else y.half() * weight
    out = torch.full_like(x, torch.nan)
    words, meta = norm_quantize.norm_quantize(x, weight, 1e-6, scales, table, 8, centered=centered, out=out)
    assert relative_error(out, y) < 1e-4
    expected = quantize_activation.quantize_activation(out, scales, table, 8)
    rows = [part.view(-1, 2, 8, 16)[:, :, :3] for part in (words, expected[0])]  # of fragments
    assert torch.equal(*rows)
    assert torch.equal(meta[:, :3], expected[1][:, :3])
    alone = norm_quantize.norm_quantize(x, weight, 1e-6, scales, table, 8, centered=centered)
    assert torch.equal(alone[0].view(-1, 2, 8, 16)[:, :, :3], rows[0])


def test_residual_after_a_product(random_weight) -> None:
    packed, norms, scales, centroids = random_weight(40, 200, 5)
    tiles, table = tile_weight(packed, norms, 5), level_table(centroids)
    x, residual = torch.randn(9, 200).half(), torch.randn(9, 40).half()
    words, meta = quantize_activation.quantize_activation(x, scales, table, padded_rows(9))
    out = torch.full((9, 40), torch.nan).half()
    multiply_quantized(words, meta, *tiles, table, None, residual, out)
    assert torch.equal(out, int8_linear(x, *tiles, scales, table, None, 40) + residual)
