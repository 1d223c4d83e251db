"""The pairs of a token and an expert grouped by expert, in one launch and without the host learning how many.

One program an expert counts the pairs of the experts before it and its own, and so knows where its own belong. The
groups are numbered so that no program needs another's: of expert e, before which come n pairs, the first is group
n // rows + e, which leaves room for a last one that is not full, and some groups without pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_GROUP_WORDS = 4  # one is free
_MOST_AT_A_TIME = 8192  # pairs, or groups, that a program takes
_THREAD_PAIRS = 16  # so many a thread: one warp as long as they suffice, which needs no barrier


class Grouped(NamedTuple):
    """order int32 [P]: pairs in order of their experts; groups int32 [G, 4]: of each group the expert, the place in the
    order of its first pair and that after its last, at most `rows` on; where that is not more, it has none; places
    int32 [P]: the group of each pair, times `rows`, plus its number there; -1 where it is in none."""

    order: torch.Tensor
    groups: torch.Tensor
    places: torch.Tensor
    rows: int


@triton.jit
def _group_kernel(
    index_ptr,
    order_ptr,
    groups_ptr,
    places_ptr,
    pairs,
    count,
    ROWS: tl.constexpr,
    PAIR_STEPS: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    earlier = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    # Constexpr bounds: Triton 3.6's interpreter cannot loop to a run-time one.
    for step in range(PAIR_STEPS):
        pair = step * BLOCK + lane
        chosen = tl.load(index_ptr + pair, mask=pair < pairs, other=-1)
        earlier += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    first = tl.sum(earlier, 0)
    last = first + tl.sum(own, 0)
    first_group = first // ROWS + expert
    seen = first
    for step in range(PAIR_STEPS):
        pair = step * BLOCK + lane
        chosen = tl.load(index_ptr + pair, mask=pair < pairs, other=0)
        mine = ((chosen == expert) & (pair < pairs)).to(tl.int32)
        place = seen + tl.cumsum(mine, 0) - 1
        tl.store(order_ptr + place, pair, mask=mine == 1)
        tl.store(places_ptr + pair, first_group * ROWS + place - first, mask=mine == 1)
        unknown = (chosen < 0) | (chosen >= count)
        tl.store(places_ptr + pair, -1, mask=unknown & (pair < pairs) & (expert + lane * 0 == 0))
        seen += tl.sum(mine, 0)
    # Pairs whose expert does not exist leave groups over, which the last expert's program empties.
    last_group = tl.where(expert == count - 1, pairs // ROWS + count, last // ROWS + expert + 1)
    for step in range(GROUP_STEPS):
        number = step * BLOCK + lane
        start = first + number * ROWS
        group = groups_ptr + (first_group + number) * 4
        keep = first_group + number < last_group
        tl.store(group, expert + lane * 0, mask=keep)
        tl.store(group + 1, start, mask=keep)
        tl.store(group + 2, tl.minimum(start + ROWS, last), mask=keep)


def group_pairs(index: torch.Tensor, count: int, rows: int) -> Grouped:
    """index: int [P] contiguous, the expert of each pair; rows: of a group at most. Pairs of an expert stay in order.

    Pairs whose expert is outside 0..count-1 are in no group; the end of `order`, where they would be, is not written.
    """
    pairs = index.numel()
    block = min(max(triton.next_power_of_2(pairs), 32 * _THREAD_PAIRS), _MOST_AT_A_TIME)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    places = torch.empty_like(order)
    groups = torch.empty(pairs // rows + count, _GROUP_WORDS, dtype=torch.int32, device=index.device)
    _group_kernel[(count,)](
        index_ptr=index,
        order_ptr=order,
        groups_ptr=groups,
        places_ptr=places,
        pairs=pairs,
        count=count,
        ROWS=rows,
        PAIR_STEPS=_steps(pairs, block),
        GROUP_STEPS=_steps(pairs // rows + 2, block),
        BLOCK=block,
        num_warps=block // (32 * _THREAD_PAIRS),
        enable_fp_fusion=True,
    )
    return Grouped(order, groups, places, rows)


def _steps(count: int, block: int) -> int:
    """Rounded up to a power of two, so that few kernels are compiled."""
    return triton.next_power_of_2(triton.cdiv(count, block))
