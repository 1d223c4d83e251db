"""The GPU's own weight layout: the disk's bits in the order in which tensor-core lanes want them.

A tile is 32 rows by one 128-block, 4096 weights. The warp that multiplies it holds 128 of them per lane: the four rows
g, g + 8, g + 16, g + 24 (g = lane // 4) at the 32 columns whose bits 3 and 4 are lane % 4, which is what the A operand
of `mma.m16n8k32` asks for once columns are taken in the order below. A lane's words lie in planes of 16 bytes a lane,
so that a warp reads a plane in one coalesced instruction:

    planes 0..3   4 bits each, eight consecutive columns a word
    plane 4       signs, one word a row: bit 8 i + 7 - t is the sign of column i of group t

A column is  32 s + 8 q + 4 r + i:  i in 0..3 within a register, q = lane % 4, (s, r) the register; group t is 2 s + r.
Magnitude m and sign stand for the m-th positive level or minus it: the table must be odd-symmetric. Of 5-bit codes the
first planes hold the magnitudes; narrower codes have it and the sign, in bit 3, in the 4 bits and no plane of signs, so
that 2 and 3 bits take the room of 4.

Norms follow as fp16 [tiles, 8, 4]: the four of a lane side by side. Rows are padded with zeros to 32s; otherwise the
layout has exactly the disk's 5 or 4 bits a weight and 16 a norm.
"""

import torch

from polar_kernels.errors import ArgumentError
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.packing import pack_valid_codes, unpack_codes

TILE_ROWS = 32
PLANE_WORDS = 128
_LANES, _LANE_WORDS = 32, 4
# Where things are in a `level_table`.
FP16_LEVELS, LEVEL_STEP, PART_LEVELS = 4, 12, 16
PARTS = 255
FP16_PAIRS = PART_LEVELS + 4 * (PARTS + 1)
PAIRS = 256  # of nibbles
BF16_PAIRS = FP16_PAIRS + PAIRS
LEVEL_WORDS = BF16_PAIRS + PAIRS
_CHUNK_TILES = 1 << 9  # rearranged at a time; keeps the temporaries under 100 MB


def tile_width(bits: int) -> int:
    """Bits a weight takes in a tile, which is also the number of a tile's planes."""
    return 5 if bits == 5 else 4


def tile_weight(packed: torch.Tensor, norms: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """packed uint8 [N, Kp * bits / 8], norms fp16 [N, Kp / 128] -> tiles int32 [T, 128 * width], norms fp16 [T, 8, 4].

    T = ceil(N / 32) * Kp / 128, the tiles of the first 32 rows first. bits: 2 to 5.
    """
    out_features, blocks = norms.shape
    bands = -(-out_features // TILE_ROWS)
    tiles = packed.new_empty(bands * blocks, PLANE_WORDS * tile_width(bits), dtype=torch.int32)
    step = max(1, _CHUNK_TILES // max(1, blocks))
    for band in range(0, bands, step):
        rows = slice(band * TILE_ROWS, (band + step) * TILE_ROWS)
        codes = _pad_rows(unpack_codes(packed[rows], bits))
        tiles[band * blocks : (band + step) * blocks] = _tile_codes(codes, bits)
    grouped = _pad_rows(norms).view(bands, _LANE_WORDS, 8, blocks)
    return tiles, grouped.permute(0, 3, 2, 1).reshape(bands * blocks, 8, _LANE_WORDS).contiguous()


def untile_weight(
    tiles: torch.Tensor, tile_norms: torch.Tensor, out_features: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse: packed uint8 [N, Kp * bits / 8] and norms fp16 [N, Kp / 128]."""
    bands = -(-out_features // TILE_ROWS)
    blocks = tiles.shape[0] // bands if bands else 0
    packed = tiles.new_empty(bands * TILE_ROWS, blocks * BLOCK_SIZE * bits // 8, dtype=torch.uint8)
    step = max(1, _CHUNK_TILES // max(1, blocks))
    for band in range(0, bands, step):
        codes = _untile_codes(tiles[band * blocks : (band + step) * blocks], blocks, bits)
        packed[band * TILE_ROWS : (band + step) * TILE_ROWS] = pack_valid_codes(codes, bits)
    norms = tile_norms.view(bands, blocks, 8, _LANE_WORDS).permute(0, 3, 2, 1).reshape(bands * TILE_ROWS, blocks)
    return packed[:out_features].contiguous(), norms[:out_features].contiguous()


def untile_rows(
    tiles: torch.Tensor, tile_norms: torch.Tensor, rows: torch.Tensor, out_features: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R] int64, each in 0..N-1, as stored: packed uint8 [R, Kp * bits / 8] and norms fp16 [R, Kp / 128]."""
    bands, count = -(-out_features // TILE_ROWS), len(rows)
    blocks = tiles.shape[0] // bands
    band, inside = rows // TILE_ROWS, rows % TILE_ROWS
    half, row_half, g = inside // 16, inside // 8 % 2, inside % 8
    norms = tile_norms.view(bands, blocks, 8, _LANE_WORDS)[band, :, g, 2 * half + row_half]
    lanes = tiles.view(bands, blocks, tile_width(bits), 8, 4, _LANE_WORDS)[band, :, :, g]  # [R, block, plane, q, word]
    own = torch.arange(count, device=rows.device)
    words = lanes[:, :, :4].reshape(count, blocks, 2, 2, 4, 2, 2)  # row block h s1 q s0 r
    words = words[own, :, half, :, :, :, row_half].permute(0, 1, 2, 4, 3).reshape(count, blocks, 4, 4)
    nibbles = _nibbles(words[..., None, None])
    negative = None
    if bits == 5:
        signs = lanes[:, :, 4][own, :, :, 2 * half + row_half]  # [R, block, q]
        negative = _signs(signs[:, :, None, :, None, None])
    codes = _codes(nibbles, negative, bits)
    return pack_valid_codes(codes.reshape(count, blocks * BLOCK_SIZE), bits), norms


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS))


def _tile_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [bands * 32, Kp] -> int32 [bands * blocks, 128 * width]."""
    codes, middle = codes.int(), 1 << (bits - 1)
    negative = codes < middle
    nibble = torch.where(negative, middle - 1 - codes, codes - middle)
    if bits != 5:
        nibble |= negative.int() << 3
    shape = _axes(codes)
    # [band, tile half, row half, g, block, s, q, r, i]
    nibbles = nibble.view(shape) << (4 * torch.arange(8, device=codes.device, dtype=torch.int32).view(2, 4))
    words = nibbles.sum((-2, -1), dtype=torch.int32)  # fields are disjoint; the top one may wrap into the sign
    planes = words.unflatten(5, (2, 2)).permute(0, 4, 1, 5, 3, 7, 6, 2)  # s -> (plane, word): band block h s1 g q s0 r
    lanes = planes.reshape(*planes.shape[:2], 4, _LANES, _LANE_WORDS)
    if bits != 5:
        return lanes.reshape(-1, PLANE_WORDS * 4)
    flags = negative.view(shape).int() << _sign_shifts(codes.device)
    signs = flags.sum((5, 7, 8), dtype=torch.int32)  # [band, half, row half, g, block, q]
    sign_plane = signs.permute(0, 4, 3, 5, 1, 2).reshape(*planes.shape[:2], 1, _LANES, _LANE_WORDS)
    return torch.cat([lanes, sign_plane], 2).reshape(-1, PLANE_WORDS * 5)


def _untile_codes(tiles: torch.Tensor, blocks: int, bits: int) -> torch.Tensor:
    """The inverse of `_tile_codes`: uint8 [bands * 32, Kp]."""
    planes = tiles.view(-1, blocks, tile_width(bits), _LANES, _LANE_WORDS)
    bands = planes.shape[0]
    words = planes[:, :, :4].reshape(bands, blocks, 2, 2, 8, 4, 2, 2)  # band block h s1 g q s0 r
    words = words.permute(0, 2, 7, 4, 1, 3, 6, 5).reshape(bands, 2, 2, 8, blocks, 4, 4)
    negative = None
    if bits == 5:
        signs = planes[:, :, 4].reshape(bands, blocks, 8, 4, 2, 2).permute(0, 4, 5, 2, 1, 3)  # band h r g block q
        negative = _signs(signs[:, :, :, :, :, None, :, None, None])
    codes = _codes(_nibbles(words[..., None, None]), negative, bits)
    return codes.reshape(bands * TILE_ROWS, blocks * BLOCK_SIZE)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Words [..., s, q, 1, 1] -> their eight fields [..., s, q, r, i]."""
    return (words >> (4 * torch.arange(8, device=words.device, dtype=torch.int32).view(2, 4))) & 15


def _signs(words: torch.Tensor) -> torch.Tensor:
    """Sign words [..., 1, q, 1, 1] -> 1 where negative [..., s, q, r, i]."""
    return (words >> _sign_shifts(words.device)) & 1


def _codes(nibbles: torch.Tensor, negative: torch.Tensor | None, bits: int) -> torch.Tensor:
    """uint8 codes of magnitudes and signs, or of nibbles that hold both."""
    if negative is None:
        nibbles, negative = nibbles & 7, nibbles >> 3
    middle = 1 << (bits - 1)
    return torch.where(negative == 1, middle - 1 - nibbles, middle + nibbles).to(torch.uint8)


def _axes(codes: torch.Tensor) -> tuple[int, ...]:
    """[band, tile half, row half, g, block, s, q, r, i]"""
    return (codes.shape[0] // TILE_ROWS, 2, 2, 8, codes.shape[1] // BLOCK_SIZE, 4, 4, 2, 4)


def _sign_shifts(device: torch.device) -> torch.Tensor:
    """Bit of each sign in its word, over [s, q, r, i]."""
    s = torch.arange(4, device=device, dtype=torch.int32).view(4, 1, 1, 1)
    r = torch.arange(2, device=device, dtype=torch.int32).view(1, 1, 2, 1)
    i = torch.arange(4, device=device, dtype=torch.int32)
    return 8 * i + 7 - (2 * s + r)


def level_table(centroids: torch.Tensor) -> torch.Tensor:
    """The words a kernel decodes with: int32 [LEVEL_WORDS].

    0..3: the positive levels, 16 at most, as bytes v, four a word, level ~ (v + 1/2) * delta; from FP16_LEVELS: four
    words of the low and four of the high bytes of the levels in fp16; LEVEL_STEP: delta's bits; from PART_LEVELS: of
    each i in 0..PARTS four words like the first, of the levels times i / PARTS; from FP16_PAIRS and BF16_PAIRS: of each
    byte of a plane the two levels, of 5 bits the positive ones, in that type.
    Raises ArgumentError for a table that the layout cannot hold.
    """
    if not is_tileable(centroids):
        raise ArgumentError("the tile layout needs an odd-symmetric table of 4 to 32 levels")
    positive = centroids[centroids.numel() // 2 :].cpu()
    steps, delta = half_integer_levels(positive)
    deltas = torch.tensor([delta, 0, 0, 0], dtype=torch.float32).view(torch.int32)
    parts = _bytes_to_words(_part_levels(positive, delta)).flatten()
    pairs = (_pairs(positive.half()), _pairs(positive.bfloat16()))
    return torch.cat([_bytes_to_words(steps), *_split_bytes(positive.half()), deltas, parts, *pairs]).to(
        centroids.device
    )


def _pairs(positive: torch.Tensor) -> torch.Tensor:
    """Levels in 16 bits [16 at most] -> int32 [PAIRS]: that of the lower nibble in the lower half."""
    values = positive
    if len(positive) < 16:
        padded = torch.nn.functional.pad(positive, (0, 8 - len(positive)))
        values = torch.cat([padded, -padded])
    nibbles = torch.arange(PAIRS)
    return torch.stack([values[nibbles % 16], values[nibbles // 16]], 1).view(torch.int32).flatten()


def _part_levels(positive: torch.Tensor, delta: float) -> torch.Tensor:
    """Bytes v int32 [PARTS + 1, levels], for which (v + 1/2) * delta is closest to i / PARTS times the levels."""
    parts = torch.arange(PARTS + 1, dtype=torch.float64)[:, None] / PARTS
    return (parts * positive.double() / delta - 0.5).round().clamp(0, 127).int()


def _split_bytes(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 [16 at most] -> their low and their high bytes, int32 [4] each."""
    bits = levels.view(torch.int16).int() & 0xFFFF
    return _bytes_to_words(bits & 0xFF), _bytes_to_words(bits >> 8)


def is_tileable(centroids: torch.Tensor) -> bool:
    """Whether a table has 4 to 32 levels and is odd-symmetric."""
    return centroids.numel() in (4, 8, 16, 32) and torch.equal(centroids, -centroids.flip(0))


def half_integer_levels(positive: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Bytes v int32 in 0..127 and the step delta for which (v + 1/2) * delta is closest to the positive levels.

    Half-integers make the bitwise complement an exact negation. Closest: smallest squared error under N(0, 1).
    """
    levels = positive.double()
    edges = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_full((1,), torch.inf)])
    mass = torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1])
    steps = levels[-1] / torch.linspace(100, 127.5, 4001, dtype=torch.float64)  # candidates for delta
    values = (levels / steps[:, None] - 0.5).round().clamp(0, 127)
    errors = (((values + 0.5) * steps[:, None] - levels).square() * mass).sum(1)
    best = int(errors.argmin())
    return values[best].int(), float(steps[best])


def _bytes_to_words(values: torch.Tensor) -> torch.Tensor:
    """int32 [.., 16 at most] in 0..255 -> int32 [.., 4], little-endian, zeros where there are fewer."""
    return torch.nn.functional.pad(values.to(torch.uint8), (0, 16 - values.shape[-1])).view(torch.int32)
