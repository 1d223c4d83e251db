"""The assembly that decodes a tile's words, carried out here instruction by instruction, against the codes' levels."""

import re
from collections.abc import Callable

import pytest
import torch

from polar_kernels import lloyd_max_levels, pack_codes, unpack_codes
from polar_kernels.kernels.decode_halves import decode_halves_code
from polar_kernels.kernels.decode_int8 import decode_int8_code
from polar_kernels.kernels.decode_pairs import decode_pairs_code
from polar_kernels.tiles import (
    BF16_PAIRS,
    FP16_LEVELS,
    FP16_PAIRS,
    PAIRS,
    PLANE_WORDS,
    half_integer_levels,
    level_table,
    tile_weight,
    tile_width,
)

WORD = 0xFFFFFFFF


def _permute(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = data[nibble & 7]
        out |= (0xFF * (byte >> 7) if nibble & 8 else byte) << (8 * i)
    return out


def _look_up_bits(a: int, b: int, c: int, table: int) -> int:
    """lop3: bit (4 a + 2 b + c) of the table, for each bit of the operands."""
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, n: a << n & WORD,
    "shr.u32": lambda a, n: a >> n,
    "dp4a.u32.u32": lambda a, b, c: sum((a >> i & 0xFF) * (b >> i & 0xFF) for i in (0, 8, 16, 24)) + c & WORD,
    "dp2a.lo.u32.u32": lambda a, b, c: (a & 0xFFFF) * (b & 0xFF) + (a >> 16) * (b >> 8 & 0xFF) + c & WORD,
    "prmt.b32": _permute,
    "lop3.b32": _look_up_bits,
}


def run(code: str, registers: dict[str, int], outputs: int, shared: dict[int, int] | None = None) -> list[int]:
    """The values of $0 .. after the code. shared: words of shared memory by their addresses."""
    registers = dict(registers)
    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+;(.*)\}", code)
    assert body
    for line in filter(None, (piece.strip() for piece in body[1].split(";"))):
        name, operands = line.split(" ", 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        if name == "ld.shared.b32":
            assert shared is not None
            registers[target] = shared[registers[sources[0].strip("[]")]]
            continue
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.fixture(params=[2, 3, 4, 5])
def tile(request) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bits, codes [32, 128], the tile as unsigned planes [width, 32 lanes, 4], the table's words)."""
    bits = request.param
    codes = torch.randint(0, 1 << bits, (32, 128), dtype=torch.uint8)
    assert len(codes.unique()) == 1 << bits
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits), codes)
    tiles, _ = tile_weight(packed, torch.ones(32, 1).half(), bits)
    planes = (tiles.long() & WORD).view(tile_width(bits), PLANE_WORDS // 4, 4)
    return bits, codes.long(), planes, level_table(lloyd_max_levels(bits)).long() & WORD


def lane_words(planes: torch.Tensor, lane: int, row_word: int, step: int) -> tuple[int, int]:
    """The magnitude and the sign word of one of a lane's four rows and of 32 columns, as the kernels pick them."""
    half, row_half = divmod(row_word, 2)
    word = planes[2 * half + step // 2, lane, step % 2 * 2 + row_half]
    signs = planes[4, lane, row_word] if len(planes) == 5 else torch.tensor(0)
    return int(word), int(signs)


def code_of(codes: torch.Tensor, lane: int, row_word: int, step: int, r: int, i: int) -> int:
    return int(codes[8 * row_word + lane // 4, 32 * step + 8 * (lane % 4) + 4 * r + i])


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_int8(tile, step: int, spread: bool) -> None:
    bits, codes, planes, table = tile
    steps, _ = half_integer_levels(lloyd_max_levels(bits)[1 << (bits - 1) :])
    levels = [*(-1 - steps.flip(0)).tolist(), *steps.tolist()]  # (v + 1/2) and -(v + 1/2), a half below
    program = decode_int8_code(step, tile_width(bits), spread)
    for lane in range(32):
        for row_word in range(4):
            word, signs = lane_words(planes, lane, row_word, step)
            registers = {"$2": word, "$3": signs} | {f"${4 + i}": int(table[i]) for i in range(4)}
            for r, register in enumerate(run(program, registers, 2)):
                found = [int.from_bytes([byte], signed=True) for byte in register.to_bytes(4, "little")]
                assert found == [levels[code_of(codes, lane, row_word, step, r, i)] for i in range(4)]


@pytest.mark.parametrize("step", range(4))
def test_halves(tile, step: int) -> None:
    bits, codes, planes, table = tile
    levels = lloyd_max_levels(bits).half()
    program = decode_halves_code(step, tile_width(bits))
    for lane in range(32):
        for row_word in range(4):
            word, signs = lane_words(planes, lane, row_word, step)
            registers = {"$4": word, "$5": signs} | {f"${6 + i}": int(table[FP16_LEVELS + i]) for i in range(8)}
            found = torch.tensor(run(program, registers, 4)).to(torch.uint32).view(torch.float16)
            places = [(r, i) for r in range(2) for i in range(4)]
            assert found.tolist() == [levels[code_of(codes, lane, row_word, step, *place)] for place in places]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", range(4))
def test_pairs(tile, step: int, dtype: torch.dtype) -> None:
    """Looked up in shared memory, where a lane's copy of the table is every 128 bytes."""
    bits, codes, planes, table = tile
    levels = lloyd_max_levels(bits).to(dtype)
    start = FP16_PAIRS if dtype == torch.float16 else BF16_PAIRS
    program = decode_pairs_code(step, tile_width(bits))
    for lane in range(32):
        shared = {4096 + 128 * i + 4 * lane: int(word) for i, word in enumerate(table[start : start + PAIRS])}
        for row_word in range(4):
            word, signs = lane_words(planes, lane, row_word, step)
            spread = _permute(signs, signs, 0x1302)
            registers = {"$4": word, "$5": spread, "$6": 4096 + 4 * lane}
            found = torch.tensor(run(program, registers, 4, shared)).to(torch.uint32).view(dtype)
            places = [(r, i) for r in range(2) for i in range(4)]
            assert found.tolist() == [levels[code_of(codes, lane, row_word, step, *place)] for place in places]
