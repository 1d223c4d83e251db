"""The assembly of the kernels carried out by numpy, for all threads of a program at once."""

import ctypes
import re
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from polar_kernels import kernels
from polar_kernels.kernels import ptx

Words = np.ndarray  # uint32, one a thread


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


def _add_unsigned_bytes(a: Words, b: Words, c: Words) -> Words:
    return (a.view(np.uint8).reshape(-1, 4) * b.view(np.uint8).reshape(-1, 4).astype(np.uint32)).sum(1, np.uint32) + c


def _add_pairs(a: Words, b: Words, c: Words) -> Words:
    """Both halves of a by the two lowest bytes of b."""
    return (
        (a & np.uint32(0xFFFF)) * (b & np.uint32(0xFF))
        + (a >> np.uint32(16)) * (b >> np.uint32(8) & np.uint32(0xFF))
        + c
    )


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
    "dp4a.u32.u32": _add_unsigned_bytes,
    "dp2a.lo.u32.u32": _add_pairs,
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
        self.shared, self.places = np.zeros(1 << 16, np.uint32), {"global_smem": 1 << 17}
        self.free = 0  # of what assembly declares

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
        if name in self.places:
            return np.full(self.count, self.places[name], np.uint32)
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
            place = self.places.setdefault(f"{label} {size}", self.free)
            self.free = max(self.free, place + -(-int(size) // 1024) * 1024)
            assert self.free <= self.places["global_smem"]
            self.registers[label] = np.full(self.count, place, np.uint32)
        elif name.startswith("mma.sync"):
            kind = next(k for k in ("s8", "bf16", "f16") if f".{k}.{k}." in name)
            self._set(lists[0], _multiply(kind, *([self._get(x) for x in part] for part in lists[1:])))
        elif name.startswith("ld.global"):
            read = [ctypes.string_at(int(at), 4 * len(lists[0])) for at in self._address(operands[1])]
            self._set(lists[0], np.stack([np.frombuffer(part, np.uint32) for part in read], 1))
        elif name == "@p":
            address, names = re.findall(r"\[[^\]]*\]|\{[^}]*\}", rest)
            self._store_global(address, names, np.flatnonzero(self.registers["p"]))
        elif name.startswith("stmatrix"):
            self._store_transposed(self._address(operands[0]), lists[1])
        elif name.startswith("ld.shared"):
            first = self._address(operands[1]) // 4
            self._set(lists[0], [self.shared[first + i] for i in range(len(lists[0]))])
        elif name.startswith("st.shared"):
            for i, word in enumerate(lists[1]):
                self.shared[self._address(operands[0]) // 4 + i] = self._get(word)
        elif name.startswith("st.global"):
            self._store_global(operands[0], operands[1], np.arange(self.count))
        elif name.startswith("shfl.sync.idx"):
            first = np.arange(self.count) // 32 * 32 + self._get(operands[2]).astype(np.int64)
            self._set(lists[0], [self._get(operands[1])[first]])
        elif name.startswith("shfl.sync.bfly"):
            other = np.arange(self.count) ^ self._get(operands[2]).astype(np.int64)
            self._set(lists[0], [self._get(operands[1])[other]])
        else:
            self._set(lists[0], [INSTRUCTIONS[name](*map(self._get, operands[1:]))])

    def _store_global(self, address: str, names: str, threads: np.ndarray) -> None:
        words = np.stack([self._get(name) for name in re.findall(r"[^\s,{}]+", names)], 1)
        for thread in threads:
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


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all kernels run in the interpreter, one after the other, as for a GPU of 132 multiprocessors."""
    monkeypatch.setattr(ptx.tl, "inline_asm_elementwise", Emulator())
    for found in iter_modules(kernels.__path__, "polar_kernels.kernels."):
        module = import_module(found.name)
        for name in ("gdc_wait", "gdc_launch_dependents"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda: None)
        if hasattr(module, "multiprocessors"):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
