"""The byte stream against answers written by hand, a bit-by-bit encoder, and round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_kernels import ArgumentError, pack_codes, unpack_codes

ALL_BITS = range(2, 9)
ORDERS = ("lsb", "msb")


def encode(codes: list[int], bits: int, order: str) -> list[int]:
    """One bit at a time: a code's lowest bit first into a byte's lowest bit, or highest first into highest."""
    data = [0] * (len(codes) * bits // 8)
    for position in range(len(codes) * bits):
        code, bit = codes[position // bits], position % bits
        if order == "lsb":
            data[position // 8] |= (code >> bit & 1) << position % 8
        else:
            data[position // 8] |= (code >> (bits - 1 - bit) & 1) << (7 - position % 8)
    return data


@pytest.mark.parametrize(
    ("bits", "order", "codes", "data"),
    [
        (5, "lsb", range(8), "20 88 41 8a 39"),
        (5, "msb", range(8), "00 44 32 14 c7"),
        (5, "lsb", [31, 0, 0, 0, 0, 0, 0, 16], "1f 00 00 00 80"),
        (5, "msb", [31, 0, 0, 0, 0, 0, 0, 1], "f8 00 00 00 01"),
        (3, "lsb", range(8), "88 c6 fa"),
        (3, "msb", range(8), "05 39 77"),
        (4, "lsb", [1, 2, 3, 4, 5, 6, 7, 8], "21 43 65 87"),
        (4, "msb", [1, 2, 3, 4, 5, 6, 7, 8], "12 34 56 78"),
        (2, "lsb", [0, 1, 2, 3, 3, 2, 1, 0], "e4 1b"),
        (2, "msb", [0, 1, 2, 3, 3, 2, 1, 0], "1b e4"),
        (8, "lsb", range(248, 256), "f8 f9 fa fb fc fd fe ff"),
        (8, "msb", range(248, 256), "f8 f9 fa fb fc fd fe ff"),
    ],
)
def test_known_answers(device: torch.device, bits: int, order: str, codes: list[int], data: str) -> None:
    packed = pack_codes(torch.tensor(list(codes), device=device), bits, order)
    assert bytes(packed.tolist()).hex(" ") == data
    assert unpack_codes(packed, bits, order).tolist() == list(codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_bytes_equal_the_bit_by_bit_encoder(device: torch.device, bits: int, order: str) -> None:
    codes = torch.randint(0, 1 << bits, (3, 256), device=device)
    packed = pack_codes(codes, bits, order)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [encode(row, bits, order) for row in codes.tolist()]


@given(
    data=st.data(),
    bits=st.sampled_from(ALL_BITS),
    order=st.sampled_from(ORDERS),
    rows=st.integers(0, 3),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
def test_round_trip(data, bits: int, order: str, rows: int, groups: int, dtype: torch.dtype) -> None:
    size = rows * groups * 8
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=size, max_size=size))
    codes = torch.tensor(values, dtype=dtype).view(rows, groups * 8)
    unpacked = unpack_codes(pack_codes(codes, bits, order), bits, order)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_byte_string_is_a_stream(device: torch.device, bits: int, order: str) -> None:
    packed = torch.randint(0, 256, (5, bits * 16), dtype=torch.uint8, device=device)
    assert torch.equal(pack_codes(unpack_codes(packed, bits, order), bits, order), packed)


def test_leading_dimensions(device: torch.device) -> None:
    codes = torch.randint(0, 32, (2, 3, 16), device=device)
    packed = pack_codes(codes, 5)
    assert packed.shape == (2, 3, 10)
    assert torch.equal(packed[1, 2], pack_codes(codes[1, 2], 5))
    assert torch.equal(unpack_codes(packed, 5), codes.to(torch.uint8))


def test_unpacked_bytes_are_a_copy(device: torch.device) -> None:
    packed = torch.zeros(8, dtype=torch.uint8, device=device)
    unpack_codes(packed, 8).fill_(1)
    assert not packed.any()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_code_out_of_range(device: torch.device, bits: int) -> None:
    for code in (-1, 1 << bits):
        with pytest.raises(ArgumentError, match=rf"0\.\.{(1 << bits) - 1}, found .*{code}"):
            pack_codes(torch.tensor([0] * 7 + [code], device=device), bits)


def test_code_count_no_multiple_of_eight(device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="multiple of 8, found 12"):
        pack_codes(torch.zeros(12, dtype=torch.int64, device=device), 5)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_unknown_order(device: torch.device, bits: int) -> None:
    with pytest.raises(ArgumentError, match="bit_order must be 'lsb' or 'msb', found 'big'"):
        pack_codes(torch.zeros(8, dtype=torch.int64, device=device), bits, "big")
    with pytest.raises(ArgumentError, match="bit_order must be 'lsb' or 'msb', found 'big'"):
        unpack_codes(torch.zeros(bits, dtype=torch.uint8, device=device), bits, "big")


@pytest.mark.parametrize("bits", [1, 9, True, 5.0])
def test_wrong_bits(device: torch.device, bits: int) -> None:
    with pytest.raises(ArgumentError, match="bits must be"):
        pack_codes(torch.zeros(8, dtype=torch.int64, device=device), bits)
    with pytest.raises(ArgumentError, match="bits must be"):
        unpack_codes(torch.zeros(40, dtype=torch.uint8, device=device), bits)


@pytest.mark.parametrize(("dtype", "size"), [(torch.int32, 5), (torch.uint8, 6)])
def test_wrong_stream(device: torch.device, dtype: torch.dtype, size: int) -> None:
    with pytest.raises(ArgumentError, match="packed must be uint8 with a multiple of 5 bytes"):
        unpack_codes(torch.zeros(size, dtype=dtype, device=device), 5)
