"""The product of experts for more tokens: pairs grouped by expert, a warp for 32 rows of an expert's weight and one
group, of 8 rows of x to 32, or to 16 exactly; more would take too many registers.

Warps work each on their own: there are enough of them, and nothing to add up. Rows of x are read where they are, and
written where they belong, so that no tensor is gathered or scattered by a kernel of its own.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.band_sums import ROW_GROUP
from polar_kernels.kernels.expert_groups import Grouped
from polar_kernels.kernels.expert_tiles import (
    decode_tile,
    load_scale,
    load_table,
    multiply_tile,
    multiply_tile_exactly,
)
from polar_kernels.kernels.fragments import load_gathered
from polar_kernels.kernels.ptx import wait_for_previous_kernel
from polar_kernels.kernels.tile_access import load_tile, norm_of
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_WARPS = 4


@triton.jit
def _pairs_of(order_ptr, start, stop, member, GROUPS: tl.constexpr):
    """The pair that is a thread's `member` of each 8 of the group; beyond the last, that one."""
    pairs = ()
    for i in tl.static_range(GROUPS):
        pairs = pairs + (tl.load(order_ptr + tl.minimum(start + 8 * i + member, stop - 1)),)
    return pairs


@triton.jit(do_not_specialize=["bands", "blocks", "rows", "divisor"])
def _expert_matmul_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    order_ptr,
    groups_ptr,
    out_ptr,
    bands,
    blocks,
    rows,
    divisor,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    EXACT: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    g = lane // 4
    band = tl.program_id(0) * WARPS + thread // 32
    own = band < bands
    group = groups_ptr + tl.program_id(1) * 4
    expert = tl.load(group, volatile=True).to(tl.int64)
    start = tl.load(group + 1, volatile=True)
    stop = tl.load(group + 2, volatile=True)
    # A group that is not there reads some expert's tile, which does no harm, and like all others waits.
    first = (expert * bands + tl.minimum(band, bands - 1)) * blocks
    tile = load_tile(tiles_ptr, first, lane, WIDTH)
    norms = tl.load(norms_ptr + first * 8 + g)
    levels = load_table(table_ptr, thread, EXACT, DTYPE, 32 * WARPS)
    # Everything above was there before; x and meta come from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    if start < stop:
        of_x = _pairs_of(order_ptr, start, stop, g + q - lane % 4, GROUPS)
        even = _pairs_of(order_ptr, start, stop, 2 * q, GROUPS)
        odd = _pairs_of(order_ptr, start, stop, 2 * q + 1, GROUPS)
        sums = ()
        for _ in tl.static_range(8 * GROUPS):
            sums = sums + (tl.zeros(lane.shape, tl.float32),)
        for block in range(blocks):
            n0 = norm_of(norms, 0)
            n1 = norm_of(norms, 16)
            n2 = norm_of(norms, 32)
            n3 = norm_of(norms, 48)
            following = first + tl.minimum(block + 1, blocks - 1)
            norms = tl.load(norms_ptr + following * 8 + g)
            added = ()
            if EXACT:
                x = ()
                for i in tl.static_range(GROUPS):
                    x = x + load_gathered(x_ptr, of_x[i] // divisor, blocks, block, q, 2)
                u, v = multiply_tile_exactly(tile, levels, x, WIDTH, GROUPS, DTYPE)
                tile = load_tile(tiles_ptr, following, lane, WIDTH)
                for i in tl.static_range(GROUPS):
                    added = added + (
                        sums[8 * i] + u[4 * i] * n0,
                        sums[8 * i + 1] + u[4 * i + 1] * n0,
                        sums[8 * i + 2] + u[4 * i + 2] * n1,
                        sums[8 * i + 3] + u[4 * i + 3] * n1,
                        sums[8 * i + 4] + v[4 * i] * n2,
                        sums[8 * i + 5] + v[4 * i + 1] * n2,
                        sums[8 * i + 6] + v[4 * i + 2] * n3,
                        sums[8 * i + 7] + v[4 * i + 3] * n3,
                    )
            else:
                upper, lower = decode_tile(tile, levels, WIDTH)
                tile = load_tile(tiles_ptr, following, lane, WIDTH)
                for i in tl.static_range(GROUPS):
                    y = multiply_tile(upper, lower, load_gathered(x_ptr, of_x[i] // divisor, blocks, block, q, 1))
                    base0, scale0 = load_scale(meta_ptr, rows, even[i] // divisor, block)
                    base1, scale1 = load_scale(meta_ptr, rows, odd[i] // divisor, block)
                    added = added + (
                        sums[8 * i] + (y[0] * scale0 + base0) * n0,
                        sums[8 * i + 1] + (y[1] * scale1 + base1) * n0,
                        sums[8 * i + 2] + (y[2] * scale0 + base0) * n1,
                        sums[8 * i + 3] + (y[3] * scale1 + base1) * n1,
                        sums[8 * i + 4] + (y[4] * scale0 + base0) * n2,
                        sums[8 * i + 5] + (y[5] * scale1 + base1) * n2,
                        sums[8 * i + 6] + (y[6] * scale0 + base0) * n3,
                        sums[8 * i + 7] + (y[7] * scale1 + base1) * n3,
                    )
            sums = added
        for i in tl.static_range(GROUPS):
            for e in tl.static_range(2):
                pair = odd[i] if e else even[i]
                keep = own & (start + 8 * i + 2 * q + e < stop)
                out = out_ptr + (pair.to(tl.int64) * bands + band) * 32 + g
                for part in tl.static_range(4):
                    tl.store(out + 8 * part, sums[8 * i + 2 * part + e].to(DTYPE), mask=keep)


def expert_matmul(
    words: torch.Tensor,
    meta: torch.Tensor | None,
    grouped: Grouped,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    experts: int,
) -> torch.Tensor:
    """Write `out` [P, N], row p the weight of pair p's expert @ row p // (P / M) of x; those of a pair that is in no
    group are left unwritten. Returns it.

    words [M, *], meta: x as `quantize_activation` gives it, or `rotate_activation`, with meta None; N a multiple of
    32.
    """
    bands = out.shape[1] // TILE_ROWS
    _expert_matmul_kernel[(triton.cdiv(bands, _WARPS), grouped.groups.shape[0])](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=None if meta is None else meta.view(torch.int64),
        order_ptr=grouped.order,
        groups_ptr=grouped.groups,
        out_ptr=out,
        bands=bands,
        blocks=tiles.shape[0] // (bands * experts),
        rows=words.shape[0],
        divisor=out.shape[0] // words.shape[0],
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        GROUPS=grouped.rows // ROW_GROUP,
        WARPS=_WARPS,
        EXACT=meta is None,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
    )
    return out
