"""In place of the functions that use `wgmma`, which the emulator does not have: what they give, by numpy."""

import ctypes
from typing import Any

import numpy as np
import torch
import triton.language as tl
from emulator import Words, as_tensor

from polar_kernels.kernels import requantize_tiles
from polar_kernels.kernels.exact_blocks import exact_chunk_words
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.packing import unpack_codes
from polar_kernels.tiles import FP16_PAIRS, PART_LEVELS, PARTS, untile_weight


def _held(sums: np.ndarray, thread: np.ndarray) -> Any:
    """The sums a thread holds, of those [half of its warp's rows, thread, row of x] with its two rows of the weight."""
    own, q, groups = np.arange(len(thread)), thread % 4, sums.shape[2] // 8
    picked = [sums[half, own, 8 * i + 2 * q + e] for i in range(groups) for half in (0, 1) for e in (0, 1)]
    return tuple(as_tensor(part, tl.float32) for part in picked)


def _of_threads(thread: np.ndarray, *values: Any) -> list[np.ndarray]:
    """Each thread's, of values that are one for all or one for each."""
    return [np.broadcast_to(np.reshape(value, -1), len(thread)) for value in values]


def _first_of_threads(
    thread: np.ndarray, first_tile: Any, band_tiles: Any, bands: Any, blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first tile that each thread reads, and the first of its two rows of the weight."""
    first_tile, band_tiles, bands = _of_threads(thread, first_tile, band_tiles, bands)
    tile = first_tile + np.minimum(thread // 64, bands - 1) * band_tiles
    return tile, tile // blocks * 32 + thread // 32 % 2 * 16 + thread % 32 // 4


class Bands:
    """Of `multiply_bands`: from the chunks of x that it reads, and the weight that was told, the sums it would have."""

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
        first_chunk, count, chunks = _of_threads(thread, first_chunk, count, chunks)
        tile, row = _first_of_threads(thread, first_tile, band_tiles, bands, self.blocks)
        sums = np.zeros((2, len(thread), rows), np.float32)
        for warp in range(0, len(thread), 32):
            for group in range(min(groups, max(0, -(-int(count[warp]) // 4)))):
                assert int(chunks[warp]) >= 4 * group + 4
                block = int(tile[warp]) % self.blocks + 4 * group
                assert block % 4 == 0
                self._add(sums, row, slice(warp, warp + 32), block, start, int(first_chunk[warp]) + 4 * group, rows)
        return _held(sums, thread)

    def _add(
        self, sums: np.ndarray, row: np.ndarray, warp: slice, block: int, start: int, chunk: int, rows: int
    ) -> None:
        """The products of four blocks, by the chunks from a number on."""
        integers = np.zeros((2, 32, rows))
        for step in range(4):
            words = read_words(start, chunk + step, chunk_words(rows))
            x_rows = unswizzle(words[: rows * 32].reshape(rows, 8, 4))
            for half in range(2):
                integers[half] += self.levels[row[warp] + 8 * half, block + step] @ x_rows.T
        scales, halves = words[rows * 32 :].view(np.float32).reshape(-1, 2, 2).transpose(1, 0, 2).reshape(2, rows)
        for half in range(2):
            largest = self.largest[row[warp] + 8 * half, block // 4, None]
            sums[half, warp] += (integers[half] * scales + halves) * largest


class ExactBands:
    """Of `multiply_bands_exactly`, likewise."""

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
        first_chunk, count, steps = _of_threads(thread, first_chunk, count, steps)
        tile, row = _first_of_threads(thread, first_tile, band_tiles, bands, self.blocks)
        sums = np.zeros((2, len(thread), rows), np.float32)
        for warp in range(0, len(thread), 32):
            own = slice(warp, warp + 32)
            assert count[warp] <= steps[warp]
            assert steps[warp] % 4 == 0
            for step in range(max(0, count[warp])):
                words = read_words(int(np.reshape(x, -1)[0]), int(first_chunk[warp]) + step, exact_chunk_words(rows))
                x_rows, block = self._rows_of(words, rows), int(tile[warp]) % self.blocks + step
                for half in range(2):
                    sums[half, own] += self.weight[row[own] + 8 * half, block] @ x_rows.T
        return _held(sums, thread)

    def _rows_of(self, words: np.ndarray, rows: int) -> np.ndarray:
        """The rows by 128 columns of a chunk, whose halves have 64 each; 16 bytes (step, i // 2) of a row lie at
        that ^ row % 8."""
        units = words.view(np.float16).reshape(2, rows, 8, 4, 2)
        in_order = np.stack([units[:, i][:, np.arange(8) ^ i % 8] for i in range(rows)])  # row, s1, (s0 r i1), q, i0
        columns = in_order.reshape(rows, 2, 2, 2, 2, 4, 2).transpose(0, 1, 2, 5, 3, 4, 6)
        return columns.reshape(rows, 128).astype(np.float64)


def multiply_groups(w: Any, w_scales: Any, x: Any, row: Any, _: Any, groups: Any, line: Any, thread: Any) -> Any:
    """The function of this name: from the chunks of both operands the sums it would have."""
    start_w, start_scales, start_x, count, columns = (
        int(v.handle.data.reshape(-1)[0]) for v in (w, w_scales, x, groups, line)
    )
    program, part = (int(tl.program_id(axis).handle.data.reshape(-1)[0]) for axis in (0, 1))
    own, q = row.handle.data % 128, thread.handle.data % 4
    stored = read_words(start_scales, 0, count * columns).view(np.float32).reshape(count, columns)
    norms = np.pad(stored, ((0, 0), (0, 128 * (part + 1))))[:, 128 * part : 128 * (part + 1)]
    sums = np.zeros((128, 256), np.float32)
    for group in range(count):
        for product in range(2):
            integers = np.zeros((128, 128))
            for block in range(4 * group, 4 * group + 4):
                chunk = read_words(start_x, (program * 4 * count + block) * 2 + product, chunk_words(128))
                weight = read_words(start_w, part * 4 * count + block, requantize_tiles.CHUNK_WORDS)
                rows = [unswizzle(words.reshape(128, 8, 4)) for words in (weight, chunk[: 128 * 32])]
                integers += rows[0] @ rows[1].T
            scales = chunk[128 * 32 :].view(np.float32).reshape(-1, 2, 2)[:, 0].reshape(-1)
            sums[:, 128 * product : 128 * (product + 1)] += integers * norms[group][:, None] * scales
    picked = [sums[own + 8 * half, 8 * i + 2 * q + e] for i in range(32) for half in (0, 1) for e in (0, 1)]
    return tuple(as_tensor(part, tl.float32) for part in picked), as_tensor(np.zeros_like(q), tl.int32)


def read_words(start: int, number: int, words: int) -> Words:
    """Piece `number` of so many words each."""
    return np.frombuffer(ctypes.string_at(start + 4 * number * words, 4 * words), np.uint32)


def unswizzle(words: np.ndarray) -> np.ndarray:
    """The rows by 128 columns of x in a chunk, whose 16 bytes (s, r) of a row lie at (s, r) ^ row % 8."""
    units = words.view(np.int8).reshape(-1, 8, 4, 4)
    in_order = np.stack([row[np.arange(8) ^ i % 8] for i, row in enumerate(units)])
    return in_order.reshape(-1, 4, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 128).astype(np.float64)
