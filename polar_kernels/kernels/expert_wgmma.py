"""The product of experts for many tokens on Hopper: `int8_wgmma`, a group of 64 rows of x times its expert's weight."""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.expert_groups import Grouped
from polar_kernels.kernels.ptx import wait_for_previous_kernel
from polar_kernels.kernels.quantize_grouped import GROUP_ROWS
from polar_kernels.kernels.shared_memory import shared_memory, shared_piece
from polar_kernels.kernels.wgmma_blocks import multiply_bands, piece_bytes
from polar_kernels.kernels.wgmma_forms import EXPERT_FORM, SCALE_BLOCKS
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_ROWS, _SHARE = tl.constexpr(GROUP_ROWS), tl.constexpr(SCALE_BLOCKS)


@triton.jit(do_not_specialize=["bands", "blocks"])
def _expert_wgmma_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    order_ptr,
    groups_ptr,
    out_ptr,
    bands,
    blocks,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    X_SLOTS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    first_band = tl.program_id(0) * (WARPS // 2)
    number = tl.program_id(1).to(tl.int64)
    expert = tl.load(groups_ptr + number * 4, volatile=True)
    start = tl.load(groups_ptr + number * 4 + 1, volatile=True)
    stop = tl.load(groups_ptr + number * 4 + 2, volatile=True)
    SIZE: tl.constexpr = piece_bytes(_ROWS, X_SLOTS, WIDTH, WARPS)
    shared = shared_piece(shared_memory(x_ptr, blocks < 0, thread, 1, SIZE), 0, 1, SIZE)
    if start < stop:
        padded = tl.cdiv(blocks, _SHARE) * _SHARE
        sums = multiply_bands(
            tiles_ptr,
            norms_ptr,
            table_ptr,
            x_ptr,
            number * padded,
            (expert * bands + first_band) * blocks,
            blocks,
            bands - first_band,
            blocks,
            padded,
            padded,
            shared,
            thread,
            WIDTH,
            _ROWS,
            WARPS,
            X_SLOTS,
        )
        q = thread % 4
        band = first_band + thread // 64
        row = band * 32 + thread // 32 % 2 * 16 + thread % 32 // 4
        for i in tl.static_range(8):
            for e in tl.static_range(2):
                member = start + i * 8 + 2 * q + e
                keep = (member < stop) & (band < bands)
                pair = tl.load(order_ptr + member, mask=keep, other=0)
                out = out_ptr + pair.to(tl.int64) * (bands * 32) + row
                tl.store(out, sums[4 * i + e].to(out_ptr.dtype.element_ty), mask=keep)
                tl.store(out + 8, sums[4 * i + 2 + e].to(out_ptr.dtype.element_ty), mask=keep)
    else:  # wait like all others, so that this kernel cannot end before the one before it
        wait_for_previous_kernel(thread)


def expert_wgmma(
    words: torch.Tensor,
    grouped: Grouped,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    experts: int,
) -> torch.Tensor:
    """`expert_matmul` of x as `quantize_grouped` gives it, groups being of GROUP_ROWS rows."""
    bands = out.shape[1] // TILE_ROWS
    _expert_wgmma_kernel[(triton.cdiv(2 * bands, EXPERT_FORM.warps), len(grouped.groups))](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int32),
        table_ptr=table,
        x_ptr=words,
        order_ptr=grouped.order,
        groups_ptr=grouped.groups,
        out_ptr=out,
        bands=bands,
        blocks=tiles.shape[0] // (bands * experts),
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        WARPS=EXPERT_FORM.warps,
        X_SLOTS=EXPERT_FORM.x_slots,
        num_warps=EXPERT_FORM.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=EXPERT_FORM.registers,
    )
    return out
