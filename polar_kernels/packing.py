"""Codes of 2 to 8 bits in bytes: every 8 codes of a row fill `bits` bytes.

`lsb` (the format's order): code i of a group occupies bits i*bits .. i*bits + bits - 1 of the little-endian group.
`msb` (some published files): code 0 occupies the top bits of byte 0. One is the other with each byte's bits and each
code's bits reversed, but a file read in the wrong order raises nothing and gives noise.
"""

from typing import Literal

import torch

from polar_kernels.codebook import check_bits
from polar_kernels.errors import ArgumentError

BitOrder = Literal["lsb", "msb"]
_GROUP = 8  # codes in a group


def packed_size(codes: int, bits: int) -> int:
    """Bytes of `codes` codes (a multiple of 8)."""
    return codes * bits // 8


def _shifts(bits: int, bit_order: BitOrder, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bit position of each code, and of each byte, in a group held as one 64-bit integer."""
    if bit_order not in ("lsb", "msb"):
        raise ArgumentError(f"bit_order must be 'lsb' or 'msb', found {bit_order!r}")
    codes = torch.arange(_GROUP, device=device) * bits
    data = torch.arange(bits, device=device) * 8
    return (codes, data) if bit_order == "lsb" else (codes.flip(0), data.flip(0))


def pack_codes(codes: torch.Tensor, bits: int, bit_order: BitOrder = "lsb") -> torch.Tensor:
    """Pack codes [..., K] (any integers below 2^bits, K a multiple of 8) into uint8 [..., K * bits / 8]."""
    check_bits(bits)
    if codes.shape[-1] % _GROUP:
        raise ArgumentError(f"the last dimension must be a multiple of {_GROUP}, found {codes.shape[-1]}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ArgumentError(f"codes must lie in 0..{(1 << bits) - 1}, found {int(codes.min())}..{int(codes.max())}")
    return pack_valid_codes(codes, bits, bit_order)


def pack_valid_codes(codes: torch.Tensor, bits: int, bit_order: BitOrder = "lsb") -> torch.Tensor:
    """`pack_codes` without its look at the values, which waits for the GPU: for codes that cannot be wrong."""
    code_shifts, byte_shifts = _shifts(bits, bit_order, codes.device)
    if bits == 8:
        return codes.to(torch.uint8)
    groups = codes.unflatten(-1, (-1, _GROUP)).to(torch.int64) << code_shifts
    word = groups.sum(-1, keepdim=True)  # the fields are disjoint, so the sum is their union
    return ((word >> byte_shifts) & 0xFF).to(torch.uint8).flatten(-2)


def unpack_codes(packed: torch.Tensor, bits: int, bit_order: BitOrder = "lsb") -> torch.Tensor:
    """Unpack uint8 [..., K * bits / 8] into codes uint8 [..., K]."""
    check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] % bits:
        raise ArgumentError(
            f"packed must be uint8 with a multiple of {bits} bytes a row, found {packed.dtype} {tuple(packed.shape)}"
        )
    code_shifts, byte_shifts = _shifts(bits, bit_order, packed.device)
    if bits == 8:
        return packed.clone()
    word = (packed.unflatten(-1, (-1, bits)).to(torch.int64) << byte_shifts).sum(-1, keepdim=True)
    return ((word >> code_shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
