"""The GPU's weight layout: exactly the stored bits, and the tables its kernels decode with."""

import pytest
import torch

from polar_kernels import ArgumentError, lloyd_max_levels, pack_codes, published_levels
from polar_kernels.tiles import (
    FP16_PAIRS,
    LEVEL_STEP,
    PART_LEVELS,
    PARTS,
    half_integer_levels,
    is_tileable,
    level_table,
    tile_weight,
    untile_rows,
    untile_weight,
)

BITS = [2, 3, 4, 5]
SHAPES = [(1, 128), (32, 128), (37, 200), (64, 384), (257, 1152)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiling_is_undone_exactly(device: torch.device, shape: tuple[int, int], bits: int) -> None:
    rows, blocks = shape[0], -(-shape[1] // 128)
    packed = pack_codes(torch.randint(0, 1 << bits, (rows, blocks * 128), device=device), bits)
    norms = torch.rand(rows, blocks, device=device).half()
    tiles, tile_norms = tile_weight(packed, norms, bits)
    assert tiles.nbytes == -(-rows // 32) * 32 * blocks * 16 * max(4, bits)
    back = untile_weight(tiles, tile_norms, rows, bits)
    assert torch.equal(back[0], packed)
    assert torch.equal(back[1], norms)


def test_tiling_in_steps_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_codes(torch.randint(0, 32, (200, 384), device=device), 5)
    norms = torch.rand(200, 3, device=device).half()
    whole = tile_weight(packed, norms, 5)
    monkeypatch.setattr("polar_kernels.tiles._CHUNK_TILES", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, tile_weight(packed, norms, 5), strict=True))
    assert torch.equal(untile_weight(*whole, 200, 5)[0], packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_tiles(device: torch.device, shape: tuple[int, int], bits: int) -> None:
    rows, blocks = shape[0], -(-shape[1] // 128)
    packed = pack_codes(torch.randint(0, 1 << bits, (rows, blocks * 128), device=device), bits)
    norms = torch.rand(rows, blocks, device=device).half()
    wanted = torch.randint(0, rows, (40,), device=device)
    found = untile_rows(*tile_weight(packed, norms, bits), wanted, rows, bits)
    assert torch.equal(found[0], packed[wanted])
    assert torch.equal(found[1], norms[wanted])


def test_neither_way_looks_at_values() -> None:
    """As it must not where a CUDA graph is captured; a meta tensor has none to look at."""
    packed = torch.empty(70, 240, dtype=torch.uint8, device="meta")
    tiles = tile_weight(packed, torch.empty(70, 3, dtype=torch.float16, device="meta"), 5)
    assert [tensor.shape for tensor in untile_weight(*tiles, 70, 5)] == [(70, 240), (70, 3)]


@pytest.mark.parametrize("bits", BITS)
def test_half_integers_are_close_to_the_levels(bits: int) -> None:
    positive = lloyd_max_levels(bits)[1 << (bits - 1) :]
    steps, delta = half_integer_levels(positive)
    assert steps.min() >= 0
    assert steps.max() <= 127
    assert ((steps + 0.5) * delta - positive).abs().max() < 0.51 * delta


@pytest.mark.parametrize("levels", [lloyd_max_levels(2), lloyd_max_levels(5), published_levels(5)])
def test_levels_times_parts(levels: torch.Tensor) -> None:
    """The whole is the table of the levels themselves; any part is off by half a step at most."""
    table, positive = level_table(levels), levels[len(levels) // 2 :].double()
    words = table[PART_LEVELS:FP16_PAIRS].view(PARTS + 1, 4)
    tables = words.view(torch.uint8).double()[:, : len(positive)]
    assert torch.equal(words[PARTS], table[:4])
    delta = float(table[LEVEL_STEP].view(torch.float32))
    exact = torch.arange(PARTS + 1).double()[:, None] / PARTS * positive
    assert ((tables + 0.5) * delta - exact).abs().max() < 0.51 * delta
    assert tables.max() <= 127


def test_tables_that_have_tiles() -> None:
    assert is_tileable(lloyd_max_levels(5))
    assert is_tileable(published_levels(5))
    assert is_tileable(lloyd_max_levels(2))
    assert not is_tileable(lloyd_max_levels(6))
    crooked = lloyd_max_levels(5) + 0.01
    assert not is_tileable(crooked)
    with pytest.raises(ArgumentError, match="odd-symmetric"):
        level_table(crooked)
