"""torch.ops.polar: the scheme as operators, so that compile, export and CUDA graphs see one opaque call each.

| operator | CPU | CUDA |
|---|---|---|
| linear | reference.linear | kernels.matmul, which calls kernels.rotate |
| rotate | reference.rotate | kernels.rotate |
| dequantize | reference.dequantize | kernels.dequantize |
| dequantize_into | reference.dequantize | kernels.dequantize |
| embedding | reference.embedding | kernels.dequantize |
| experts | reference.experts | kernels.experts, which calls kernels.rotate |
| tiled_linear | reference.linear | kernels.tiled, which says which kernel for how many rows |
| tiled_dequantize, tiled_dequantize_into | reference.dequantize | kernels.tiled |
| tiled_embedding | reference.dequantize | kernels.dequantize |
| tiled_experts | reference.experts | kernels.tiled_experts: expert_pairs, expert_matmul, by pairs |

The tiled operators take a weight in the GPU's layout (`tiles.py`), the others the stored one.

`Library.define` rather than `custom_op`: half the dispatch cost per call. Operators are functional, but for those that
end in `_into`; `checks.py` looks at their arguments first.
"""

from collections.abc import Callable
from typing import Any

import torch

from polar_kernels import reference
from polar_kernels.checks import (
    check_dequantize,
    check_dequantize_into,
    check_embedding,
    check_experts,
    check_linear,
    check_rotate,
    check_tiled_dequantize,
    check_tiled_dequantize_into,
    check_tiled_embedding,
    check_tiled_experts,
    check_tiled_linear,
)
from polar_kernels.codebook import bits_of
from polar_kernels.errors import PolarError
from polar_kernels.hadamard import padded_size
from polar_kernels.tiles import untile_rows, untile_weight

_library = torch.library.Library("polar", "DEF")
_WEIGHT = "Tensor packed, Tensor norms, Tensor? awq_scales, Tensor centroids"
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_library.define("rotate(Tensor x, Tensor? awq_scales) -> Tensor")
_library.define(f"dequantize({_WEIGHT}, int in_features, ScalarType dtype) -> Tensor")
_library.define(f"dequantize_into({_WEIGHT}, Tensor(a!) out) -> ()")
_library.define(f"embedding(Tensor ids, {_WEIGHT}, int embedding_dim, ScalarType dtype) -> Tensor")
_library.define(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    "Tensor gate_up_packed, Tensor gate_up_norms, Tensor? gate_up_awq_scales, Tensor gate_up_centroids, "
    "Tensor down_packed, Tensor down_norms, Tensor? down_awq_scales, Tensor down_centroids) -> Tensor"
)

_TILED = "Tensor tiles, Tensor tile_norms, Tensor? awq_scales, Tensor level_table, Tensor centroids"
_library.define(f"tiled_linear(Tensor x, {_TILED}, Tensor? bias, int out_features, bool exact=False) -> Tensor")
_library.define(f"tiled_dequantize({_TILED}, int out_features, int in_features, ScalarType dtype) -> Tensor")
_library.define(f"tiled_dequantize_into({_TILED}, Tensor(a!) out) -> ()")
_library.define(
    f"tiled_embedding(Tensor ids, {_TILED}, int out_features, int embedding_dim, ScalarType dtype) -> Tensor"
)
_library.define(
    "tiled_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    "Tensor gate_up_tiles, Tensor gate_up_tile_norms, Tensor? gate_up_awq_scales, Tensor gate_up_level_table, "
    "Tensor gate_up_centroids, Tensor down_tiles, Tensor down_tile_norms, Tensor? down_awq_scales, "
    "Tensor down_level_table, Tensor down_centroids, int num_experts, int intermediate_size, bool exact=False) "
    "-> Tensor"
)


def _tiled_embedding_cpu(
    ids, tiles, tile_norms, awq_scales, level_table, centroids, out_features, embedding_dim, dtype
):
    flat = ids.reshape(-1).long()
    if not flat.numel():
        return torch.empty(*ids.shape, embedding_dim, dtype=dtype)
    if int(flat.min()) < 0 or int(flat.max()) >= out_features:
        raise IndexError(f"an id of {int(flat.min())}..{int(flat.max())} is outside the table of {out_features} rows")
    packed, norms = untile_rows(tiles, tile_norms, flat, out_features, bits_of(centroids))
    rows = reference.dequantize(packed, norms, awq_scales, centroids, embedding_dim, dtype)
    return rows.view(*ids.shape, embedding_dim)


def _tiled_embedding_cuda(
    ids, tiles, tile_norms, awq_scales, level_table, centroids, out_features, embedding_dim, dtype
):
    from polar_kernels.kernels.dequantize import dequantize_rows

    flat = ids.reshape(-1).long()
    if not flat.numel():
        return tiles.new_empty(*ids.shape, embedding_dim, dtype=dtype)
    known = (flat >= 0) & (flat < out_features)
    packed, norms = untile_rows(tiles, tile_norms, flat.clamp(0, out_features - 1), out_features, bits_of(centroids))
    rows = dequantize_rows(None, packed, norms.contiguous(), awq_scales, centroids, embedding_dim, dtype)
    return rows.masked_fill_(~known[:, None], torch.nan).view(*ids.shape, embedding_dim)


def _tiled_embedding_fake(
    ids, tiles, tile_norms, awq_scales, level_table, centroids, out_features, embedding_dim, dtype
):
    return tiles.new_empty(*ids.shape, embedding_dim, dtype=dtype)


def _tiled_linear_cpu(x, tiles, tile_norms, awq_scales, level_table, centroids, bias, out_features, exact=False):
    packed, norms = untile_weight(tiles, tile_norms, out_features, bits_of(centroids))
    return reference.linear(x, packed, norms, awq_scales, centroids, bias)


def _tiled_dequantize_cpu(tiles, tile_norms, awq_scales, level_table, centroids, out_features, in_features, dtype):
    packed, norms = untile_weight(tiles, tile_norms, out_features, bits_of(centroids))
    return reference.dequantize(packed, norms, awq_scales, centroids, in_features, dtype)


def _tiled_dequantize_into_cpu(tiles, tile_norms, awq_scales, level_table, centroids, out):
    packed, norms = untile_weight(tiles, tile_norms, out.shape[0], bits_of(centroids))
    out.copy_(reference.dequantize(packed, norms, awq_scales, centroids, out.shape[1], out.dtype))


def _tiled_linear_cuda(x, tiles, tile_norms, awq_scales, level_table, centroids, bias, out_features, exact=False):
    from polar_kernels.kernels.tiled import tiled_linear

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    offset = None if bias is None else bias.contiguous()
    out = tiled_linear(rows, tiles, tile_norms, awq_scales, level_table, centroids, offset, out_features, exact)
    return out.view(*x.shape[:-1], out_features)


def _tiled_dequantize_cuda(*args):
    from polar_kernels.kernels.tiled import tiled_dequantize

    return tiled_dequantize(*args)


def _tiled_dequantize_into_cuda(*args):
    from polar_kernels.kernels.tiled import tiled_dequantize_into

    tiled_dequantize_into(*args)


def _tiled_linear_fake(x, tiles, tile_norms, awq_scales, level_table, centroids, bias, out_features, exact=False):
    return x.new_empty(*x.shape[:-1], out_features)


def _tiled_dequantize_fake(tiles, tile_norms, awq_scales, level_table, centroids, out_features, in_features, dtype):
    return tiles.new_empty(out_features, in_features, dtype=dtype)


def _linear_cuda(x, packed, norms, awq_scales, centroids, bias):
    from polar_kernels.kernels.matmul import linear

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = linear(rows, packed, norms, awq_scales, centroids, None if bias is None else bias.contiguous())
    return out.view(*x.shape[:-1], packed.shape[0])


def _rotate_cuda(x, awq_scales):
    from polar_kernels.kernels.rotate import rotate

    scales = None if awq_scales is None else awq_scales.contiguous()
    out = rotate(x.reshape(-1, x.shape[-1]).contiguous(), scales).to(x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def _dequantize_cuda(packed, norms, awq_scales, centroids, in_features, dtype):
    from polar_kernels.kernels.dequantize import dequantize_rows

    return dequantize_rows(None, packed, norms, awq_scales, centroids, in_features, dtype)


def _dequantize_into_cpu(packed, norms, awq_scales, centroids, out):
    out.copy_(reference.dequantize(packed, norms, awq_scales, centroids, out.shape[1], out.dtype))


def _dequantize_into_cuda(packed, norms, awq_scales, centroids, out):
    from polar_kernels.kernels.dequantize import write_rows

    write_rows(None, packed, norms, awq_scales, centroids, out)


def _embedding_cuda(ids, packed, norms, awq_scales, centroids, embedding_dim, dtype):
    from polar_kernels.kernels.dequantize import dequantize_rows

    rows = dequantize_rows(ids.reshape(-1).contiguous(), packed, norms, awq_scales, centroids, embedding_dim, dtype)
    return rows.view(*ids.shape, embedding_dim)


def _experts_cuda(x, top_k_index, top_k_weights, *parts):
    from polar_kernels.kernels.experts import experts

    return experts(x.contiguous(), top_k_index, top_k_weights, *parts)


def _experts_fake(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiled_experts_cpu(x, top_k_index, top_k_weights, *others):
    *parts, num_experts, intermediate_size, _ = others if len(others) == 13 else (*others, False)
    stacks: list[Any] = []
    for part, rows in ((parts[:5], 2 * intermediate_size), (parts[5:], x.shape[1])):
        tiles, tile_norms, awq_scales, _, centroids = part
        stored = untile_weight(tiles, tile_norms, num_experts * rows, bits_of(centroids))
        stacks += [*(half.view(num_experts, rows, -1) for half in stored), awq_scales, centroids]
    return reference.experts(x, top_k_index, top_k_weights, *stacks)


def _tiled_experts_cuda(x, top_k_index, top_k_weights, *others):
    from polar_kernels.kernels.tiled_experts import Tiled, tiled_experts

    *parts, num_experts, intermediate_size, exact = others if len(others) == 13 else (*others, False)
    routed = (x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous())
    return tiled_experts(*routed, Tiled(*parts[:5]), Tiled(*parts[5:]), num_experts, intermediate_size, exact)


def _linear_fake(x, packed, norms, awq_scales, centroids, bias):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _rotate_fake(x, awq_scales):
    return x.new_empty(*x.shape[:-1], padded_size(x.shape[-1]))


def _dequantize_fake(packed, norms, awq_scales, centroids, in_features, dtype):
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


def _embedding_fake(ids, packed, norms, awq_scales, centroids, embedding_dim, dtype):
    return packed.new_empty(*ids.shape, embedding_dim, dtype=dtype)


def _nothing(*args: object) -> None:
    """The fake of an operator that only writes into what it was given."""


def _register(name: str, check: Callable, cpu: Callable, cuda: Callable, fake: Callable) -> None:
    def checked(implementation: Callable) -> Callable:
        def run(*args: Any) -> torch.Tensor | None:
            check(*args)
            return implementation(*args)

        return run

    def guarded(*args: Any) -> torch.Tensor | None:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        with torch.cuda.device(device):  # Triton launches on the current GPU, whatever its arguments live on
            return cuda(*args)

    _library.impl(name, checked(cpu), "CPU")
    _library.impl(name, checked(guarded), "CUDA")
    torch.library.register_fake(f"polar::{name}", checked(fake), lib=_library)


_register("linear", check_linear, reference.linear, _linear_cuda, _linear_fake)
_register("rotate", check_rotate, reference.rotate, _rotate_cuda, _rotate_fake)
_register("dequantize", check_dequantize, reference.dequantize, _dequantize_cuda, _dequantize_fake)
_register("dequantize_into", check_dequantize_into, _dequantize_into_cpu, _dequantize_into_cuda, _nothing)
_register("embedding", check_embedding, reference.embedding, _embedding_cuda, _embedding_fake)
_register("experts", check_experts, reference.experts, _experts_cuda, _experts_fake)
_register("tiled_linear", check_tiled_linear, _tiled_linear_cpu, _tiled_linear_cuda, _tiled_linear_fake)
_register(
    "tiled_dequantize",
    check_tiled_dequantize,
    _tiled_dequantize_cpu,
    _tiled_dequantize_cuda,
    _tiled_dequantize_fake,
)
_register(
    "tiled_dequantize_into",
    check_tiled_dequantize_into,
    _tiled_dequantize_into_cpu,
    _tiled_dequantize_into_cuda,
    _nothing,
)
_register("tiled_embedding", check_tiled_embedding, _tiled_embedding_cpu, _tiled_embedding_cuda, _tiled_embedding_fake)
_register("tiled_experts", check_tiled_experts, _tiled_experts_cpu, _tiled_experts_cuda, _experts_fake)

linear = torch.ops.polar.linear.default
rotate = torch.ops.polar.rotate.default
dequantize = torch.ops.polar.dequantize.default
dequantize_into = torch.ops.polar.dequantize_into.default
embedding = torch.ops.polar.embedding.default
experts = torch.ops.polar.experts.default
tiled_linear = torch.ops.polar.tiled_linear.default
tiled_dequantize = torch.ops.polar.tiled_dequantize.default
tiled_dequantize_into = torch.ops.polar.tiled_dequantize_into.default
tiled_embedding = torch.ops.polar.tiled_embedding.default
tiled_experts = torch.ops.polar.tiled_experts.default


def _linear_setup(ctx, inputs, output):
    x, packed, norms, awq_scales, centroids, _ = inputs
    ctx.save_for_backward(packed, norms, awq_scales, centroids)
    ctx.dtype, ctx.in_features = x.dtype, x.shape[-1]


def _linear_backward(ctx, grad):
    packed, norms, awq_scales, centroids = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(packed, norms, awq_scales, centroids, ctx.in_features, ctx.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias


torch.library.register_autograd("polar::linear", _linear_backward, setup_context=_linear_setup, lib=_library)


def _tiled_setup(ctx, inputs, output):
    x, tiles, tile_norms, awq_scales, level_table, centroids, _, out_features, _ = inputs
    ctx.save_for_backward(tiles, tile_norms, awq_scales, level_table, centroids)
    ctx.dtype, ctx.in_features, ctx.out_features = x.dtype, x.shape[-1], out_features


def _tiled_backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ tiled_dequantize(*ctx.saved_tensors, ctx.out_features, ctx.in_features, ctx.dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, grad_bias, None, None


torch.library.register_autograd("polar::tiled_linear", _tiled_backward, setup_context=_tiled_setup, lib=_library)


def _experts_setup(ctx, inputs, output):
    """Nothing to keep."""


def _experts_backward(ctx, grad):
    raise PolarError("there are no gradients through quantised experts: leave them unquantised, or detach their output")


for _name in ("experts", "tiled_experts"):
    torch.library.register_autograd(f"polar::{_name}", _experts_backward, setup_context=_experts_setup, lib=_library)
