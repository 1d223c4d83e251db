"""Every kernel of the tile layout once under compute-sanitizer, which sees each access outside what was allocated."""

import os
import shutil
import subprocess
import sys

import pytest

CALLS = """
import torch
from polar_kernels import PolarExpertProjection, PolarExperts, PolarLinear
from polar_kernels.kernels import exact_matmul, int8_dense, int8_matmul, tiled_experts
from polar_kernels.kernels.band_programs import Program
from polar_kernels.kernels.exact_wgmma import exact_wgmma_linear
from polar_kernels.kernels.int8_wgmma import int8_wgmma_linear
from polar_kernels.kernels.gpu import has_wgmma
from polar_kernels.kernels.wgmma_forms import EXACT_FORMS, FORMS
torch.manual_seed(0)
for bits in (4, 5):
    layer = PolarLinear.from_linear(torch.nn.Linear(392, 70, device="cuda"), bits, awq_scales=torch.ones(392))
    assert layer.tiles is not None
    for halves in (1, 2):
        int8_matmul.choose_program = exact_matmul.choose_program = lambda *_, **mode: Program(8, 128, halves)
        for activation in ("int8", "exact"):
            layer.activation = activation
            for rows in (1, 9, 40):
                layer(torch.randn(rows, 392, device="cuda").half())
    layer.dequantize()
    if torch.cuda.get_device_capability() == (9, 0):
        for rows, columns in ((70, 1160), (72, 1280)):
            linear = torch.nn.Linear(columns, rows, device="cuda")
            layer = PolarLinear.from_linear(linear, bits, awq_scales=torch.ones(columns))
            parts = (layer.tiles, layer.tile_norms, layer.awq_scales, layer.level_table, layer.bias)
            for form in FORMS:
                for split_blocks in (8, 16):
                    x = torch.randn(70, columns, device="cuda").half()
                    int8_wgmma_linear(x, *parts, rows, (form, split_blocks))
            for form in EXACT_FORMS:
                for split_blocks in (8, 16):
                    x = torch.randn(70, columns, device="cuda").half()
                    exact_wgmma_linear(x, *parts, rows, (form, split_blocks))
        for rows, columns in ((70, 1536), (264, 512)):  # in parts of 128 rows of the weight
            linear = torch.nn.Linear(columns, rows, device="cuda")
            layer = PolarLinear.from_linear(linear, bits, awq_scales=torch.ones(columns))
            parts = (layer.tiles, layer.tile_norms, layer.awq_scales, layer.level_table, layer.bias)
            x = torch.randn(300, columns, device="cuda").half()
            int8_dense._SCRATCH_BYTES = 128 * columns
            int8_dense.int8_dense_linear(x, *parts, rows)
    stacks = torch.randn(3, 96, 160, device="cuda"), torch.randn(3, 160, 48, device="cuda")
    layer = PolarExperts(*(PolarExpertProjection.from_dense(stack, bits) for stack in stacks))
    assert layer.down_proj.tiles is not None
    for activation in ("int8", "exact"):
        layer.activation = activation
        for tokens in (1, 5, 20, 70, 90):  # one of each form
            tiled_experts._FEW_PAIRS = 4
            tiled_experts.has_wgmma = (lambda device: False) if tokens == 90 else has_wgmma
            weights, index = torch.rand(tokens, 3, device="cuda").topk(2)
            layer(torch.randn(tokens, 160, device="cuda").half(), index, weights)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_no_access_outside_what_was_allocated() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", CALLS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
