"""Values of a published layer, checked and brought into the format's dtypes and bit order."""

import torch

from model_patch.checkpoint.published.layout import CODES, NORMS, SCALES, PublishedLayer, Storage, place
from model_patch.checkpoint.reader import Checkpoint
from model_patch.errors import CheckpointError
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.packing import BitOrder, pack_codes, packed_size, unpack_codes

_CHUNK = 1 << 22  # codes unpacked at a time; each takes eight bytes on the way
# Squared share of the norms that rounding them to fp16 may cost; ordinary rounding costs 1e-7.
_MAX_NORM_LOSS = 1e-5


def decode(stored: torch.Tensor, layer: PublishedLayer, bit_order: BitOrder) -> torch.Tensor:
    """Codes [n, Kp] of rows as stored [n, row_bytes]; int8 or uint8, not yet checked against the table."""
    if layer.storage is Storage.STREAM:
        return unpack_codes(stored, layer.bits, bit_order)
    if layer.storage is Storage.NIBBLES:
        halves = stored.unflatten(-1, (-1, BLOCK_SIZE // 2))
        return torch.cat([halves & 15, halves >> 4], -1).flatten(-2)
    return stored.view(torch.uint8) if layer.bits == 8 else stored  # int8 stores the codes from 128 on as negative


def read_packed(source: Checkpoint, layer: PublishedLayer, bit_order: BitOrder | None) -> torch.Tensor:
    """The codes as the format stores them: uint8 [N, Kp * bits / 8], LSB-first.

    Raises CheckpointError for a code outside the table.
    """
    order = bit_order or "lsb"
    stored = source.read(layer.parts[CODES]).reshape(layer.rows, layer.row_bytes)
    if layer.storage is Storage.STREAM and (order == "lsb" or layer.bits == 8):
        return stored
    packed = torch.empty(layer.rows, packed_size(layer.padded, layer.bits), dtype=torch.uint8)
    step = max(1, _CHUNK // layer.padded)
    for start in range(0, layer.rows, step):
        codes = decode(stored[start : start + step], layer, order)
        _check_codes(source, layer, codes, start)
        packed[start : start + step] = pack_codes(codes, layer.bits)
    return packed


def read_norms(source: Checkpoint, layer: PublishedLayer) -> torch.Tensor:
    """Block norms fp16 [N, Kp / 128].

    Raises CheckpointError for NaN, infinite or negative ones, and for those that fp16 cannot hold.
    """
    stored = source.read(layer.parts[NORMS]).reshape(layer.rows, -1)
    where = place(source, layer.parts[NORMS])
    _refuse_norms(source, where, stored, ~(stored.isfinite() & (stored >= 0)), "must be finite and not negative")
    norms = stored.half()
    _refuse_norms(source, where, stored, norms.isinf(), "must not pass 65504, the largest fp16 number")
    exact = stored.double()
    if (exact - norms.double()).square().sum() > _MAX_NORM_LOSS * exact.square().sum():
        raise CheckpointError(
            source.where, f"{where} must be large enough for fp16, found none above {exact.max().item():.3g}"
        )
    return norms


def read_scales(source: Checkpoint, layer: PublishedLayer) -> torch.Tensor:
    """AWQ scales fp16 [K]. Raises CheckpointError for values that are not finite and positive in fp16."""
    stored = source.read(layer.parts[SCALES])
    scales = stored.half()
    bad = ~(scales.isfinite() & (scales > 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        where = place(source, layer.parts[SCALES])
        raise CheckpointError(
            source.where, f"{where} must be finite and positive in fp16; found {stored[index].item()} at [{index}]"
        )
    return scales


def refuse_scaled(source: Checkpoint, layer: PublishedLayer) -> None:
    """Raise CheckpointError when an embedding has AWQ scales that do something."""
    if SCALES in layer.parts and not (read_scales(source, layer) == 1).all():
        raise CheckpointError(
            source.where,
            f"{place(source, layer.parts[SCALES])} must be all ones or absent: an embedding has no input to scale",
        )


def _check_codes(source: Checkpoint, layer: PublishedLayer, codes: torch.Tensor, first_row: int) -> None:
    largest = (1 << layer.bits) - 1
    bad = (codes < 0) | (codes > largest)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise CheckpointError(
            source.where,
            f"{place(source, layer.parts[CODES])} must hold codes in 0..{largest} ({layer.bits} bits); "
            f"found {codes[row, column].item()} at row {first_row + row}, column {column}",
        )


def _refuse_norms(source: Checkpoint, where: str, norms: torch.Tensor, bad: torch.Tensor, rule: str) -> None:
    if bad.any():
        row, block = bad.nonzero()[0].tolist()
        raise CheckpointError(
            source.where, f"{where} {rule}; found {norms[row, block].item()} at row {row}, block {block}"
        )
