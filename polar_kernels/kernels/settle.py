"""128 columns settled one after the other, each to its nearest level: the loop of error feedback, in one launch.

Rows know nothing of each other. A program holds its rows' targets in registers, takes column after column out of them,
and corrects all by its error; what a column needs beside is read from transposed tensors, rows side by side.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.codebook import bits_of
from polar_kernels.kernels.blocks import BLOCK

_ROWS = 16  # a program


@triton.jit
def _settle_kernel(
    targets_ptr,
    before_ptr,
    scales_ptr,
    coupling_ptr,
    table_ptr,
    codes_ptr,
    N,
    BITS: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < N
    place = row[:, None] * BLOCK + column[None, :]
    targets = tl.load(targets_ptr + place, mask=known[:, None], other=0.0)
    for j in range(BLOCK):
        target = tl.sum(tl.where(column[None, :] == j, targets, 0.0), axis=1)
        scale = tl.load(scales_ptr + j * N + row, mask=known, other=0.0)
        unit = target / tl.where(scale > 0, scale, 1.0)
        code = tl.zeros((ROWS,), tl.int32)
        for bit in tl.static_range(BITS):  # the number of midpoints below, by halves
            middle = table_ptr + code + (1 << (BITS - 1 - bit))
            above = unit > (tl.load(middle - 1) + tl.load(middle)) / 2
            code += tl.where(above, 1 << (BITS - 1 - bit), 0)
        before = target
        if HAS_BEFORE:
            before = tl.load(before_ptr + j * N + row, mask=known, other=0.0)
        change = tl.load(table_ptr + code) * scale - before
        targets -= change[:, None] * tl.load(coupling_ptr + j * BLOCK + column)[None, :]
        tl.store(codes_ptr + j * N + row, code, mask=known)
    tl.store(targets_ptr + place, targets, mask=known[:, None])


def settle(
    targets: torch.Tensor,
    before: torch.Tensor | None,
    scales: torch.Tensor,
    coupling: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """As `polar_kernels.feedback.settle`, on a GPU."""
    assert targets.is_contiguous()
    rows = targets.shape[0]
    codes = torch.empty(BLOCK.value, rows, dtype=torch.int32, device=targets.device)
    if rows:
        _settle_kernel[(triton.cdiv(rows, _ROWS),)](
            targets_ptr=targets,
            before_ptr=None if before is None else before.T.contiguous(),
            scales_ptr=scales.T.contiguous(),
            coupling_ptr=coupling.contiguous(),
            table_ptr=table,
            codes_ptr=codes,
            N=rows,
            BITS=bits_of(table),
            HAS_BEFORE=before is not None,
            ROWS=_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return codes.T.long()
