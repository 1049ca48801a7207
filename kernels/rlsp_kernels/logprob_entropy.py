"""Log-probability of one chosen token per row of logits, and the entropy of the row.

Axes: T packed tokens, V vocabulary. Log-probabilities and entropies are in nats; inside the kernels exponents y are in base 2.
Order of this file: definition, device functions, kernels, launchers, ops, public function.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from rlsp_kernels.backend import LAUNCH, ROW_ALIGN, Backend, blocks, check_device, row_blocks, runs_triton, tile_shape

LN2: tl.constexpr = tl.constexpr(0.6931471824645996)
LN2_LOW: tl.constexpr = tl.constexpr(-1.904654299957768e-09)  # what the float32 above lacks
LOG2E: tl.constexpr = tl.constexpr(1.4426950216293335)
LOG2E_LOW: tl.constexpr = tl.constexpr(1.9259629911266175e-08)
ALIGN: tl.constexpr = tl.constexpr(ROW_ALIGN)
# No top is lower: -inf - -inf never comes up, and y, exact where x * c was rounded to get top, stays below 2**5.
LOWEST: tl.constexpr = tl.constexpr(-(2.0**28))

TILE_ROWS, MOST_THREADS = 4, 256  # 8,192 bf16 logits a program: 16 KB in flight, twice with the tile that is read ahead
GRAD_BLOCK, GRAD_PER_WARP = 4096, 512

# --- definition -------------------------------------------------------------------------------


def logprob_entropy_torch(
    logits_TV: Tensor,
    token_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    need_entropy: bool = True,
    first_token: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What logprob_entropy means, in plain torch: log-probability, entropy and (2, T) stats for the gradient.

    Computes in float32, or in float64 when given float64. With first_token the columns are only those of tokens from there on.
    """
    z_TV, _ = _scaled_torch(logits_TV, temperature, softcap, logit_scale)
    log_p_TV = z_TV.log_softmax(-1)
    if first_token is None:
        logprob_T = log_p_TV.gather(-1, token_T[:, None]).sum(-1)  # squeeze would return a view, which FSDP2 warns of
    else:
        token_T = token_T - first_token
        here_T = (token_T >= 0) & (token_T < log_p_TV.shape[1])
        logprob_T = log_p_TV.gather(-1, torch.where(here_T, token_T, 0)[:, None]).sum(-1)
        logprob_T = torch.where(here_T, logprob_T, -float("inf"))
    # Max z, and the sum of exp(z - max z): the largest z has probability 1 / sum.
    stats_2T = torch.stack([z_TV.detach().amax(-1), (-log_p_TV.detach().amax(-1)).exp()])
    if not need_entropy:
        return logprob_T, torch.zeros_like(logprob_T), stats_2T
    return logprob_T, -(log_p_TV.exp() * _finite(log_p_TV)).sum(-1), stats_2T


def logprob_entropy_grad_torch(
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    logits_TV: Tensor,
    token_T: Tensor,
    entropy_T: Tensor,
    stats_2T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    first_token: int = 0,
) -> Tensor:
    """The gradient of sum(dlogprob * logprob + dentropy * entropy) in the logits; zero where both are, whatever the row."""
    z_TV, slope = _scaled_torch(logits_TV, temperature, softcap, logit_scale)
    log_p_TV = (z_TV - stats_2T[0][:, None]).sub_(stats_2T[1].log()[:, None])
    if dentropy_T is None:
        grad_TV, idle_T = log_p_TV.exp_().mul_(-dlogprob_T[:, None]), dlogprob_T == 0
    else:
        coef_TV = -dlogprob_T[:, None] - dentropy_T[:, None] * (_finite(log_p_TV) + entropy_T[:, None])
        grad_TV, idle_T = log_p_TV.exp_().mul_(coef_TV), (dlogprob_T == 0) & (dentropy_T == 0)
    token_T = token_T - first_token
    here_T = (token_T >= 0) & (token_T < grad_TV.shape[1])
    grad_TV.scatter_add_(1, torch.where(here_T, token_T, 0)[:, None], torch.where(here_T, dlogprob_T, 0.0)[:, None])
    if isinstance(slope, Tensor) or slope != 1.0:
        grad_TV.mul_(slope)
    return grad_TV.masked_fill_(idle_T[:, None], 0.0).to(logits_TV.dtype)


def _finite(log_p_TV: Tensor) -> Tensor:
    """What to multiply with p, which is 0 long before -1e4: a logit of -inf contributes 0, not 0 * inf."""
    return log_p_TV.clamp(min=-1e4)


def _scaled_torch(
    logits_TV: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor | float]:
    """z, whose softmax is meant, and its slope in the logits."""
    x_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    if logit_scale != 1.0:
        x_TV = x_TV * logit_scale
    slope = logit_scale / temperature
    if softcap is not None:
        tanh_TV = torch.tanh(x_TV / softcap)
        x_TV, slope = softcap * tanh_TV, slope * (1 - tanh_TV.square())
    return x_TV if isinstance(temperature, float) and temperature == 1.0 else x_TV / temperature, slope


def merge_ranks(
    logprob_T: Tensor, entropy_T: Tensor, stats_2T: Tensor, base: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of whole rows, from those of the columns that each rank of a group has: one all-gather of 4 floats a row.

    base: log of what stats_2T are in powers of: 1 for logprob_entropy_torch, log(2) for the kernel.
    """
    mine_4T = torch.stack([logprob_T, entropy_T, *stats_2T])
    world = dist.get_world_size(group)
    parts = mine_4T.new_empty(world * len(mine_4T), mine_4T.shape[1])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    gather(parts, mine_4T, group=group)
    logprob_RT, entropy_RT, top_RT, d_RT = parts.view(world, *mine_4T.shape).unbind(1)
    top_T = top_RT.amax(0)
    d_RT = torch.where(top_RT == -float("inf"), 0.0, d_RT * ((top_RT - top_T) * base).exp())  # nothing but -inf: no share
    d_T = d_RT.sum(0)
    share_RT = d_RT / d_T
    absent_RT = share_RT == 0  # its own log-probability and entropy are NaN
    log_share_RT = share_RT.log()
    logprob_T = torch.where(absent_RT, -float("inf"), logprob_RT + log_share_RT).amax(0)  # -inf but on the token's rank
    entropy_T = torch.where(absent_RT, 0.0, share_RT * (entropy_RT - log_share_RT)).sum(0)  # the chain rule of entropy
    return logprob_T, entropy_T, torch.stack([top_T, d_T])


# --- device functions -------------------------------------------------------------------------
#
# A row of V logits starts anywhere: with an odd vocabulary most rows are not aligned to a vector load. So a row is a body,
# which starts at a multiple of ROW_ALIGN elements and is a multiple of ROW_ALIGN long, and a fringe of at most
# 2 * ROW_ALIGN - 2 elements before and after it. ALIGNED says that no row has a fringe.
#
# What is summed is 2**y with y = x * c - top, one fused multiply-add: c = scale / temperature / log(2), top the rounded
# maximum of x * c. Every thread keeps a top of its own while it reads, so that no warp waits for another before the row ends.
# Instructions, not bytes, bound a softmax over bf16 on Hopper: a block-wide maximum each step took 14 an element, this
# 9 (bench/LOG.md).


@triton.jit
def row_layout(t, stride_t, V, ALIGNED: tl.constexpr):
    """Offset of row t, offset of its body, elements before the body, elements in it."""
    start = t.to(tl.int64) * stride_t  # t * V passes 2**31 at 16k tokens of a 128k vocabulary
    if ALIGNED:
        return start, start, 0, V
    else:
        body = (start + (ALIGN - 1)) // ALIGN * ALIGN
        lead = tl.minimum(body - start, V).to(tl.int32)
        return start, body, lead, tl.multiple_of((V - lead) // ALIGN * ALIGN, ALIGN)


@triton.jit
def fringe_of(lead, size, V):
    """Columns of the elements outside the body, and which of 2 * ALIGN lanes have one."""
    lane = tl.arange(0, 2 * ALIGN)
    v = tl.where(lane < ALIGN, lane, lead + size + lane - ALIGN)
    return v, tl.where(lane < ALIGN, lane < lead, v < V)


@triton.jit
def tile_of(ROWS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Positions of a tile (ROWS, THREADS, VECTOR): a thread's elements lie along the first and last axis."""
    row, thread, element = tl.arange(0, ROWS), tl.arange(0, THREADS), tl.arange(0, VECTOR)
    return row[:, None, None] * (THREADS * VECTOR) + thread[None, :, None] * VECTOR + element[None, None, :]


@triton.jit
def scaling_of(t, temperature_ptr, temperature, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """c, what it lacks to its exact value, and the slope of the softmax's argument in the logits, less the soft-cap's."""
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + t)
    scale = logit_scale
    if HAS_SOFTCAP:
        scale = tl.full((), 1.0, tl.float32)  # the other one stands inside the soft-cap
    n = scale * LOG2E
    n_low = tl.fma(scale, LOG2E, -n) + scale * LOG2E_LOW
    c = tl.div_rn(n, temperature)
    return c, (tl.fma(-c, temperature, n) + n_low) / temperature, tl.div_rn(logit_scale, temperature)


@triton.jit
def soft_cap(x, logit_scale, softcap):
    """softcap * tanh(x * logit_scale / softcap), and 1 - tanh**2."""
    y = x * (logit_scale / softcap)
    y2 = y * y
    # Near 0 the other form cancels: a least-squares fit of tanh(y) / y on |y| <= 0.625, 5e-9 off.
    series = -0.33333279 + y2 * (0.13331381 + y2 * (-0.05373532 + y2 * (0.02062629 + y2 * -0.00569199)))
    near = y + y * (y2 * series)
    far = 1 - 2 / (1 + tl.exp2(y * (2 * LOG2E)))
    tanh = tl.where(tl.abs(y) < 0.625, near, far)
    return softcap * tanh, 1 - tanh * tanh


@triton.jit
def fold(top, d, s, x, inside, c, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, NEED_ENTROPY: tl.constexpr):
    """Takes a tile into each thread's top, d = sum 2**y and s = sum 2**y * y. What is not inside is -inf."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = tl.where(inside, soft_cap(x, logit_scale, softcap)[0], -float("inf"))
    higher = tl.maximum(top, tl.max(tl.max(x, axis=2), axis=0) * c)
    y = tl.fma(x, c, -higher[None, :, None])
    e = tl.exp2(y)
    shift = top - higher
    alpha = tl.exp2(shift)
    if NEED_ENTROPY:
        ey = e * tl.maximum(y, -200.0)  # 2**-200 is 0, and 0 * -inf would be NaN
        s = alpha * (s + shift * d) + tl.sum(tl.sum(ey, axis=2), axis=0)
    return higher, d * alpha + tl.sum(tl.sum(e, axis=2), axis=0), s


@triton.jit
def fold_threads(top, d, s):
    """The state of all threads together."""
    highest = tl.max(top)
    shift = top - highest
    alpha = tl.exp2(shift)
    return highest, tl.sum(alpha * d), tl.sum(alpha * (s + shift * d))


@triton.jit
def fold_row(
    logits_ptr, t, stride_t, V, c, logit_scale, softcap,
    ALIGNED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_ENTROPY: tl.constexpr, EVICT: tl.constexpr,
    ROWS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One read of row t: its top, d and s, and the tile that was read last."""
    start, body, lead, size = row_layout(t, stride_t, V, ALIGNED)
    TILE: tl.constexpr = ROWS * THREADS * VECTOR
    row_ptr = logits_ptr + body
    if not ALIGNED:  # read before the last barrier of this function: after it other warps may write over the row
        v, inside = fringe_of(lead, size, V)
        fringe = tl.load(logits_ptr + start + v, mask=inside, other=-float("inf"))
        zeros = tl.zeros((2 * ALIGN,), tl.float32)
        f_top, f_d, f_s = fold(
            zeros + LOWEST, zeros, zeros, fringe[None, :, None], inside[None, :, None], c, logit_scale, softcap,
            HAS_SOFTCAP, NEED_ENTROPY,
        )  # fmt: skip
        f_top, f_d, f_s = fold_threads(f_top, f_d, f_s)
    p = tile_of(ROWS, THREADS, VECTOR)
    x = tl.load(row_ptr + p, mask=p < size, other=-float("inf"), eviction_policy=EVICT)
    top = tl.full((THREADS,), LOWEST, tl.float32)
    d = tl.zeros((THREADS,), tl.float32)
    s = tl.zeros((THREADS,), tl.float32)
    for offset in range(TILE, size, TILE):
        q = offset + p
        ahead = tl.load(row_ptr + q, mask=q < size, other=-float("inf"), eviction_policy=EVICT)  # in flight during the fold
        top, d, s = fold(top, d, s, x, p < size, c, logit_scale, softcap, HAS_SOFTCAP, NEED_ENTROPY)
        x = ahead
    last = tl.maximum(size - 1, 0) // TILE * TILE
    top, d, s = fold(top, d, s, x, last + p < size, c, logit_scale, softcap, HAS_SOFTCAP, NEED_ENTROPY)
    row_top, row_d, row_s = fold_threads(top, d, s)
    if not ALIGNED:
        highest = tl.maximum(row_top, f_top)
        shift, f_shift = row_top - highest, f_top - highest
        alpha, f_alpha = tl.exp2(shift), tl.exp2(f_shift)
        row_s = alpha * (row_s + shift * row_d) + f_alpha * (f_s + f_shift * f_d)
        row_d = alpha * row_d + f_alpha * f_d
        row_top = highest
    return row_top, row_d, row_s, x


@triton.jit
def load_token(logits_ptr, t, stride_t, V, token):
    """The logit of a token, and whether it stands in [0, V); -inf where not."""
    here = (token >= 0) & (token < V)
    return tl.load(logits_ptr + t.to(tl.int64) * stride_t + token, mask=here, other=-float("inf")).to(tl.float32), here


@triton.jit
def token_logprob(x, here, c, c_low, top, log_d, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """log(2) * (x * c - top) - log d, its roundings carried along: a rare token's -20 keeps half an ulp, which is 1e-6."""
    if HAS_SOFTCAP:
        x = soft_cap(x, logit_scale, softcap)[0]
    xc = x * c
    low = tl.fma(x, c, -xc)
    y = xc - top
    back = y - xc
    low += (xc - (y - back)) - (top + back)
    low += (y + low) * (c_low / c)
    q = y * LN2
    low = tl.fma(y, LN2, -q) + y * LN2_LOW + low * LN2
    r = q - log_d
    back = r - q
    low += (q - (r - back)) - (log_d + back)
    return tl.where(here & (xc >= LOWEST), r + low, tl.where(xc == xc, -float("inf"), xc))  # a NaN stays one


@triton.jit
def grad_scalars(d, slope, g, g_entropy, entropy_less_log_d):
    """a and b of grad_block."""
    unit = -tl.div_rn(slope, d)
    return unit * (g + g_entropy * entropy_less_log_d), unit * g_entropy * LN2


@triton.jit
def grad_block(
    x, p, token, has_token, top, c, a, b, g_slope, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_G_ENTROPY: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """slope * (g * (chosen - p) - g_entropy * p * (log p + entropy)) of logits at positions p, g_slope being slope * g.

    Only a block that has_token compares positions.
    """
    x = x.to(tl.float32)
    cap_slope = 1.0
    if HAS_SOFTCAP:
        x, cap_slope = soft_cap(x, logit_scale, softcap)
    y = tl.fma(x, c, -top)
    if HAS_G_ENTROPY:
        grad = tl.exp2(y) * (a + b * tl.maximum(y, -200.0))
    else:
        grad = tl.exp2(y) * a
    if has_token:
        grad = tl.where(p == token, grad + g_slope, grad)
    if HAS_SOFTCAP:
        grad = grad * cap_slope
    return grad.to(dtype)


# --- kernels ----------------------------------------------------------------------------------


# Strides of (T,) buffers change with T, and slices of a packed batch begin anywhere: neither may compile anew.
@triton.jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=["logprob_ptr", "entropy_ptr", "stats_ptr", "token_ptr", "temperature_ptr"],
)
def _logprob_entropy_kernel(
    logprob_ptr,  # (T,) f32, written
    entropy_ptr,  # (T,) f32, written
    stats_ptr,  # (2, T) f32, written: top and d
    logits_ptr,  # (T, V), stride 1 along V
    token_ptr,  # (T,) i64, counted from first_token
    temperature_ptr,  # (T,) f32, or None: temperature
    stats_stride,  # in elements
    logits_stride_t,
    V,
    first_token,
    temperature,
    logit_scale,
    softcap,
    ALIGNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    t = tl.program_id(0)
    x, here = load_token(logits_ptr, t, logits_stride_t, V, tl.load(token_ptr + t) - first_token)
    c, c_low, _ = scaling_of(t, temperature_ptr, temperature, logit_scale, HAS_SOFTCAP)
    top, d, s, _ = fold_row(
        logits_ptr, t, logits_stride_t, V, c, logit_scale, softcap,
        ALIGNED, HAS_SOFTCAP, NEED_ENTROPY, "evict_first", ROWS, THREADS, VECTOR,
    )  # fmt: skip
    log_d = tl.log(d)
    tl.store(logprob_ptr + t, token_logprob(x, here, c, c_low, top, log_d, logit_scale, softcap, HAS_SOFTCAP))
    entropy = 0.0
    if NEED_ENTROPY:
        entropy = log_d - tl.div_rn(s, d) * LN2
    tl.store(entropy_ptr + t, entropy)
    tl.store(stats_ptr + t, top)
    tl.store(stats_ptr + stats_stride + t, d)


@triton.jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=[
        "dlogprob_ptr", "dentropy_ptr", "token_ptr", "entropy_ptr", "stats_ptr", "temperature_ptr",
    ],
)  # fmt: skip
def _logprob_entropy_grad_kernel(
    dlogits_ptr,  # (T, V), written; may be logits_ptr
    dlogprob_ptr,  # (T,) f32
    dentropy_ptr,  # (T,) f32, or None
    logits_ptr,  # (T, V), stride 1 along V
    token_ptr,  # (T,) i64, counted from first_token
    entropy_ptr,  # (T,) f32
    stats_ptr,  # (2, T) f32
    temperature_ptr,  # (T,) f32, or None
    stats_stride,  # in elements
    dlogits_stride_t,
    logits_stride_t,
    V,
    num_blocks,  # a row has
    first_token,
    temperature,
    logit_scale,
    softcap,
    ALIGNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) // num_blocks  # a 1-D grid: the second axis of a grid ends at 65,535
    k = tl.program_id(0) % num_blocks
    start, body, lead, size = row_layout(t, logits_stride_t, V, ALIGNED)
    d_start = t.to(tl.int64) * dlogits_stride_t
    p = k * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(dlogprob_ptr + t)
    g_entropy = 0.0
    if dentropy_ptr is not None:
        g_entropy = tl.load(dentropy_ptr + t)
    # Where rows are not aligned, dlogits has rows that begin as far from a vector load's border as those of logits.
    d_row_ptr = dlogits_ptr + (d_start if ALIGNED else (d_start + (ALIGN - 1)) // ALIGN * ALIGN)
    if (g == 0) & (g_entropy == 0):  # not read: it may hold NaN
        zeros = tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty)
        tl.store(d_row_ptr + p, zeros, mask=p < size)
        if not ALIGNED:
            if k == 0:
                v, inside = fringe_of(lead, size, V)
                fringe_zeros = tl.zeros((2 * ALIGN,), dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + d_start + v, fringe_zeros, mask=inside)
    else:
        c, _, slope = scaling_of(t, temperature_ptr, temperature, logit_scale, HAS_SOFTCAP)
        top = tl.load(stats_ptr + t)
        d = tl.load(stats_ptr + stats_stride + t)
        a, b = grad_scalars(d, slope, g, g_entropy, tl.load(entropy_ptr + t) - tl.log(d))
        token = (tl.load(token_ptr + t) - first_token).to(tl.int32)
        here = token - lead
        has_token = (here >= k * BLOCK) & (here < k * BLOCK + BLOCK)
        x = tl.load(logits_ptr + body + p, mask=p < size, other=0.0, eviction_policy="evict_first")
        grad = grad_block(
            x, p, here, has_token, top, c, a, b, slope * g, logit_scale, softcap,
            HAS_SOFTCAP, dentropy_ptr is not None, dlogits_ptr.dtype.element_ty,
        )  # fmt: skip
        tl.store(d_row_ptr + p, grad, mask=p < size)
        if not ALIGNED:
            if k == 0:
                v, inside = fringe_of(lead, size, V)
                x_fringe = tl.load(logits_ptr + start + v, mask=inside, other=0.0)
                grad_fringe = grad_block(
                    x_fringe, v, token, True, top, c, a, b, slope * g, logit_scale, softcap,
                    HAS_SOFTCAP, dentropy_ptr is not None, dlogits_ptr.dtype.element_ty,
                )  # fmt: skip
                tl.store(dlogits_ptr + d_start + v, grad_fringe, mask=inside)


# --- launchers --------------------------------------------------------------------------------


def is_aligned(logits_TV: Tensor) -> bool:
    """No row needs a fringe: all begin and end at multiples of ROW_ALIGN elements."""
    return logits_TV.stride(0) % ROW_ALIGN == 0 and logits_TV.shape[1] % ROW_ALIGN == 0


def empty_grad(logits_TV: Tensor) -> Tensor:
    """(T, V) for the gradient, its rows as far from a vector load's border as those of logits_TV."""
    T, V = logits_TV.shape
    stride_t = V + (logits_TV.stride(0) - V) % ROW_ALIGN
    return logits_TV.new_empty(T * stride_t).as_strided((T, V), (stride_t, 1))


def logprob_entropy_launch(
    logits_TV: Tensor,
    token_T: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    need_entropy: bool,
    first_token: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_T, entropy_T and stats_2T. A token outside [first_token, first_token + V) has log-probability -inf."""
    T, V = logits_TV.shape
    logprob_T, entropy_T = (torch.empty(T, dtype=torch.float32, device=logits_TV.device) for _ in range(2))
    stats_2T = torch.empty(2, T, dtype=torch.float32, device=logits_TV.device)
    per_token = isinstance(temperature, Tensor)
    rows, threads, vector = tile_shape(V, logits_TV.dtype, TILE_ROWS, MOST_THREADS)
    _logprob_entropy_kernel[(T,)](
        logprob_T, entropy_T, stats_2T, logits_TV, token_T, temperature if per_token else None,
        stats_2T.stride(0), logits_TV.stride(0), V, first_token,
        1.0 if per_token else temperature, logit_scale, softcap or 1.0,
        ALIGNED=is_aligned(logits_TV), HAS_SOFTCAP=softcap is not None, NEED_ENTROPY=need_entropy,
        ROWS=rows, THREADS=threads, VECTOR=vector, num_warps=threads // 32, **LAUNCH,
    )  # fmt: skip
    return logprob_T, entropy_T, stats_2T


def logprob_entropy_grad_launch(
    dlogits_TV: Tensor,
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    logits_TV: Tensor,
    token_T: Tensor,
    entropy_T: Tensor,
    stats_2T: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    first_token: int = 0,
) -> None:
    """Writes dlogits_TV, which may be logits_TV itself."""
    T, V = logits_TV.shape
    assert (dlogits_TV.stride(0) - logits_TV.stride(0)) % ROW_ALIGN == 0 or is_aligned(dlogits_TV), "rows end differently"
    per_token = isinstance(temperature, Tensor)
    block, num_warps = blocks(V, most=GRAD_BLOCK, per_warp=GRAD_PER_WARP)
    num_blocks = triton.cdiv(V, block)
    _logprob_entropy_grad_kernel[(T * num_blocks,)](
        dlogits_TV, dlogprob_T, dentropy_T, logits_TV, token_T, entropy_T, stats_2T,
        temperature if per_token else None, stats_2T.stride(0), dlogits_TV.stride(0), logits_TV.stride(0), V,
        num_blocks, first_token, 1.0 if per_token else temperature, logit_scale, softcap or 1.0,
        ALIGNED=is_aligned(logits_TV) and is_aligned(dlogits_TV), HAS_SOFTCAP=softcap is not None, BLOCK=block,
        num_warps=num_warps, **LAUNCH,
    )  # fmt: skip


def logprob_entropy_blocks(
    logits_TV: Tensor, token_T: Tensor, temperature: float | Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_entropy_torch, not differentiable, a few rows at a time on a CPU."""
    parts = [
        logprob_entropy_torch(logits_TV[rows], token_T[rows], temperature=_of_rows(temperature, rows), **options)
        for rows in row_blocks(logits_TV)
    ]
    logprob_T, entropy_T, stats_2T = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return logprob_T, entropy_T, stats_2T


def _of_rows(x: float | Tensor, rows: slice) -> float | Tensor:
    return x[rows] if isinstance(x, Tensor) else x


# --- ops --------------------------------------------------------------------------------------


@torch.library.custom_op("rlsp_kernels::logprob_entropy", mutates_args=())
def _logprob_entropy_op(
    logits_TV: Tensor,
    token_T: Tensor,
    temperature: float,
    temperature_T: Tensor | None,
    softcap: float | None,
    need_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob_T, entropy_T, and (2, T) stats that backward needs."""
    scale = temperature if temperature_T is None else temperature_T
    if runs_triton(backend, logits_TV):
        return logprob_entropy_launch(logits_TV, token_T, scale, softcap, 1.0, need_entropy)
    return logprob_entropy_blocks(logits_TV, token_T, scale, softcap=softcap, need_entropy=need_entropy)


@_logprob_entropy_op.register_fake
def _(logits_TV, token_T, temperature, temperature_T, softcap, need_entropy, inplace_backward, backend):
    T = logits_TV.shape[0]
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    logprob_T, entropy_T = (logits_TV.new_empty(T, dtype=dtype) for _ in range(2))
    return logprob_T, entropy_T, logits_TV.new_empty(2, T, dtype=dtype)


def logprob_entropy_grad(
    dlogits_TV: Tensor,
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    logits_TV: Tensor,
    token_T: Tensor,
    entropy_T: Tensor,
    stats_2T: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    triton_: bool,
    first_token: int = 0,
) -> None:
    """Writes dlogits_TV, which may be logits_TV itself."""
    if triton_:
        logprob_entropy_grad_launch(
            dlogits_TV, dlogprob_T, dentropy_T, logits_TV, token_T, entropy_T, stats_2T, temperature, softcap, logit_scale,
            first_token,
        )  # fmt: skip
        return
    for rows in row_blocks(logits_TV):
        dlogits_TV[rows] = logprob_entropy_grad_torch(
            dlogprob_T[rows], None if dentropy_T is None else dentropy_T[rows], logits_TV[rows], token_T[rows], entropy_T[rows],
            stats_2T[:, rows], temperature=_of_rows(temperature, rows), softcap=softcap, logit_scale=logit_scale,
            first_token=first_token,
        )  # fmt: skip


@torch.library.custom_op("rlsp_kernels::logprob_entropy_grad", mutates_args=())
def _logprob_entropy_grad_op(
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    logits_TV: Tensor,
    token_T: Tensor,
    entropy_T: Tensor,
    stats_2T: Tensor,
    temperature: float,
    temperature_T: Tensor | None,
    softcap: float | None,
    backend: str,
) -> Tensor:
    dlogits_TV = empty_grad(logits_TV)
    scale = temperature if temperature_T is None else temperature_T
    logprob_entropy_grad(
        dlogits_TV, dlogprob_T, dentropy_T, logits_TV, token_T, entropy_T, stats_2T, scale, softcap, 1.0,
        runs_triton(backend, logits_TV),
    )  # fmt: skip
    return dlogits_TV


@_logprob_entropy_grad_op.register_fake
def _(dlogprob_T, dentropy_T, logits_TV, *_):
    return empty_grad(logits_TV)


@torch.library.custom_op("rlsp_kernels::logprob_entropy_grad_", mutates_args=("logits_TV",))
def _logprob_entropy_grad_inplace_op(
    dlogprob_T: Tensor,
    dentropy_T: Tensor | None,
    logits_TV: Tensor,
    token_T: Tensor,
    entropy_T: Tensor,
    stats_2T: Tensor,
    temperature: float,
    temperature_T: Tensor | None,
    softcap: float | None,
    backend: str,
) -> None:
    scale = temperature if temperature_T is None else temperature_T
    logprob_entropy_grad(
        logits_TV, dlogprob_T, dentropy_T, logits_TV, token_T, entropy_T, stats_2T, scale, softcap, 1.0,
        runs_triton(backend, logits_TV),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    logits_TV, token_T, ctx.temperature, temperature_T, ctx.softcap, ctx.need_entropy, ctx.inplace, ctx.backend = inputs
    _, entropy_T, stats_2T = output
    ctx.save_for_backward(logits_TV, token_T, temperature_T, entropy_T, stats_2T)
    ctx.mark_non_differentiable(stats_2T)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprob_T, dentropy_T, _):
    logits_TV, token_T, temperature_T, entropy_T, stats_2T = ctx.saved_tensors
    dlogprob_T = torch.zeros_like(entropy_T) if dlogprob_T is None else dlogprob_T.contiguous()
    dentropy_T = dentropy_T.contiguous() if dentropy_T is not None and ctx.need_entropy else None
    args = (token_T, entropy_T, stats_2T, ctx.temperature, temperature_T, ctx.softcap, ctx.backend)
    if ctx.inplace:
        dlogits_TV = logits_TV.detach()
        _logprob_entropy_grad_inplace_op(dlogprob_T, dentropy_T, dlogits_TV, *args)
    else:
        dlogits_TV = _logprob_entropy_grad_op(dlogprob_T, dentropy_T, logits_TV, *args)
    return dlogits_TV, None, None, None, None, None, None, None


_logprob_entropy_op.register_autograd(_backward, setup_context=_setup_context)

# --- public -----------------------------------------------------------------------------------


def logprob_entropy(
    logits_TV: Tensor,
    token_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    need_entropy: bool = True,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """log softmax(z)[token] and -sum softmax(z) log softmax(z), with z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits_TV: (T, V) f32, f16, bf16 or f64, stride 1 along V; differentiable.
        token_T: (T,) i64, each in [0, V). Not checked on a GPU (no host sync): another one has log-probability -inf.
        temperature: > 0, one number or (T,) f32, one per token; what the rollout was sampled with.
        softcap: Gemma's logit cap, > 0; None is off.
        need_entropy: False skips it and returns zeros.
        inplace_backward: backward writes the gradient over logits_TV, which saves a (T, V) buffer. Whatever else needs
            their values in backward then fails with autograd's message; a second backward does too.
        backend: "auto" is Triton on a GPU and plain torch on a CPU.
    Returns:
        logprob_T, entropy_T: (T,) f32 (f64 for f64 logits), both differentiable, once.
    Raises:
        ValueError: on a wrong shape, dtype, stride or temperature.
        RuntimeError: when the backend asked for cannot run.
    Cost: forward reads logits once and keeps 12 bytes a row; backward reads and writes once. Rows whose two upstream
        gradients are zero are not read.
    Accuracy: no worse than twice torch's own error in the same dtype, against float64 (tests/test_kernels.py), while
        |logits / temperature| stays below 1e8; what lies below -1e8 counts as -inf.
    Source: online softmax, Milakov & Gimelshein, arXiv:1805.02867; entropy gradient -p * (log p + H).
    """
    check_logits(logits_TV, token_T, temperature, softcap)
    if inplace_backward:
        check_inplace("inplace_backward", logits_TV)
    per_token = isinstance(temperature, Tensor)
    logprob_T, entropy_T, _ = _logprob_entropy_op(
        logits_TV,
        token_T.contiguous(),
        1.0 if per_token else float(temperature),
        row_numbers(temperature) if per_token else None,
        softcap,
        need_entropy,
        inplace_backward,
        backend,
    )
    return logprob_T, entropy_T


def row_numbers(x_T: Tensor) -> Tensor:
    """(T,) contiguous, constant to autograd, in float32 or (for float64) as it is."""
    return x_T.detach().to(x_T.dtype if x_T.dtype == torch.float64 else torch.float32).contiguous()


def check_logits(logits_TV: Tensor, token_T: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    """The refusals that every op on logits shares."""
    if logits_TV.ndim != 2 or token_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"want logits (T, V) and token (T,), got {tuple(logits_TV.shape)} and {tuple(token_T.shape)}")
    if logits_TV.shape[1] == 0:
        raise ValueError("logits_TV has no column: want a vocabulary of at least 1")
    if not logits_TV.is_floating_point():
        raise ValueError(f"logits_TV must be floating point, got {logits_TV.dtype}")
    if logits_TV.stride(1) != 1 and logits_TV.shape[1] > 1:
        raise ValueError(f"logits_TV must have stride 1 along V, got strides {logits_TV.stride()}: call .contiguous()")
    if token_T.dtype != torch.int64:
        raise ValueError(f"token_T must be int64, got {token_T.dtype}")
    check_device("token_T", token_T, logits_TV)
    check_scaling(token_T, temperature, softcap)


def check_inplace(name: str, logits_TV: Tensor) -> None:
    """The gradient may overwrite the logits."""
    if logits_TV.shape[0] > 1 and logits_TV.stride(0) < logits_TV.shape[1]:
        raise ValueError(f"{name}=True needs rows of logits_TV that do not overlap, got strides {logits_TV.stride()}")
    if logits_TV.requires_grad and logits_TV.is_leaf:
        raise ValueError(f"{name}=True would overwrite a leaf that requires grad: pass {name}=False")


def check_scaling(token_T: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    """temperature and softcap are usable; a temperature tensor's values are not read (no host sync)."""
    if isinstance(temperature, Tensor):
        if temperature.shape != token_T.shape:
            raise ValueError(f"temperature must be a number or (T,), got {tuple(temperature.shape)}")
        check_device("temperature", temperature, token_T)
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    elif temperature < 1e-6:
        raise ValueError(f"temperature must be at least 1e-6, got {temperature}: logits over it leave float32's range")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
