"""The tile layout's kernels compiled for Hopper by the Triton that is installed, where no GPU would run them."""

import os
import subprocess
import sys

import pytest
import torch

CALLS = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from polar_kernels import lloyd_max_levels
from polar_kernels.kernels import exact_matmul, exact_wgmma, int8_matmul, int8_wgmma, tiled_experts
from polar_kernels.kernels.exact_matmul import exact_linear
from polar_kernels.kernels.exact_wgmma import exact_wgmma_linear
from polar_kernels.kernels.int8_dense import int8_dense_linear
from polar_kernels.kernels.int8_matmul import int8_linear
from polar_kernels.kernels.int8_wgmma import int8_wgmma_linear
from polar_kernels.kernels.tile_dequantize import dequantize_tiles
from polar_kernels.kernels.wgmma_forms import EXACT_FORMS, FORMS
from polar_kernels.tiles import level_table, tile_weight

compiled = []

def compile_only(kernel, *args, grid, warmup, **options):
    named = {name: options.pop(name) for name in kernel.arg_names if name in options}
    values = dict(zip(kernel.arg_names, args)) | named
    fixed = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
    types = {name: "constexpr" if name in fixed else mangle_type(values[name]) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    compiled.append(made.metadata.name if made.asm["cubin"] else None)

JITFunction.run = compile_only
for module in (exact_matmul, exact_wgmma, int8_matmul, int8_wgmma):
    module.multiprocessors = lambda device: 132
tiled_experts.has_wgmma = lambda device: True

def weight(rows):
    tiles, norms = tile_weight(torch.zeros(rows, 640, dtype=torch.uint8), torch.zeros(rows, 8).half(), 5)
    return tiles, norms, torch.ones(1024).half(), level_table(lloyd_max_levels(5))

x = torch.zeros(130, 1024).bfloat16()
five = weight(96)
for form in FORMS[1:4]:  # of each kind of shared memory one
    int8_wgmma_linear(x, *five, torch.zeros(96), 96, (form, 4))
for form in EXACT_FORMS:
    exact_wgmma_linear(x, *five, torch.zeros(96), 96, (form, 4))
int8_dense_linear(x, *five, None, 96)
for own in (five, weight(6400)):  # by halves of bands and by whole ones
    for rows in (1, 32):
        int8_linear(x[:rows], *own, None, len(own[0]) // 8 * 32)
        exact_linear(x[: min(rows, 16)], *own, None, len(own[0]) // 8 * 32)
dequantize_tiles(*five, torch.empty(96, 1024).bfloat16())
stack = tiled_experts.Tiled(*weight(2 * 1024), lloyd_max_levels(5))
both = stack._replace(tiles=stack.tiles.repeat(2, 1))
tiled_experts.tiled_experts(x, torch.zeros(130, 1).long(), torch.ones(130, 1), both, stack, 2, 1024, False)
print(*sorted(set(compiled)))
"""
KERNELS = {
    "_add_parts_kernel",
    "_exact_matmul_kernel",
    "_exact_wgmma_kernel",
    "_expert_wgmma_kernel",
    "_int8_dense_kernel",
    "_int8_matmul_kernel",
    "_int8_wgmma_kernel",
    "_quantize_both_kernel",
    "_quantize_chunks_kernel",
    "_quantize_grouped_kernel",
    "_rotate_chunks_kernel",
    "_tile_dequantize_kernel",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
def test_kernels_compile_for_hopper(tmp_path) -> None:
    """Each by the launch that a call makes, on CPU tensors."""
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, env=os.environ | own)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.split()) >= KERNELS
