"""Attention of one new token a row: programs share the tokens of the cache, and a second kernel joins what they found.

The query heads that share a key head are rows of one small product, so that keys and values are read once.
"""

import torch
import triton
import triton.language as tl

_TOKENS = {2: 64, 4: 32}  # of a program at a time, by bytes of an element
_PROGRAMS = 256  # wanted at the least, to fill a GPU
_MIN_HEADS = 16  # rows of the tensor cores' product


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    part_ptr,
    total_ptr,
    scale,
    length,
    split_tokens,
    key_heads,
    group,
    dim,
    key_row,
    key_head_stride,
    key_token,
    value_row,
    value_head_stride,
    value_token,
    mask_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A part of the tokens for the `group` query heads of a key head: their weighted sum, largest score and total."""
    split = tl.program_id(0)
    row = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = tl.program_id(1) % key_heads
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    heads = row * key_heads * group + key_head * group + h
    queries = (h[:, None] < group) & (d[None, :] < dim)
    q = tl.load(query_ptr + heads[:, None] * dim + d[None, :], mask=queries, other=0.0)
    key_ptr += row * key_row + key_head * key_head_stride
    value_ptr += row * value_row + key_head * value_head_stride
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    y = tl.zeros((HEADS, DIM), tl.float32)
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, length), TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen = tl.load(mask_ptr + row * mask_row + t, mask=t < length, other=0) != 0
        if tl.max(seen.to(tl.int32), axis=0) != 0:
            inside = seen[:, None] & (d[None, :] < dim)
            at = t.to(tl.int64)[:, None]
            keys = tl.load(key_ptr + at * key_token + d[None, :], mask=inside, other=0.0)
            values = tl.load(value_ptr + at * value_token + d[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            larger = tl.maximum(peak, tl.max(scores, axis=1, return_indices=False))
            weights = tl.exp(scores - larger[:, None])
            faded = tl.exp(peak - larger)
            total = total * faded + tl.sum(weights, axis=1)
            y = y * faded[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            peak = larger
    part = heads * tl.num_programs(0) + split
    tl.store(part_ptr + part[:, None] * dim + d[None, :], y, mask=queries)
    tl.store(total_ptr + part * 2, peak, mask=h < group)
    tl.store(total_ptr + part * 2 + 1, total, mask=h < group)


@triton.jit
def _join_kernel(part_ptr, total_ptr, out_ptr, splits, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """The parts of a row's head. A part that saw no token has a peak of -inf, and weighs nothing."""
    head = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM)
    part = head * splits + s
    peak = tl.load(total_ptr + part * 2, mask=s < splits, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(total_ptr + part * 2 + 1, mask=s < splits, other=0.0), axis=0)
    inside = (s[:, None] < splits) & (d[None, :] < dim)
    parts = tl.load(part_ptr + part[:, None] * dim + d[None, :], mask=inside, other=0.0)
    y = tl.sum(parts * weight[:, None], axis=0) / total
    tl.store(out_ptr + head * dim + d, y.to(out_ptr.dtype.element_ty), mask=d < dim)


def attention_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [rows, heads, dim], key and value [rows, key_heads, length, dim], mask bool [rows, length], True where a
    row attends, at least once -> [rows, heads, dim]. The last dimension of each is contiguous."""
    rows, heads, dim = query.shape
    _, key_heads, length, _ = key.shape
    tokens = _TOKENS[key.itemsize]
    splits = max(1, min(triton.cdiv(length, tokens), triton.cdiv(_PROGRAMS, rows * key_heads)))
    split_tokens = triton.cdiv(triton.cdiv(length, splits), tokens) * tokens
    splits = triton.cdiv(length, split_tokens)
    query = query.contiguous()
    parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=query.device)
    totals = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=query.device)
    group = heads // key_heads
    wide = triton.next_power_of_2(dim)
    _attend_kernel[(splits, rows * key_heads)](
        query,
        key,
        value,
        mask,
        parts,
        totals,
        scale,
        length,
        split_tokens,
        key_heads,
        group,
        dim,
        *key.stride()[:3],
        *value.stride()[:3],
        mask.stride(0),
        HEADS=max(_MIN_HEADS, triton.next_power_of_2(group)),
        DIM=max(16, wide),
        TOKENS=tokens,
        num_warps=4,
    )
    out = torch.empty_like(query)
    _join_kernel[(rows * heads,)](
        parts, totals, out, splits, dim, SPLITS=triton.next_power_of_2(splits), DIM=max(16, wide), num_warps=4
    )
    return out
