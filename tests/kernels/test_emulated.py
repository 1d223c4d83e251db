"""Kernels written in assembly, in Triton's interpreter, which runs none: here it is carried out for all threads of a
program at once. What cannot be seen so: the order in which threads, and kernels that overlap, do things."""

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from emulator import Words, as_tensor, emulate

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
from polar_kernels.kernels.exact_blocks import exact_chunk_words
from polar_kernels.kernels.exact_matmul import exact_linear
from polar_kernels.kernels.int8_matmul import int8_linear, multiply_quantized, padded_rows
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.kernels.wgmma_forms import EXACT_FORMS, FORMS, Form
from polar_kernels.packing import unpack_codes
from polar_kernels.tiles import FP16_PAIRS, LEVEL_STEP, PART_LEVELS, PARTS, level_table, tile_weight, untile_weight

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


class Bands:
    """In place of `multiply_bands`, whose instructions are out of reach here: from the chunks of x that it reads, and
    the weight [rows, K] that was told, the sums it would have."""

    def __init__(self, tiles: torch.Tensor, tile_norms: torch.Tensor, table: torch.Tensor, columns: int) -> None:
        self.blocks = -(-columns // 128)
        rows = len(tiles) // self.blocks * 32
        packed, norms = untile_weight(tiles, tile_norms, rows, 5)
        norms = torch.nn.functional.pad(norms.float(), (0, -self.blocks % 4)).unflatten(1, (-1, 4))
        largest = norms.amax(-1, keepdim=True)
        parts = (norms / largest.clamp(min=1e-9) * PARTS).round().long().flatten(1)
        # Levels are these, and a half.
        tables = table[PART_LEVELS:FP16_PAIRS].view(PARTS + 1, 4).view(torch.int8).long()
        codes = (
            torch.nn.functional.pad(unpack_codes(packed, 5), (0, -self.blocks % 4 * 128)).long().unflatten(1, (-1, 128))
        )
        positive = tables[parts[..., None], torch.where(codes < 16, 15 - codes, codes - 16)]
        self.levels = torch.where(codes < 16, -1 - positive, positive).double().numpy()  # [row, block, column]
        self.largest = largest[..., 0].numpy()

    def __call__(self, *args: Any) -> Any:
        _, _, _, x, first_chunk, first_tile, band_tiles, bands, count, chunks, steps, _, thread = (
            getattr(value.handle, "data", value) for value in args[:13]
        )
        _, rows, _, _ = (getattr(v, "value", v) for v in args[13:])
        start, groups = int(np.reshape(x, -1)[0]), int(np.reshape(steps, -1)[0]) // 4
        threads = len(thread)
        first_chunk, first_tile, bands, count, chunks = (
            np.broadcast_to(np.reshape(v, -1), threads) for v in (first_chunk, first_tile, bands, count, chunks)
        )
        tile = first_tile + np.minimum(thread // 64, bands - 1) * band_tiles.reshape(-1)
        row = tile // self.blocks * 32 + thread // 32 % 2 * 16 + thread % 32 // 4
        sums = np.zeros((2, threads, rows), np.float32)
        for warp in range(0, threads, 32):
            for group in range(min(groups, max(0, -(-int(count[warp]) // 4)))):
                assert int(chunks[warp]) >= 4 * group + 4
                block = int(tile[warp]) % self.blocks + 4 * group
                assert block % 4 == 0
                self._add(sums, row, slice(warp, warp + 32), block, start, int(first_chunk[warp]) + 4 * group, rows)
        q = thread % 4
        picked = [
            sums[half, np.arange(threads), 8 * i + 2 * q + e]
            for i in range(rows // 8)
            for half in (0, 1)
            for e in (0, 1)
        ]
        return tuple(as_tensor(part, tl.float32) for part in picked)

    def _add(
        self, sums: np.ndarray, row: np.ndarray, warp: slice, block: int, start: int, chunk: int, rows: int
    ) -> None:
        """The products of four blocks, by the chunks from a number on."""
        integers = np.zeros((2, 32, rows))
        for step in range(4):
            words = _read_words(start, chunk + step, chunk_words(rows))
            x_rows = _unswizzle(words[: rows * 32].reshape(rows, 8, 4))
            for half in range(2):
                integers[half] += self.levels[row[warp] + 8 * half, block + step] @ x_rows.T
        scales, halves = words[rows * 32 :].view(np.float32).reshape(-1, 2, 2).transpose(1, 0, 2).reshape(2, rows)
        for half in range(2):
            largest = self.largest[row[warp] + 8 * half, block // 4, None]
            sums[half, warp] += (integers[half] * scales + halves) * largest


class ExactBands:
    """In place of `multiply_bands_exactly`, likewise."""

    def __init__(
        self, tiles: torch.Tensor, tile_norms: torch.Tensor, centroids: torch.Tensor, columns: int, bits: int
    ) -> None:
        self.blocks = -(-columns // 128)
        packed, norms = untile_weight(tiles, tile_norms, len(tiles) // self.blocks * 32, bits)
        levels = centroids.half().double()[unpack_codes(packed, bits).long()].unflatten(1, (-1, 128))
        self.weight = (levels * norms.double()[..., None]).numpy()  # [row, block, column]

    def __call__(self, *args: Any) -> Any:
        _, _, x, first_chunk, first_tile, band_tiles, bands, count, steps, _, _, thread = (
            getattr(value.handle, "data", value) for value in args[:12]
        )
        _, rows, _, _, _ = (getattr(v, "value", v) for v in args[12:])
        threads = len(thread)
        first_chunk, first_tile, bands, count, steps = (
            np.broadcast_to(np.reshape(v, -1), threads) for v in (first_chunk, first_tile, bands, count, steps)
        )
        tile = first_tile + np.minimum(thread // 64, bands - 1) * band_tiles.reshape(-1)
        row = tile // self.blocks * 32 + thread // 32 % 2 * 16 + thread % 32 // 4
        sums = np.zeros((2, threads, rows), np.float32)
        for warp in range(0, threads, 32):
            own = slice(warp, warp + 32)
            assert count[warp] <= steps[warp]
            assert steps[warp] % 4 == 0
            for step in range(max(0, count[warp])):
                words = _read_words(int(np.reshape(x, -1)[0]), int(first_chunk[warp]) + step, exact_chunk_words(rows))
                x_rows, block = self._rows_of(words, rows), int(tile[warp]) % self.blocks + step
                for half in range(2):
                    sums[half, own] += self.weight[row[own] + 8 * half, block] @ x_rows.T
        q = thread % 4
        picked = [
            sums[half, np.arange(threads), 8 * i + 2 * q + e]
            for i in range(rows // 8)
            for half in (0, 1)
            for e in (0, 1)
        ]
        return tuple(as_tensor(part, tl.float32) for part in picked)

    def _rows_of(self, words: np.ndarray, rows: int) -> np.ndarray:
        """The rows by 128 columns of a chunk, whose halves have 64 each; 16 bytes (step, i // 2) of a row lie at
        that ^ row % 8."""
        units = words.view(np.float16).reshape(2, rows, 8, 4, 2)
        in_order = np.stack([units[:, i][:, np.arange(8) ^ i % 8] for i in range(rows)])  # row, s1, (s0 r i1), q, i0
        columns = in_order.reshape(rows, 2, 2, 2, 2, 4, 2).transpose(0, 1, 2, 5, 3, 4, 6)
        return columns.reshape(rows, 128).astype(np.float64)


def multiply_groups(w: Any, w_scales: Any, x: Any, row: Any, _: Any, groups: Any, line: Any, thread: Any) -> Any:
    """In place of the function of this name: from the chunks of both operands the sums it would have."""
    start_w, start_scales, start_x, count, columns = (
        int(v.handle.data.reshape(-1)[0]) for v in (w, w_scales, x, groups, line)
    )
    program, part = (int(tl.program_id(axis).handle.data.reshape(-1)[0]) for axis in (0, 1))
    own, q = row.handle.data % 128, thread.handle.data % 4
    stored = _read_words(start_scales, 0, count * columns).view(np.float32).reshape(count, columns)
    norms = np.pad(stored, ((0, 0), (0, 128 * (part + 1))))[:, 128 * part : 128 * (part + 1)]
    sums = np.zeros((128, 256), np.float32)
    for group in range(count):
        for product in range(2):
            integers = np.zeros((128, 128))
            for block in range(4 * group, 4 * group + 4):
                chunk = _read_words(start_x, (program * 4 * count + block) * 2 + product, chunk_words(128))
                weight = _read_words(start_w, part * 4 * count + block, requantize_tiles.CHUNK_WORDS)
                rows = [_unswizzle(words.reshape(128, 8, 4)) for words in (weight, chunk[: 128 * 32])]
                integers += rows[0] @ rows[1].T
            scales = chunk[128 * 32 :].view(np.float32).reshape(-1, 2, 2)[:, 0].reshape(-1)
            sums[:, 128 * product : 128 * (product + 1)] += integers * norms[group][:, None] * scales
    picked = [sums[own + 8 * half, 8 * i + 2 * q + e] for i in range(32) for half in (0, 1) for e in (0, 1)]
    return tuple(as_tensor(part, tl.float32) for part in picked), as_tensor(np.zeros_like(q), tl.int32)


def _read_words(start: int, number: int, words: int) -> Words:
    """Piece `number` of so many words each."""
    return np.frombuffer(ctypes.string_at(start + 4 * number * words, 4 * words), np.uint32)


def _unswizzle(words: np.ndarray) -> np.ndarray:
    """The rows by 128 columns of x in a chunk, whose 16 bytes (s, r) of a row lie at (s, r) ^ row % 8."""
    units = words.view(np.int8).reshape(-1, 8, 4, 4)
    in_order = np.stack([row[np.arange(8) ^ i % 8] for i, row in enumerate(units)])
    return in_order.reshape(-1, 4, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 128).astype(np.float64)


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
    integers = np.stack([_unswizzle(chunk.numpy().reshape(128, 8, 4)) for chunk in chunks.flatten(0, 1)])
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
    monkeypatch.setattr(int8_wgmma, "multiprocessors", lambda device: 132)
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
    ("x_rows", "rows", "columns", "bits", "awq"),
    [
        (1, 40, 200, 5, True),
        (9, 70, 1160, 4, False),
        (4, 32, 128, 2, True),
        (16, 70, 1160, 5, False),
        (9, 40, 200, 3, True),
    ],
)
@pytest.mark.parametrize("warps", [4, 8, 16])
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
    warps: int,
) -> None:
    """With rows that are not finite, which stay by themselves."""
    choice = "int8_program" if linear is int8_linear else "exact_program"
    monkeypatch.setattr(import_module(linear.__module__), choice, lambda bands, groups: Program(warps, 128))
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
