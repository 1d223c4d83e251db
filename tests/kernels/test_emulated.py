"""Kernels written in assembly, in Triton's interpreter, which runs none: here it is carried out for all threads of a
program at once. What cannot be seen so: the order in which threads, and kernels that overlap, do things."""

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from polar_kernels import reference
from polar_kernels.kernels import (
    expert_pairs,
    expert_wgmma,
    int8_dense,
    int8_wgmma,
    ptx,
    quantize_activation,
    quantize_chunks,
    quantize_grouped,
    requantize_tiles,
    rotate_activation,
    tiled_experts,
)
from polar_kernels.kernels.exact_matmul import exact_linear
from polar_kernels.kernels.int8_matmul import int8_linear
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.kernels.wgmma_forms import FORMS, Form
from polar_kernels.packing import unpack_codes
from polar_kernels.tiles import LEVEL_STEP, half_integer_levels, level_table, tile_weight, untile_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
Words = np.ndarray  # uint32, one a thread
E, H, MIDDLE, K = 2, 160, 16, 2


def _permute(a: Words, b: Words, selector: Words) -> Words:
    data = np.stack([a, b], 1).view(np.uint8)
    nibbles = np.stack([selector >> np.uint32(4 * i) & np.uint32(15) for i in range(4)], 1)
    picked = np.take_along_axis(data, (nibbles & 7).astype(np.int64), 1)
    out = np.where(nibbles & 8, np.where(picked >> 7, 255, 0), picked)
    return out.astype(np.uint8).view(np.uint32).reshape(-1)


def _look_up_bits(a: Words, b: Words, c: Words, table: Words) -> Words:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _floats(words: Words) -> np.ndarray:
    return words.view(np.float32)


def _words(floats: np.ndarray) -> Words:
    return floats.astype(np.float32).view(np.uint32)


def _pack(high: Words, low: Words, dtype: torch.dtype) -> Words:
    both = torch.from_numpy(np.stack([_floats(low), _floats(high)], 1)).to(dtype)
    return both.view(torch.int32).numpy().view(np.uint32).reshape(-1)


def _unpack(words: Words, kind: str) -> np.ndarray:
    """[threads, values of a word] in fp64."""
    signed = torch.from_numpy(words.view(np.int32).copy()).view(-1, 1)
    return signed.view({"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}[kind]).double().numpy()


def _multiply(kind: str, a: list[Words], b: list[Words], c: list[Words]) -> list[Words]:
    """mma.m16n8k32 or k16: a warp's fragments are words of rows g and g + 8, and of two halves of K."""

    def fragment(words: Words) -> np.ndarray:
        return _unpack(words, kind).reshape(len(words) // 32, 8, -1)  # [warp, g, q and the values of a word]

    upper, lower = (np.concatenate([fragment(a[i]), fragment(a[i + 2])], 2) for i in (0, 1))
    columns = np.concatenate([fragment(b[0]), fragment(b[1])], 2)
    product = np.concatenate([upper, lower], 1) @ columns.transpose(0, 2, 1)
    parts = product.reshape(-1, 2, 8, 4, 2)  # [warp, half of the rows, g, q, column]
    added = [parts[:, i // 2, :, :, i % 2].reshape(-1) for i in range(4)]
    if kind == "s8":
        return [
            (words.view(np.int32) + sums).astype(np.int32).view(np.uint32) for words, sums in zip(c, added, strict=True)
        ]
    return [_words(_floats(words) + sums) for words, sums in zip(c, added, strict=True)]


def _multiply_add_halves(a: Words, b: Words, c: Words) -> Words:
    exact = torch.from_numpy(_unpack(a, "f16") * _unpack(b, "f16") + _unpack(c, "f16"))
    return exact.half().view(torch.int32).numpy().view(np.uint32).reshape(-1)


def _add_bytes(a: Words, b: Words, c: Words) -> Words:
    return ((_unpack(a, "s8") * _unpack(b, "s8")).sum(1) + c.view(np.int32)).astype(np.int32).view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "sub.u32": lambda a, b: a - b,
    "add.s32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "dp4a.s32.s32": _add_bytes,
    "setp.ne.u32": lambda a, b: a != b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _permute,
    "lop3.b32": _look_up_bits,
    "fma.rn.f16x2": _multiply_add_halves,
    "add.f32": lambda a, b: _words(_floats(a) + _floats(b)),
    "max.NaN.f32": lambda a, b: _words(np.maximum(_floats(a), _floats(b))),
    "cvt.rn.bf16x2.f32": lambda high, low: _pack(high, low, torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda high, low: _pack(high, low, torch.float16),
}


def as_tensor(data: np.ndarray, kind: Any) -> Any:
    """One value a thread, in the interpreter's terms."""
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, [len(data)]))


class Emulator:
    """In place of `tl.inline_asm_elementwise`. Shared memory is that of one program at a time, which writes before it
    reads."""

    def __init__(self) -> None:
        self.shared, self.places = np.zeros(1 << 15, np.uint32), dict[str, int]()

    def __call__(self, asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any, **_: Any) -> Any:
        plain = [getattr(x, "value", x) for x in (asm, *args)]
        kinds = list(dtype) if isinstance(dtype, (tuple, tl.tuple)) else [dtype]
        values = [np.asarray(x.handle.data if isinstance(x, tl.tensor) else x).reshape(-1) for x in plain[1:]]
        self.count = max(map(len, values))
        self.registers: dict[str, np.ndarray] = {}
        for i, value in enumerate(values):
            wide = np.broadcast_to(value, (self.count,)).copy()
            if wide.dtype != np.float32 and wide.dtype.itemsize != 4 and not isinstance(plain[1 + i], tl.tensor):
                wide = wide.astype(np.int32)
            self.registers[f"${len(kinds) + i}"] = wide.view(np.uint32) if wide.dtype.itemsize == 4 else wide
        code = re.sub("//.*", "", plain[0]).strip()
        for line in re.sub(r"^\{ (.*)\}$", r"\1", code).split(";"):
            self._step(line.strip())
        outs = [self._output(f"${i}", getattr(kind, "value", kind)) for i, kind in enumerate(kinds)]
        return tuple(outs) if isinstance(dtype, (tuple, tl.tuple)) else outs[0]

    def _output(self, name: str, kind: Any) -> Any:
        return as_tensor(self.registers[name].view(np.float32 if kind == tl.float32 else np.int32).copy(), kind)

    def _get(self, name: str) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        return np.full(self.count, int(name, 0) & 0xFFFFFFFF, np.uint32)

    def _address(self, name: str) -> np.ndarray:
        base, _, offset = name.strip("[]").partition("+")
        return self._get(base).astype(np.int64) + int(offset or 0)

    def _step(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}]+", rest) if part.strip()]
        lists = [re.findall(r"[^\s,{}]+", part) for part in operands]
        if name in ("", ".reg", "bar.sync", "griddepcontrol.wait"):
            return
        if name == ".shared":
            label, size = re.search(r"(\w+)\[(\d+)\]", rest).groups()  # type: ignore[union-attr]
            place = self.places.setdefault(label, 4 * len(self.places) * 1024)
            assert place + int(size) <= self.shared.nbytes
            self.registers[label] = np.full(self.count, place, np.uint32)
        elif name.startswith("mma.sync"):
            kind = next(k for k in ("s8", "bf16", "f16") if f".{k}.{k}." in name)
            self._set(lists[0], _multiply(kind, *([self._get(x) for x in part] for part in lists[1:])))
        elif name.startswith("ld.global"):
            read = [ctypes.string_at(int(at), 4 * len(lists[0])) for at in self._address(operands[1])]
            self._set(lists[0], np.stack([np.frombuffer(part, np.uint32) for part in read], 1))
        elif name == "@p":
            self._store_global(*re.findall(r"\[[^\]]*\]|\{[^}]*\}", rest))
        elif name.startswith("stmatrix"):
            self._store_transposed(self._address(operands[0]), lists[1])
        elif name.startswith("ld.shared"):
            first = self._address(operands[1]) // 4
            self._set(lists[0], [self.shared[first + i] for i in range(len(lists[0]))])
        elif name.startswith("st.shared"):
            self.shared[self._address(operands[0]) // 4] = self._get(operands[1])
        elif name.startswith("shfl.sync.bfly"):
            other = np.arange(self.count) ^ self._get(operands[2]).astype(np.int64)
            self._set(lists[0], [self._get(operands[1])[other]])
        else:
            self._set(lists[0], [INSTRUCTIONS[name](*map(self._get, operands[1:]))])

    def _store_global(self, address: str, names: str) -> None:
        words = np.stack([self._get(name) for name in re.findall(r"[^\s,{}]+", names)], 1)
        for thread in np.flatnonzero(self.registers["p"]):
            ctypes.memmove(int(self._address(address)[thread]), words[thread].tobytes(), words[thread].nbytes)

    def _store_transposed(self, address: np.ndarray, names: list[str]) -> None:
        """stmatrix.x4.trans: lane 8 m + r has the address of row r of matrix m, lane 4 c + r // 2 its elements in
        column c."""
        memory = self.shared.view(np.uint16)
        for matrix, name in enumerate(names):
            values = self._get(name).view(np.uint16).reshape(-1, 8, 8)  # [warp, c, r]
            rows = address.reshape(-1, 4, 8)[:, matrix] // 2
            memory[rows[:, :, None] + np.arange(8)] = values.transpose(0, 2, 1)

    def _set(self, names: list[str], values: Any) -> None:
        self.registers.update(zip(names, values, strict=True))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx.tl, "inline_asm_elementwise", Emulator())
    for module in (
        int8_wgmma,
        quantize_activation,
        quantize_chunks,
        quantize_grouped,
        requantize_tiles,
        rotate_activation,
        tiled_experts,
    ):
        for name in ("gdc_wait", "gdc_launch_dependents"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda: None)


@pytest.fixture
def stack(random_weight) -> Callable[..., tuple[tiled_experts.Tiled, tuple]]:
    """A projection of experts in tile layout and as it is stored."""

    def make(rows: int, columns: int, bits: int) -> tuple[tiled_experts.Tiled, tuple]:
        packed, norms, scales, centroids = random_weight(E * rows, columns, bits)
        norms /= 8
        tiled = tiled_experts.Tiled(*tile_weight(packed, norms, bits), scales, level_table(centroids), centroids)
        return tiled, (packed.unflatten(0, (E, rows)), norms.unflatten(0, (E, rows)), scales, centroids)

    return make


@pytest.mark.parametrize(
    ("form", "tokens", "bits", "exact"),
    [
        ("whole bands", 2, 5, False),
        ("whole bands", 2, 4, True),
        ("half bands", 2, 4, False),
        ("half bands", 2, 5, True),
        ("groups of 8", 4, 5, False),
        ("groups of 16", 5, 4, False),
        ("groups of 16", 5, 5, True),
        ("groups of 32", 21, 5, False),
    ],
)
def test_experts(stack, relative_error, monkeypatch, form: str, tokens: int, bits: int, exact: bool) -> None:
    """With one token that chooses an expert that does not exist."""
    gate_up, down = stack(2 * MIDDLE, H, bits), stack(H, MIDDLE, bits)
    shape = expert_pairs.Shape(4, 2 if form == "half bands" else 1)
    monkeypatch.setattr(expert_pairs, "_choose_shape", lambda bands: shape)
    monkeypatch.setattr(tiled_experts, "_FEW_PAIRS", 0 if form.startswith("groups") else 128)
    top_k = 5 if form == "whole bands" else K  # more than the warps of a program
    weights, index = torch.rand(tokens, top_k), torch.randint(E, (tokens, top_k))
    x = torch.randn(tokens, H).half()
    exactly = reference.experts(x.double(), index, weights, *gate_up[1], *down[1])
    index[1, 1] = E
    out = tiled_experts.tiled_experts(x, index, weights, gate_up[0], down[0], E, MIDDLE, exact)
    others = torch.arange(tokens) != 1
    assert relative_error(out[others], exactly[others]) < (2e-3 if exact else 0.03)
    assert out[1].isnan().all()


class Bands:
    """In place of `multiply_bands`, whose instructions are out of reach here: from the chunks of x that it reads, and
    the weight [rows, K] that was told, the sums it would have."""

    def __init__(self, tiles: torch.Tensor, tile_norms: torch.Tensor, centroids: torch.Tensor, columns: int) -> None:
        rows = len(tiles) // -(-columns // 128) * 32
        packed, norms = untile_weight(tiles, tile_norms, rows, 5)
        positive = half_integer_levels(centroids[16:])[0]
        levels = torch.cat([-1 - positive.flip(0), positive])[unpack_codes(packed, 5).long()]
        self.levels, self.norms = levels.double().numpy(), norms.float().numpy()

    def __call__(self, tiles, norms, table, x, first_chunk, first, count, thread, width, rows, products, *_: Any):
        start, number, blocks = (int(v.handle.data.reshape(-1)[0]) for v in (x, first_chunk, count))
        rows, products = (getattr(v, "value", v) for v in (rows, products))
        tile, lane = first.handle.data, thread.handle.data
        block_of_row = self.norms.shape[1]
        row, q = tile // block_of_row * 32 + lane // 32 % 2 * 16 + lane % 32 // 4, lane % 4
        sums = np.zeros((2, len(row), rows * products), np.float32)
        size = 4 * chunk_words(rows)
        for step in range(blocks * products):
            chunk = np.frombuffer(ctypes.string_at(start + (number + step) * size, size), np.uint32)
            x_rows = _unswizzle(chunk[: rows * 32].reshape(rows, 8, 4))
            scales = chunk[rows * 32 : rows * 33].view(np.float32)
            block = tile % block_of_row + step // products
            columns = block[:, None] * 128 + np.arange(128)
            part = slice(step % products * rows, (step % products + 1) * rows)
            for half in range(2):
                own = self.levels[row[:, None] + 8 * half, columns]
                sums[half, :, part] += own @ x_rows.T * scales * self.norms[row + 8 * half, block, None]
        places = range(rows * products // 8)
        picked = [sums[half, np.arange(len(row)), 8 * i + 2 * q + e] for i in places for half in (0, 1) for e in (0, 1)]
        tensors = tuple(as_tensor(part, tl.float32) for part in picked)
        return tensors, as_tensor(q, tl.int32), as_tensor(np.zeros_like(q), tl.int32)


def multiply_groups(w: Any, w_scales: Any, x: Any, row: Any, _: Any, groups: Any, line: Any, thread: Any) -> Any:
    """In place of the function of this name: from the chunks of both operands the sums it would have."""
    start_w, start_scales, start_x, count, columns = (
        int(v.handle.data.reshape(-1)[0]) for v in (w, w_scales, x, groups, line)
    )
    program, part = (int(tl.program_id(axis).handle.data.reshape(-1)[0]) for axis in (0, 1))
    own, q = row.handle.data % 128, thread.handle.data % 4
    stored = _read_words(start_scales, 0, count * columns).view(np.float32).reshape(count, columns)
    norms = np.pad(stored, ((0, 0), (0, 128 * (part + 1))))[:, 128 * part : 128 * (part + 1)]
    sums = np.zeros((128, 256), np.float32)
    for group in range(count):
        for product in range(2):
            integers = np.zeros((128, 128))
            for block in range(4 * group, 4 * group + 4):
                chunk = _read_words(start_x, (program * 4 * count + block) * 2 + product, chunk_words(128))
                weight = _read_words(start_w, part * 4 * count + block, requantize_tiles.CHUNK_WORDS)
                rows = [_unswizzle(words.reshape(128, 8, 4)) for words in (weight, chunk[: 128 * 32])]
                integers += rows[0] @ rows[1].T
            scales = chunk[128 * 32 : 128 * 33].view(np.float32)
            sums[:, 128 * product : 128 * (product + 1)] += integers * norms[group][:, None] * scales
    picked = [sums[own + 8 * half, 8 * i + 2 * q + e] for i in range(32) for half in (0, 1) for e in (0, 1)]
    return tuple(as_tensor(part, tl.float32) for part in picked), as_tensor(np.zeros_like(q), tl.int32)


def _read_words(start: int, number: int, words: int) -> Words:
    """Piece `number` of so many words each."""
    return np.frombuffer(ctypes.string_at(start + 4 * number * words, 4 * words), np.uint32)


def _unswizzle(words: np.ndarray) -> np.ndarray:
    """The rows by 128 columns of x in a chunk, whose 16 bytes (s, r) of a row lie at (s, r) ^ row % 8."""
    units = words.view(np.int8).reshape(-1, 8, 4, 4)
    in_order = np.stack([row[np.arange(8) ^ i % 8] for i, row in enumerate(units)])
    return in_order.reshape(-1, 4, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 128).astype(np.float64)


@pytest.mark.parametrize(("x_rows", "rows"), [(9, 72), (3, 300)])
def test_product_of_most_rows(random_weight, relative_error, monkeypatch, x_rows: int, rows: int) -> None:
    """But for what `multiply_groups` does: both operands' chunks, parts of the weight, where results are stored."""
    columns = 512
    packed, norms, scales, centroids = random_weight(rows, columns, 5)
    monkeypatch.setattr(int8_dense, "multiply_groups", multiply_groups)
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows)
    x[1, 3] = torch.nan
    own = (*tile_weight(packed, norms, 5), scales, level_table(centroids), bias, rows)
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    sound = torch.arange(len(x)) != 1
    for scratch_bytes in (1 << 20, 128 * columns):
        y = int8_dense.int8_dense_linear(x, *own, scratch_bytes=scratch_bytes)
        assert y[1].isnan().all()
        assert relative_error(y[sound], exact[sound]) < 0.02


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_requantized_weight(random_weight, relative_error, bits: int) -> None:
    """Integers times scales are the weight in the rotated domain, rounded: a step is about 1 / 40 of its deviation."""
    rows, columns = 150, 1024
    packed, norms, _, centroids = random_weight(rows, columns, bits)
    norms[3, :4] = 0
    tiles, tile_norms = tile_weight(packed, norms, bits)
    table = level_table(centroids)
    chunks, own = (torch.full((2, 8, requantize_tiles.CHUNK_WORDS), -1, dtype=torch.int32) for _ in range(2))
    scales = requantize_tiles.requantize_tiles(tiles, tile_norms, table, 8, chunks)
    x, awq_scales = torch.randn(3, columns).bfloat16(), torch.rand(columns).add(0.5).half()
    words, own_scales = requantize_tiles.quantize_both(x, awq_scales, tiles, tile_norms, table, own, 2)
    alone, _ = quantize_chunks.quantize_chunks(x, awq_scales, table, 128, 2)
    assert torch.equal(own[0], chunks[0])
    assert torch.equal(own_scales, scales)
    for first in (0, 128 * 32, 128 * 33):  # the three rows of x, their scales, and one over those
        written = slice(first, first + (3 * 32 if first == 0 else 3))
        assert torch.equal(words[0, :, 0, written], alone[0, :, 0, written])
    integers = np.stack([_unswizzle(chunk.numpy().reshape(128, 8, 4)) for chunk in chunks.flatten(0, 1)])
    levels = torch.from_numpy(integers).view(2, 8, 128, 128).transpose(1, 2).reshape(256, 8, 128)[:rows]
    delta = table[LEVEL_STEP].view(torch.float32)
    found = levels * (scales * delta).T[:rows].repeat_interleave(4, 1)[..., None]
    exact = centroids[unpack_codes(packed, bits).long()].double().view(rows, 8, 128) * norms[..., None].double()
    assert torch.equal(found[3, :4], torch.zeros(4, 128).double())
    assert relative_error(found, exact) < 0.01
    assert 100 <= levels.abs().max() <= 127


@pytest.mark.parametrize(
    ("form", "x_rows", "rows", "columns", "split_blocks"),
    [
        (FORMS[0], 67, 70, 128, 8),  # two programs of rows
        (FORMS[1], 9, 72, 1160, 16),
        (FORMS[2], 9, 136, 1160, 4),  # two programs of columns, and two that share K
        (FORMS[3], 9, 72, 256, 8),
    ],
)
def test_product_of_many_rows(
    random_weight, relative_error, monkeypatch, form: Form, x_rows: int, rows: int, columns: int, split_blocks: int
) -> None:
    """But for what `multiply_bands` does: the chunks, the halves, and how results are stored."""
    packed, norms, scales, centroids = random_weight(rows, columns, 5)
    tiles, tile_norms = tile_weight(packed, norms, 5)
    monkeypatch.setattr(int8_wgmma, "multiply_bands", Bands(tiles, tile_norms, centroids, columns))
    monkeypatch.setattr(int8_wgmma, "_multiprocessors", lambda device: 132)
    x, bias = torch.randn(x_rows, columns).half(), torch.randn(rows)
    x[1, 3] = torch.nan
    own = (tiles, tile_norms, scales, level_table(centroids), bias, rows)
    y = int8_wgmma.int8_wgmma_linear(x, *own, (form, split_blocks))
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    sound = torch.arange(len(x)) != 1
    assert y[1].isnan().all()
    assert relative_error(y[sound], exact[sound]) < 0.02


def test_groups_of_64(stack, relative_error, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 64 pairs for one of the experts, and one that does not exist for a pair."""
    gate_up, down = stack(2 * MIDDLE, H, 5), stack(H, MIDDLE, 5)
    weights, index = torch.rand(70, 1), (torch.arange(70)[:, None] == 7).long()
    x = torch.randn(70, H).half()
    exactly = reference.experts(x.double(), index, weights, *gate_up[1], *down[1])
    index[1] = -1

    def told(words: Any, halves: Any, grouped: Any, out: torch.Tensor, tiles: torch.Tensor, *others: Any) -> Any:
        own = gate_up[0] if tiles is gate_up[0].tiles else down[0]
        columns = H if own is gate_up[0] else MIDDLE
        bands = Bands(own.tiles, own.tile_norms, own.centroids, columns)
        monkeypatch.setattr(expert_wgmma, "multiply_bands", bands)
        return product(words, halves, grouped, out, tiles, *others)

    product = expert_wgmma.expert_wgmma
    monkeypatch.setattr(expert_wgmma, "expert_wgmma", told)
    monkeypatch.setattr(tiled_experts, "_FEW_PAIRS", 0)
    monkeypatch.setattr(tiled_experts, "has_wgmma", lambda device: True)
    out = tiled_experts.tiled_experts(x, index, weights, gate_up[0], down[0], E, MIDDLE, False)
    others = torch.arange(70) != 1
    assert relative_error(out[others], exactly[others]) < 0.03
    assert out[1].isnan().all()


@pytest.mark.parametrize("linear", [int8_linear, exact_linear])
@pytest.mark.parametrize("bits", [4, 5])
def test_product_of_few_rows(random_weight, relative_error, linear: Callable, bits: int) -> None:
    packed, norms, scales, centroids = random_weight(40, 200, bits)
    x, bias = torch.randn(9, 200).half(), torch.randn(40)
    y = linear(x, *tile_weight(packed, norms, bits), scales, level_table(centroids), bias, 40)
    exact = reference.linear(x.double(), packed, norms, scales, centroids, bias)
    assert relative_error(y, exact) < (1e-3 if linear is exact_linear else 0.02)
