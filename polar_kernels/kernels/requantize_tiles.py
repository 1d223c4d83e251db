"""Tiles decoded to int8 for the product of many rows, where decoding in every program would cost more.

Four blocks of a row share a scale, its largest norm, as four blocks of x do: what the tensor cores add up over them
needs no other. A level times its norm over that largest is rounded once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.kernels.decode_halves import decode_eight_halves, load_levels
from polar_kernels.kernels.ptx import store_four
from polar_kernels.kernels.quantize_chunks import empty_chunks, is_whole, quantize_row
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import LEVEL_STEP, PLANE_WORDS, TILE_ROWS

CHUNK_ROWS = 128
CHUNK_WORDS = CHUNK_ROWS * BLOCK_SIZE // 4  # int32
_STEP, _PLANE_WORDS = tl.constexpr(LEVEL_STEP), tl.constexpr(PLANE_WORDS)
_SHARE, _CHUNK, _BANDS = tl.constexpr(SCALE_BLOCKS), tl.constexpr(CHUNK_WORDS), tl.constexpr(CHUNK_ROWS // TILE_ROWS)
_FILL = tl.constexpr(127 / 127.5)  # the largest level is 127.5 steps at most
# Two words of two fp16 levels, times a factor, to four bytes: adding 1536 leaves the integer in the low bits.
_ROUND = tl.constexpr(
    "{ .reg .b32 a, b, m; mov.b32 m, 0x66006600; fma.rn.f16x2 a, $1, $3, m; fma.rn.f16x2 b, $2, $3, m;"
    "prmt.b32 $0, a, b, 0x6420; }"
)
_PACK_TWICE = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")


@triton.jit
def _factor(norms_ptr, first, own, row, delta):
    """What a row's levels of a block are multiplied by, twice in a word of fp16; the largest norm of the four blocks.

    row: its place among a tile's norms; first: the first of the blocks' tiles; own: the block's.
    """
    peak = tl.zeros(row.shape, tl.float32)
    for block in tl.static_range(_SHARE):
        peak = tl.maximum(peak, tl.abs(tl.load(norms_ptr + (first + block).to(tl.int64) * 32 + row).to(tl.float32)))
    norm = tl.load(norms_ptr + own.to(tl.int64) * 32 + row).to(tl.float32)
    factor = norm / tl.where(peak > 0, peak, 1.0) * (_FILL / delta)
    return tl.inline_asm_elementwise(_PACK_TWICE, "=r,f", [factor], tl.int32, True, 1), peak


@triton.jit
def _requantize_group(
    tiles_ptr, norms_ptr, table_ptr, out_ptr, scales_ptr, band, group, blocks, rows, WIDTH: tl.constexpr
):
    """What a program does: four blocks of a band.

    A warp takes a tile, a lane of it the words of one row and step of 32 columns from all four lanes of a plane that
    share the row, so that it can store 16 bytes.
    """
    thread = tl.arange(0, 32 * _SHARE)
    g = thread % 32 // 4
    lower = thread % 2  # rows g + 8 of each half
    odd = thread % 4 // 2  # the second step of a plane
    first = band * blocks + group * _SHARE
    number = first + thread // 32
    low, high = load_levels(table_ptr, thread % 32)
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    plane = tiles_ptr + number.to(tl.int64) * (_PLANE_WORDS * WIDTH) + g * 16
    chunk = (band // _BANDS).to(tl.int64) * blocks + group * _SHARE + thread // 32
    out = out_ptr + chunk * _CHUNK + (band % _BANDS * 32 + lower * 8 + g) * 32
    scales = scales_ptr + group.to(tl.int64) * rows + band * 32 + lower * 8 + g
    for half in tl.static_range(2):
        factor, peak = _factor(norms_ptr, first, number, g * 4 + 2 * half + lower, delta)
        tl.store(scales + 16 * half, peak / _FILL, mask=(thread < 32) & (odd == 0))
        for pair in tl.static_range(2):
            words = ()
            for q in tl.static_range(4):
                word = tl.load(plane + (2 * half + pair) * _PLANE_WORDS + q * 4 + odd * 2 + lower)
                signs = word
                if WIDTH == 5:
                    signs = tl.load(plane + 4 * _PLANE_WORDS + q * 4 + 2 * half + lower) << 2 * odd
                levels = decode_eight_halves(2 * pair, word, signs, low, high, WIDTH)
                for r in tl.static_range(2):
                    values = [levels[2 * r], levels[2 * r + 1], factor]
                    words = words + (tl.inline_asm_elementwise(_ROUND, "=r,r,r,r", values, tl.int32, True, 1),)
            for r in tl.static_range(2):
                # The 16 bytes (s, r) of a row: see `quantize_chunks`.
                place = out + half * (16 * 32) + (4 * pair + 2 * odd + r ^ g) * 4
                store_four(place, words[r], words[2 + r], words[4 + r], words[6 + r], thread * 0 + 1)


@triton.jit(do_not_specialize=["blocks", "rows"])
def _requantize_kernel(tiles_ptr, norms_ptr, table_ptr, out_ptr, scales_ptr, blocks, rows, WIDTH: tl.constexpr):
    _requantize_group(
        tiles_ptr,
        norms_ptr,
        table_ptr,
        out_ptr,
        scales_ptr,
        tl.program_id(1),
        tl.program_id(0),
        blocks,
        rows,
        WIDTH,
    )


@triton.jit(do_not_specialize=["K", "blocks", "products", "rows", "x_programs"])
def _quantize_both_kernel(
    x_ptr,
    x_scales_ptr,
    words_ptr,
    tiles_ptr,
    norms_ptr,
    table_ptr,
    out_ptr,
    scales_ptr,
    K,
    blocks,
    products,
    rows,
    x_programs,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    number = tl.program_id(0)
    groups = blocks // _SHARE
    if number < x_programs:
        parts = tl.cdiv(groups, _SHARE)
        quantize_row(
            x_ptr,
            x_scales_ptr,
            words_ptr,
            table_ptr,
            (number // parts).to(tl.int64),
            number % parts * (_SHARE * _SHARE),
            tl.arange(0, 32 * _SHARE),
            K,
            blocks,
            products,
            ROWS,
            HAS_SCALES,
            WHOLE,
        )
    else:
        gdc_wait()  # what is written to may have been another kernel's
        number -= x_programs
        _requantize_group(
            tiles_ptr,
            norms_ptr,
            table_ptr,
            out_ptr,
            scales_ptr,
            number // groups,
            number % groups,
            blocks,
            rows,
            WIDTH,
        )
        gdc_launch_dependents()


def empty_scales(tiles: torch.Tensor, blocks: int) -> torch.Tensor:
    """fp32 [blocks / SCALE_BLOCKS, N rounded up to 32], to be filled by `requantize_tiles`."""
    rows = len(tiles) // blocks * TILE_ROWS
    return torch.empty(blocks // SCALE_BLOCKS, rows, dtype=torch.float32, device=tiles.device)


def quantize_both(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    products: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_chunks` for CHUNK_ROWS rows an instruction and `requantize_tiles` in one launch: the chunks of x, and
    the scales. K: a multiple of 128 * SCALE_BLOCKS. The halves are not needed: the weight's integers lack none."""
    rows, in_features = x.shape
    words = empty_chunks(rows, in_features, CHUNK_ROWS, products, x.device)
    blocks = words.shape[1]
    scales = empty_scales(tiles, blocks)
    groups, bands = len(scales), len(tiles) // blocks
    x_programs = rows * triton.cdiv(groups, SCALE_BLOCKS)
    _quantize_both_kernel[(x_programs + groups * bands,)](
        x_ptr=x,
        x_scales_ptr=awq_scales,
        words_ptr=words,
        tiles_ptr=tiles,
        norms_ptr=tile_norms,
        table_ptr=table,
        out_ptr=out,
        scales_ptr=scales,
        K=in_features,
        blocks=blocks,
        products=products,
        rows=scales.shape[1],
        x_programs=x_programs,
        ROWS=CHUNK_ROWS,
        HAS_SCALES=awq_scales is not None,
        WHOLE=is_whole(x),
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        num_warps=SCALE_BLOCKS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, scales


def requantize_tiles(
    tiles: torch.Tensor, tile_norms: torch.Tensor, table: torch.Tensor, blocks: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill out, int8 chunks as `ring` has them, int32 [ceil(N / 128), blocks, CHUNK_WORDS], rows beyond N not.

    blocks: of K, a multiple of SCALE_BLOCKS. Returns what the integers are to be multiplied by, times the step of
    `tiles.level_table`, as `empty_scales` has it.
    """
    scales = empty_scales(tiles, blocks)
    _requantize_kernel[(len(scales), len(tiles) // blocks)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms,
        table_ptr=table,
        out_ptr=out,
        scales_ptr=scales,
        blocks=blocks,
        rows=scales.shape[1],
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        num_warps=SCALE_BLOCKS,
        enable_fp_fusion=True,
    )
    return scales
