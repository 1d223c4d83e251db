"""One token of GatedDeltaNet in two kernels: the short convolution beside the gates, the delta rule with its norm.

Roundings are those of transformers' torch functions, which write each of these results in the model's dtype.
"""

import torch
import triton
import triton.language as tl

_CHANNELS = 256  # of a program of the convolution
_DOT = 512  # columns of a gate's dot product at a time


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _convolve(x_ptr, state_ptr, weight_ptr, out_ptr, row, x_row, first, channels, taps, CHANNELS: tl.constexpr):
    """CHANNELS channels of a row: the state, its last `taps` tokens, moves on by x, is weighed, goes through SiLU."""
    channel = first + tl.arange(0, CHANNELS)
    inside = channel < channels
    at = row * channels + channel
    dtype = out_ptr.dtype.element_ty
    y = tl.zeros((CHANNELS,), tl.float32)
    for tap in range(taps):
        if tap + 1 < taps:
            token = tl.load(state_ptr + at * taps + tap + 1, mask=inside, other=0.0)
        else:
            token = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0).to(state_ptr.dtype.element_ty)
        y += token.to(tl.float32) * tl.load(weight_ptr + channel * taps + tap, mask=inside, other=0.0).to(tl.float32)
        tl.store(state_ptr + at * taps + tap, token, mask=inside)
    y = y.to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (y * _sigmoid(y)).to(dtype), mask=inside)


@triton.jit
def _dot(hidden_ptr, weight_ptr, row, head, width, DOT: tl.constexpr):
    total = tl.zeros((DOT,), tl.float32)
    for first in range(0, width, DOT):
        column = first + tl.arange(0, DOT)
        inside = column < width
        x = tl.load(hidden_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + head * width + column, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _prepare_kernel(
    hidden_ptr,
    x_ptr,
    state_ptr,
    conv_weight_ptr,
    out_ptr,
    a_weight_ptr,
    b_weight_ptr,
    a_log_ptr,
    dt_bias_ptr,
    gates_ptr,
    width,
    x_row,
    channels,
    taps,
    heads,
    CHANNELS: tl.constexpr,
    DOT: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    if part < 2 * heads:
        # The gates first, whose programs take longer.
        head = part // 2
        gate = gates_ptr + (row * heads + head) * 2
        dtype = hidden_ptr.dtype.element_ty
        if part % 2 == 0:
            a = _dot(hidden_ptr, a_weight_ptr, row, head, width, DOT).to(dtype).to(tl.float32)
            a += tl.load(dt_bias_ptr + head).to(tl.float32)
            softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
            tl.store(gate, tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * softplus))
        else:
            b = _dot(hidden_ptr, b_weight_ptr, row, head, width, DOT).to(dtype).to(tl.float32)
            tl.store(gate + 1, _sigmoid(b).to(dtype).to(tl.float32))
    else:
        first = (part - 2 * heads) * CHANNELS
        _convolve(x_ptr, state_ptr, conv_weight_ptr, out_ptr, row, x_row, first, channels, taps, CHANNELS)


@triton.jit
def _delta_kernel(
    x_ptr,
    gates_ptr,
    state_ptr,
    z_ptr,
    norm_ptr,
    out_ptr,
    z_row,
    heads,
    key_heads,
    key_dim,
    value_dim,
    epsilon,
    scale,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key_head = head // (heads // key_heads)
    i = tl.arange(0, KEY)
    j = tl.arange(0, VALUE)
    x_ptr += row * (2 * key_heads * key_dim + heads * value_dim)
    q = tl.load(x_ptr + key_head * key_dim + i, mask=i < key_dim, other=0.0).to(tl.float32)
    k = tl.load(x_ptr + (key_heads + key_head) * key_dim + i, mask=i < key_dim, other=0.0).to(tl.float32)
    v = tl.load(x_ptr + 2 * key_heads * key_dim + head * value_dim + j, mask=j < value_dim, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
    gate = gates_ptr + (row * heads + head) * 2
    states = state_ptr + (row * heads + head) * key_dim * value_dim + i[:, None] * value_dim + j[None, :]
    inside = (i[:, None] < key_dim) & (j[None, :] < value_dim)
    state = tl.load(states, mask=inside, other=0.0).to(tl.float32) * tl.load(gate)
    delta = (v - tl.sum(state * k[:, None], axis=0)) * tl.load(gate + 1)
    state += k[:, None] * delta[None, :]
    tl.store(states, state.to(state_ptr.dtype.element_ty), mask=inside)
    dtype = out_ptr.dtype.element_ty
    y = tl.sum(state * q[:, None], axis=0).to(dtype).to(tl.float32)
    y = (y * tl.rsqrt(tl.sum(y * y, axis=0) / value_dim + epsilon)).to(dtype).to(tl.float32)
    y = (y * tl.load(norm_ptr + j, mask=j < value_dim, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    at = head * value_dim + j
    z = tl.load(z_ptr + row * z_row + at, mask=j < value_dim, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * heads * value_dim + at, (y * z * _sigmoid(z)).to(dtype), mask=j < value_dim)


def delta_step(
    hidden: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    conv_weight: torch.Tensor,
    a_weight: torch.Tensor,
    b_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """One token a row, from the layer's input to what its last projection reads; both states move on in place.

    hidden [rows, width]: the layer's input; x [rows, channels]: q, k and v before the convolution; z [rows, heads *
    value_dim]: the output gate; conv_state [rows, channels, taps]; recurrent_state [rows, heads, key_dim, value_dim];
    conv_weight [channels, taps]; a_weight, b_weight [heads, width]; a_log, dt_bias [heads];
    norm_weight [value_dim]. All contiguous but
    for the rows of x and z, which may be parts of longer ones. Returns [rows, heads * value_dim] in x's dtype.
    """
    rows, width = hidden.shape
    channels, taps = conv_weight.shape
    _, heads, key_dim, value_dim = recurrent_state.shape
    convolved = x.new_empty(rows, channels)
    gates = torch.empty(rows, heads, 2, dtype=torch.float32, device=x.device)
    _prepare_kernel[(2 * heads + triton.cdiv(channels, _CHANNELS), rows)](
        hidden,
        x,
        conv_state,
        conv_weight,
        convolved,
        a_weight,
        b_weight,
        a_log,
        dt_bias,
        gates,
        width,
        x.stride(0),
        channels,
        taps,
        heads,
        CHANNELS=_CHANNELS,
        DOT=_DOT,
        num_warps=4,
    )
    out = x.new_empty(rows, heads * value_dim)
    _delta_kernel[(heads, rows)](
        convolved,
        gates,
        recurrent_state,
        z,
        norm_weight,
        out,
        z.stride(0),
        heads,
        (channels - heads * value_dim) // (2 * key_dim),
        key_dim,
        value_dim,
        epsilon,
        key_dim**-0.5,
        KEY=triton.next_power_of_2(key_dim),
        VALUE=triton.next_power_of_2(value_dim),
        num_warps=8,
    )
    return out
