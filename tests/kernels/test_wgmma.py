"""Products of many rows: by wgmma straight from the codes, and with the weight requantised first."""

import pytest
import torch
from int8_errors import INT8_ERROR, SHARED_ERROR

from polar_kernels import reference
from polar_kernels.kernels import int8_dense
from polar_kernels.kernels.decode_pairs import PAIRS_BYTES
from polar_kernels.kernels.exact_blocks import exact_piece_bytes
from polar_kernels.kernels.exact_wgmma import exact_wgmma_linear
from polar_kernels.kernels.int8_wgmma import int8_wgmma_linear
from polar_kernels.kernels.shared_memory import all_launched_bytes, declared_bytes, launched_bytes
from polar_kernels.kernels.wgmma_blocks import piece_bytes
from polar_kernels.kernels.wgmma_forms import (
    EXACT_FORMS,
    EXPERT_FORM,
    FORMS,
    SCALE_BLOCKS,
    Form,
    choose_cut,
)
from polar_kernels.tiles import tile_weight


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.rows}x{form.warps}x{form.shares}")
@pytest.mark.parametrize("shape", [(40, 128), (257, 1152), (70, 200), (4096, 384), (520, 4096)])
@pytest.mark.parametrize("rows", [1, 63, 65, 128, 300])
def test_wgmma(device, poisoned, tiled, relative_error, shape: tuple[int, int], rows: int, form: Form) -> None:
    """However the product is cut into programs, and however many of those share the blocks of K; a row of the weight
    that is zero, a block that is, and one that is small beside the others."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("wgmma is Hopper's")
    tiles, stored = tiled(*shape)
    stored[1][3] = 0
    stored[1][5, 0] = 0
    stored[1][6, -1] /= 1000
    tiles = (*tile_weight(stored[0], stored[1], 5), *tiles[2:])
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    x[rows // 2, -1] = torch.nan
    offset = torch.randn(shape[0], device=device)
    exact = reference.linear(x.double(), *stored, offset)
    sound = torch.arange(rows, device=device) != rows // 2
    for cut in (None, (form, 64), (form, 16), (form, 8)):
        for dtype in (torch.bfloat16, torch.float16):
            y = int8_wgmma_linear(x.to(dtype), *tiles[:4], offset, shape[0], cut)
            assert y.dtype == dtype
            assert y[rows // 2].isnan().all()
            if rows > 1:
                assert torch.equal(y[sound, 3], offset[3].to(dtype).expand(rows - 1))
                assert relative_error(y[sound], exact[sound]) < 1.2 * INT8_ERROR  # one block of K varies more


@pytest.mark.gpu
@pytest.mark.parametrize("form", EXACT_FORMS, ids=lambda form: f"{form.rows}x{form.warps}x{form.shares}")
@pytest.mark.parametrize("shape", [(40, 128), (257, 1152), (70, 200), (4096, 384), (520, 4096)])
@pytest.mark.parametrize("rows", [1, 31, 64, 130])
@pytest.mark.parametrize("bits", [3, 5])
def test_exact_wgmma(
    device, poisoned, tiled, relative_error, shape: tuple[int, int], rows: int, form: Form, bits: int
) -> None:
    """However the product is cut into programs; a row of the weight that is zero, and one of x that is not finite."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("wgmma is Hopper's")
    tiles, stored = tiled(*shape, bits=bits)
    stored[1][3] = 0
    tiles = (*tile_weight(stored[0], stored[1], bits), *tiles[2:])
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    x[rows // 2, -1] = torch.inf
    offset = torch.randn(shape[0], device=device)
    exact = reference.linear(x.double(), *stored, offset)
    dense = reference.dequantize(*stored, shape[1], torch.float64)
    sound = torch.arange(rows, device=device) != rows // 2
    for dtype in (torch.bfloat16, torch.float16):
        plain = torch.nn.functional.linear(x.to(dtype), dense.to(dtype), offset.to(dtype))
        for cut in (None, (form, 64), (form, 16), (form, 4)):
            y = exact_wgmma_linear(x.to(dtype), *tiles[:4], offset, shape[0], cut)
            assert y.dtype == dtype
            assert not y[rows // 2].isfinite().any()
            if rows > 1:
                assert torch.equal(y[sound, 3], offset[3].to(dtype).expand(rows - 1))
                assert relative_error(y[sound], exact[sound]) < 2 * relative_error(plain[sound], exact[sound])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(40, 512), (257, 1536), (1000, 4096), (128, 12288)])
@pytest.mark.parametrize("rows", [1, 128, 255, 700])
def test_int8_dense(
    device, poisoned, tiled, relative_error, monkeypatch, shape: tuple[int, int], rows: int, bits: int
) -> None:
    """In one part and in several; a whole block of zeros, and a row of the weight."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("wgmma is Hopper's")
    tiles, stored = tiled(*shape, bits=bits)
    stored[1][3] = 0
    stored[1][5, 1] = 0
    tiles = (*tile_weight(stored[0], stored[1], bits), *tiles[2:])
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    x[rows // 2, -1] = torch.nan
    offset = torch.randn(shape[0], device=device)
    exact = reference.linear(x.double(), *stored, offset)
    sound = torch.arange(rows, device=device) != rows // 2
    for dtype in (torch.bfloat16, torch.float16):
        y = int8_dense.int8_dense_linear(x.to(dtype), *tiles[:4], offset, shape[0])
        assert y.dtype == dtype
        assert y[rows // 2].isnan().all()
        if rows > 1:
            assert torch.equal(y[sound, 3], offset[3].to(dtype).expand(rows - 1))
            assert relative_error(y[sound], exact[sound]) < SHARED_ERROR
        with monkeypatch.context() as small:
            small.setattr(int8_dense, "_SCRATCH_BYTES", 128 * shape[1])
            parts = int8_dense.int8_dense_linear(x.to(dtype), *tiles[:4], offset, shape[0])
        assert torch.equal(parts[sound], y[sound])


@pytest.mark.gpu
def test_wgmma_of_rows_that_start_anywhere(device, poisoned, tiled, relative_error) -> None:
    """x whose first element is not at a multiple of 16 bytes."""
    tiles, stored = tiled(96, 256)
    x = torch.randn(70 * 256 + 1, device=device).bfloat16()[1:].view(70, 256)
    exact = reference.linear(x.double(), *stored, None)
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert relative_error(int8_wgmma_linear(x, *tiles[:4], None, 96), exact) < 1.2 * INT8_ERROR


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 129, 512])
@pytest.mark.parametrize("blocks", [1, 2, 9, 32, 96])
@pytest.mark.parametrize("out_features", [1, 1024, 12288, 248320])
def test_the_cut_fills_the_gpu(rows: int, blocks: int, out_features: int, exact: bool) -> None:
    """Where K has blocks to share; with no program without one, and no more than one part of a large output."""
    form, split_blocks = choose_cut(rows, out_features, blocks, 132, exact=exact)
    splits = -(-blocks // (split_blocks * form.shares))
    assert form in (EXACT_FORMS if exact else FORMS)
    assert form.rows <= max(32 if exact else 64, 2 * rows)
    assert split_blocks > 0
    assert split_blocks % SCALE_BLOCKS == 0
    assert out_features < 100_000 or splits == 1
    programs = -(-rows // form.rows) * -(-out_features // (16 * form.warps)) * splits * form.shares
    assert programs >= 32 or split_blocks <= 16


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("form", [*FORMS, EXPERT_FORM])
def test_a_multiprocessor_has_room_for_the_programs_of_a_form(form: Form, width: int) -> None:
    size = piece_bytes(form.rows, form.x_slots, width, form.warps)
    shared = declared_bytes(size) + launched_bytes(form.shares, size)
    assert form.resident * (shared + 1024) <= 228 << 10
    assert form.resident * 32 * form.warps * form.shares * form.registers <= 1 << 16


@pytest.mark.parametrize("form", EXACT_FORMS)
def test_it_has_room_for_those_of_an_exact_form(form: Form) -> None:
    size = exact_piece_bytes(form.rows, form.x_slots, 5, form.warps)
    shared = PAIRS_BYTES + all_launched_bytes(form.shares, size)
    assert form.resident * (shared + 1024) <= 228 << 10
    assert form.resident * 32 * form.warps * form.shares * form.registers <= 1 << 16
