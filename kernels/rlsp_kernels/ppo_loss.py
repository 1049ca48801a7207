"""The clipped PPO loss from logits: log-probability, entropy, loss, metrics and the gradient in one pass over the logits.

Axes: T packed tokens, V vocabulary. Log-probabilities are in nats.
Order of this file: metrics, definition, device functions, kernels, launchers, ops, public function.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsp_kernels.backend import LAUNCH, Backend, check_device, row_blocks, runs_triton, scale_, scaled, tile_shape
from rlsp_kernels.kl import (
    KL_KINDS,
    LOG_RATIO_BOUND,
    KLKind,
    clamp_log_ratio,
    kl_and_slope,
    kl_penalty_torch,
    kl_slope_torch,
)
from rlsp_kernels.logprob_entropy import (
    ALIGN,
    LN2,
    check_inplace,
    check_logits,
    empty_grad,
    fold_row,
    fringe_of,
    grad_block,
    grad_scalars,
    is_aligned,
    load_token,
    logprob_entropy_grad_torch,
    logprob_entropy_torch,
    row_layout,
    scaling_of,
    tile_of,
    token_logprob,
)

# What one token contributes: rows of a (7, T) buffer. The kernels write them in this order.
COLUMNS = ("loss", "pg", "log_ratio", "kl", "entropy", "ratio", "flags")

# 1,024 threads of more than 32 registers (bench/cubins.py checks it for bf16): one row an SM, so that the rows in flight (34 MB
# of bf16 logits of a 128k vocabulary on 132 SMs) fit L2.
TILE_ROWS, MOST_THREADS = 2, 1024
KEPT, CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 1, 2, 4, 8  # bits of flags; 0 is a token of weight zero


class PPOMetrics(NamedTuple):
    """What a policy update logs. 0-d f64 tensors on the inputs' device, detached; sums run over tokens of non-zero weight."""

    num_tokens: Tensor
    """Tokens of non-zero weight."""
    clip_low: Tensor
    """Number whose ratio was clipped from below (negative advantage, ratio < 1 - clip_ratio_low)."""
    clip_high: Tensor
    """Number whose ratio was clipped from above (positive advantage, ratio > 1 + clip_ratio_high)."""
    dual_clip: Tensor
    """Number bounded by the dual clip."""
    old_kl: Tensor
    """Sum of old_logprob - logprob: KL(old || current) by k1."""
    ref_kl: Tensor
    """Sum of the reference KL estimator; 0 without a reference."""
    entropy: Tensor
    """Sum of entropies, nats."""
    pg_loss: Tensor
    """Weighted sum of the clipped policy-gradient term alone."""
    ratio_min: Tensor
    """Smallest probability ratio; inf without tokens."""
    ratio_max: Tensor
    """Largest probability ratio; -inf without tokens."""

    def merge(self, other: "PPOMetrics") -> "PPOMetrics":
        """The metrics of two micro-batches together."""
        sums = [a + b for a, b in zip(self[:-2], other[:-2], strict=True)]
        low = torch.minimum(self.ratio_min, other.ratio_min)
        high = torch.maximum(self.ratio_max, other.ratio_max)
        return PPOMetrics(*sums, low, high)


# --- definition -------------------------------------------------------------------------------


class Clip(NamedTuple):
    """The numbers of the loss that are the same for every token."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"
    entropy_coef: float = 0.0


def policy_terms_torch(
    logprob_T: Tensor,
    entropy_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    clip: Clip,
) -> tuple[Tensor, Tensor, Tensor]:
    """The (7, T) columns, differentiable, and the slopes of the loss in logprob_T and entropy_T by hand."""
    keep_T = weight_T != 0

    def kept(x_T: Tensor) -> Tensor:
        return torch.where(keep_T, x_T, 0.0)  # a token of weight 0 may hold NaN, and 0 * NaN is NaN

    logprob_T, entropy_T, advantage_T = kept(logprob_T), kept(entropy_T), kept(advantage_T)
    log_ratio_T = logprob_T - kept(old_logprob_T)
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    unclipped_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip.low, 1 + clip.high)
    pg_T = torch.maximum(unclipped_T, clipped_T)
    is_clipped_T = clipped_T > unclipped_T
    is_dual_T = torch.zeros_like(keep_T)
    if clip.dual is not None:
        bound_T = -advantage_T * clip.dual
        is_dual_T = (advantage_T < 0) & (bound_T < pg_T)
        pg_T = torch.where(is_dual_T, bound_T, pg_T)
    flat_T = is_clipped_T | is_dual_T | (log_ratio_T.abs() > LOG_RATIO_BOUND)
    slope_T = torch.where(flat_T, 0.0, unclipped_T)
    if importance_weight_T is not None:
        pg_T, slope_T = pg_T * kept(importance_weight_T), slope_T * kept(importance_weight_T)
    loss_T, kl_T = pg_T, torch.zeros_like(pg_T)
    if ref_logprob_T is not None:
        ref_T = kept(ref_logprob_T)
        kl_T = kl_penalty_torch(logprob_T, ref_T, clip.kl_kind)
        loss_T = loss_T + clip.kl_coef * kl_T
        slope_T = slope_T + clip.kl_coef * kl_slope_torch(logprob_T, ref_T, clip.kl_kind)
    if clip.entropy_coef:
        loss_T = loss_T - clip.entropy_coef * entropy_T
    flags_T = KEPT * keep_T + CLIP_LOW * (is_clipped_T & (advantage_T < 0)) + CLIP_HIGH * (is_clipped_T & (advantage_T > 0))
    flags_T = flags_T + DUAL_CLIP * is_dual_T
    columns_CT = torch.stack(
        [kept(loss_T) * weight_T, kept(pg_T) * weight_T, log_ratio_T, kl_T, entropy_T, ratio_T, flags_T.to(ratio_T.dtype)]
    )
    return columns_CT, (slope_T * weight_T).detach(), torch.where(keep_T, -clip.entropy_coef * weight_T, 0.0)


def reduce_torch(columns_CT: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the metrics in the order of PPOMetrics, (10,) f64."""
    loss_T, pg_T, log_ratio_T, kl_T, entropy_T, ratio_T, flags_T = columns_CT.double()
    flags_T = flags_T.int()
    sums = [((flags_T & bit) != 0).sum() for bit in (KEPT, CLIP_LOW, CLIP_HIGH, DUAL_CLIP)]
    sums += [-log_ratio_T.sum(), kl_T.sum(), entropy_T.sum(), pg_T.sum()]
    inf = ratio_T.new_full((1,), float("inf"))
    low = torch.cat([torch.where(flags_T != 0, ratio_T, inf), inf]).amin()
    high = torch.cat([torch.where(flags_T != 0, ratio_T, -inf), -inf]).amax()
    metrics = torch.stack([x.double() for x in (*sums, low, high)])
    return loss_T.sum().to(columns_CT.dtype), metrics.detach()


def policy_loss_torch(
    logprob_T: Tensor,
    entropy_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    importance_weight_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    clip: Clip,
) -> tuple[Tensor, PPOMetrics]:
    """What ppo_loss means once log-probability and entropy are known; autograd gives its gradient."""
    columns_CT, _, _ = policy_terms_torch(
        logprob_T, entropy_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, clip
    )
    loss, metrics = reduce_torch(columns_CT)
    return loss, PPOMetrics(*metrics.unbind())


def ppo_loss_torch(
    logits_TV: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    need_entropy: bool = True,
    **loss: Tensor | Clip | None,
) -> tuple[Tensor, PPOMetrics]:
    """What ppo_loss means, in plain torch."""
    logits_TV = logits_TV.masked_fill((weight_T == 0)[:, None], 0.0)  # 0 * NaN would reach the gradient of the logits
    logprob_T, entropy_T, _ = logprob_entropy_torch(
        logits_TV, token_T, temperature=temperature, softcap=softcap, need_entropy=need_entropy
    )
    return policy_loss_torch(logprob_T, entropy_T, old_logprob_T, advantage_T, weight_T, **loss)


# --- device functions -------------------------------------------------------------------------

_KEPT: tl.constexpr = tl.constexpr(KEPT)
_CLIP_LOW: tl.constexpr = tl.constexpr(CLIP_LOW)
_CLIP_HIGH: tl.constexpr = tl.constexpr(CLIP_HIGH)
_DUAL_CLIP: tl.constexpr = tl.constexpr(DUAL_CLIP)


@triton.jit
def policy_terms(
    logprob, entropy, weight, t,
    columns_ptr, columns_stride, old_logprob_ptr, advantage_ptr, importance_weight_ptr, ref_logprob_ptr,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, HAS_DUAL: tl.constexpr, KL_KIND: tl.constexpr,
):  # fmt: skip
    """Writes the columns of token t and returns the slopes of the loss in its log-probability and entropy."""
    advantage = tl.load(advantage_ptr + t)
    log_ratio = logprob - tl.load(old_logprob_ptr + t)
    clamped = clamp_log_ratio(log_ratio)
    ratio = tl.exp(clamped)
    pg = -advantage * ratio
    slope = tl.where(clamped == log_ratio, pg, 0.0)
    above = 1 + clip_high
    below = 1 - clip_low
    clipped = -advantage * tl.where(ratio > above, above, tl.where(ratio < below, below, ratio))
    is_clipped = clipped > pg
    pg = tl.where(is_clipped, clipped, pg)
    slope = tl.where(is_clipped, 0.0, slope)
    flags = _KEPT + tl.where(is_clipped, tl.where(advantage < 0, _CLIP_LOW, _CLIP_HIGH), 0)
    if HAS_DUAL:
        bound = -advantage * dual_clip
        is_dual = (advantage < 0) & (bound < pg)
        pg = tl.where(is_dual, bound, pg)
        slope = tl.where(is_dual, 0.0, slope)
        flags += tl.where(is_dual, _DUAL_CLIP, 0)
    if importance_weight_ptr is not None:
        importance_weight = tl.load(importance_weight_ptr + t)
        pg *= importance_weight
        slope *= importance_weight
    loss = pg - entropy_coef * entropy
    kl = 0.0
    if ref_logprob_ptr is not None:
        kl, kl_slope = kl_and_slope(logprob, tl.load(ref_logprob_ptr + t), KL_KIND)
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
    tl.store(columns_ptr + t, loss * weight)
    tl.store(columns_ptr + columns_stride + t, pg * weight)
    tl.store(columns_ptr + 2 * columns_stride + t, log_ratio)
    tl.store(columns_ptr + 3 * columns_stride + t, kl)
    tl.store(columns_ptr + 4 * columns_stride + t, entropy)
    tl.store(columns_ptr + 5 * columns_stride + t, ratio)
    tl.store(columns_ptr + 6 * columns_stride + t, flags.to(tl.float32))
    return slope * weight, -entropy_coef * weight


# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def _store_zeros(
    row_ptr, body_ptr, lead, size, V,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    p = tile_of(ROWS, THREADS, VECTOR)
    zeros = tl.zeros((ROWS, THREADS, VECTOR), row_ptr.dtype.element_ty)
    for offset in range(0, size, ROWS * THREADS * VECTOR):
        tl.store(body_ptr + offset + p, zeros, mask=offset + p < size, eviction_policy="evict_first")
    if not ALIGNED:
        v, inside = fringe_of(lead, size, V)
        tl.store(row_ptr + v, tl.zeros((2 * ALIGN,), row_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=[
        "token_ptr", "old_logprob_ptr", "advantage_ptr", "weight_ptr", "importance_weight_ptr", "ref_logprob_ptr",
        "temperature_ptr", "columns_ptr",
    ]
)  # fmt: skip
def _ppo_loss_kernel(
    columns_ptr,  # (7, T) f32, written where the weight is not 0: see COLUMNS
    dlogits_ptr,  # (T, V), written; may be logits_ptr; None without gradient
    logits_ptr,  # (T, V), stride 1 along V
    token_ptr,  # (T,) i64
    old_logprob_ptr,  # (T,) f32
    advantage_ptr,  # (T,) f32
    weight_ptr,  # (T,) f32
    importance_weight_ptr,  # (T,) f32, or None
    ref_logprob_ptr,  # (T,) f32, or None
    temperature_ptr,  # (T,) f32, or None: temperature
    columns_stride,  # in elements
    dlogits_stride_t,
    logits_stride_t,
    V,
    temperature,
    logit_scale,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    ALIGNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    HAS_G_ENTROPY: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    KL_KIND: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # A row of a 128k vocabulary is 256 KB: more than an SM holds, but those of all SMs together fit the L2 cache. So the
    # first look at a row asks L2 to keep it, the second goes backwards, from what was read last, and finds it there.
    t = tl.program_id(0)
    weight = tl.load(weight_ptr + t)
    if weight == 0:  # not read: it may hold NaN
        if dlogits_ptr is not None:
            _, body, lead, size = row_layout(t, logits_stride_t, V, ALIGNED)
            d_start = t.to(tl.int64) * dlogits_stride_t
            d_body = d_start if ALIGNED else (d_start + (ALIGN - 1)) // ALIGN * ALIGN
            _store_zeros(dlogits_ptr + d_start, dlogits_ptr + d_body, lead, size, V, ALIGNED, ROWS, THREADS, VECTOR)
    else:
        token = tl.load(token_ptr + t)
        x_token, here_token = load_token(logits_ptr, t, logits_stride_t, V, token)  # before any thread writes
        c, c_low, slope = scaling_of(t, temperature_ptr, temperature, logit_scale, HAS_SOFTCAP)
        top, d, s, x = fold_row(
            logits_ptr, t, logits_stride_t, V, c, logit_scale, softcap,
            ALIGNED, HAS_SOFTCAP, NEED_ENTROPY, "evict_last", ROWS, THREADS, VECTOR,
        )  # fmt: skip
        log_d = tl.log(d)
        entropy = 0.0
        if NEED_ENTROPY:
            entropy = log_d - tl.div_rn(s, d) * LN2
        g, g_entropy = policy_terms(
            token_logprob(x_token, here_token, c, c_low, top, log_d, logit_scale, softcap, HAS_SOFTCAP), entropy, weight, t,
            columns_ptr, columns_stride, old_logprob_ptr, advantage_ptr, importance_weight_ptr, ref_logprob_ptr,
            clip_low, clip_high, dual_clip, kl_coef, entropy_coef, HAS_DUAL, KL_KIND,
        )  # fmt: skip
        if dlogits_ptr is not None:
            start, body, lead, size = row_layout(t, logits_stride_t, V, ALIGNED)
            d_start = t.to(tl.int64) * dlogits_stride_t
            d_body = d_start if ALIGNED else (d_start + (ALIGN - 1)) // ALIGN * ALIGN
            d_row_ptr = dlogits_ptr + d_body
            if (g == 0) & (g_entropy == 0):  # clipped: nothing to learn from this token
                _store_zeros(dlogits_ptr + d_start, d_row_ptr, lead, size, V, ALIGNED, ROWS, THREADS, VECTOR)
            else:
                TILE: tl.constexpr = ROWS * THREADS * VECTOR
                a, b = grad_scalars(d, slope, g, g_entropy, entropy - log_d)
                p = tile_of(ROWS, THREADS, VECTOR)
                last = tl.maximum(size - 1, 0) // TILE * TILE
                here = token.to(tl.int32) - lead - last  # where the token is, counted from the tile's begin
                grad = grad_block(
                    x, p, here, here >= 0, top, c, a, b, slope * g, logit_scale, softcap,
                    HAS_SOFTCAP, HAS_G_ENTROPY, dlogits_ptr.dtype.element_ty,
                )  # fmt: skip
                tl.store(d_row_ptr + last + p, grad, mask=last + p < size, eviction_policy="evict_first")
                for done in range(0, last, TILE):
                    offset = last - TILE - done
                    here += TILE
                    x = tl.load(logits_ptr + body + offset + p, eviction_policy="evict_first")
                    grad = grad_block(
                        x, p, here, (here >= 0) & (here < TILE), top, c, a, b, slope * g, logit_scale, softcap,
                        HAS_SOFTCAP, HAS_G_ENTROPY, dlogits_ptr.dtype.element_ty,
                    )  # fmt: skip
                    tl.store(d_row_ptr + offset + p, grad, eviction_policy="evict_first")
                if not ALIGNED:
                    v, inside = fringe_of(lead, size, V)
                    x_fringe = tl.load(logits_ptr + start + v, mask=inside, other=0.0)
                    grad_fringe = grad_block(
                        x_fringe, v, token.to(tl.int32), True, top, c, a, b, slope * g, logit_scale, softcap,
                        HAS_SOFTCAP, HAS_G_ENTROPY, dlogits_ptr.dtype.element_ty,
                    )  # fmt: skip
                    tl.store(dlogits_ptr + d_start + v, grad_fringe, mask=inside)


@triton.jit
def _reduce_kernel(
    out_ptr,  # (11,) f64, written: the metrics in the order of PPOMetrics, then the loss
    columns_ptr,  # (7, size) f32
    size,  # a multiple of 16: see empty_columns
    BLOCK: tl.constexpr,
):
    # One program, so that the order of every sum is fixed. 28 bytes a token: 0.01 % of what its row of logits takes.
    zeros = tl.zeros((BLOCK,), tl.float64)
    loss, pg, old_kl, kl, entropy = zeros, zeros, zeros, zeros, zeros
    kept, clip_low, clip_high, dual = zeros, zeros, zeros, zeros
    nan = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < size
        loss += tl.load(columns_ptr + t, mask=inside, other=0.0).to(tl.float64)
        pg += tl.load(columns_ptr + size + t, mask=inside, other=0.0).to(tl.float64)
        old_kl -= tl.load(columns_ptr + 2 * size + t, mask=inside, other=0.0).to(tl.float64)
        kl += tl.load(columns_ptr + 3 * size + t, mask=inside, other=0.0).to(tl.float64)
        entropy += tl.load(columns_ptr + 4 * size + t, mask=inside, other=0.0).to(tl.float64)
        ratio = tl.load(columns_ptr + 5 * size + t, mask=inside, other=0.0)
        flags = tl.load(columns_ptr + 6 * size + t, mask=inside, other=0.0).to(tl.int32)
        kept += ((flags & _KEPT) != 0).to(tl.float64)
        clip_low += ((flags & _CLIP_LOW) != 0).to(tl.float64)
        clip_high += ((flags & _CLIP_HIGH) != 0).to(tl.float64)
        dual += ((flags & _DUAL_CLIP) != 0).to(tl.float64)
        nan += tl.where((flags != 0) & (ratio != ratio), 1.0, 0.0)  # min and max drop it
        low = tl.where(flags != 0, tl.minimum(low, ratio), low)
        high = tl.where(flags != 0, tl.maximum(high, ratio), high)
    tl.store(out_ptr, tl.sum(kept))
    tl.store(out_ptr + 1, tl.sum(clip_low))
    tl.store(out_ptr + 2, tl.sum(clip_high))
    tl.store(out_ptr + 3, tl.sum(dual))
    tl.store(out_ptr + 4, tl.sum(old_kl))
    tl.store(out_ptr + 5, tl.sum(kl))
    tl.store(out_ptr + 6, tl.sum(entropy))
    tl.store(out_ptr + 7, tl.sum(pg))
    any_nan = tl.sum(nan) > 0
    tl.store(out_ptr + 8, tl.where(any_nan, float("nan"), tl.min(low)).to(tl.float64))
    tl.store(out_ptr + 9, tl.where(any_nan, float("nan"), tl.max(high)).to(tl.float64))
    tl.store(out_ptr + 10, tl.sum(loss))


# --- launchers --------------------------------------------------------------------------------


class PerToken(NamedTuple):
    """The (T,) inputs of the loss, float32 and contiguous for Triton."""

    token_T: Tensor
    old_logprob_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    importance_weight_T: Tensor | None
    ref_logprob_T: Tensor | None
    temperature_T: Tensor | None

    def rows(self, index: slice | Tensor) -> "PerToken":
        """Those of some tokens."""
        return PerToken(*(None if x is None else x[index] for x in self))


def ppo_rows(
    logits_TV: Tensor,
    dlogits_TV: Tensor | None,
    columns_CT: Tensor,
    tokens: PerToken,
    clip: Clip,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    need_entropy: bool,
    triton_: bool,
) -> None:
    """Writes the columns of these rows, and their gradient where dlogits_TV (which may be logits_TV) is given."""
    need_entropy = need_entropy or clip.entropy_coef != 0
    blocks = [slice(None)] if triton_ else row_blocks(logits_TV)
    if len(blocks) > 1:
        for rows in blocks:
            ppo_rows(
                logits_TV[rows], None if dlogits_TV is None else dlogits_TV[rows], columns_CT[:, rows], tokens.rows(rows), clip,
                temperature, softcap, logit_scale, need_entropy, triton_,
            )  # fmt: skip
        return
    if not triton_:
        scaling = {
            "temperature": temperature if tokens.temperature_T is None else tokens.temperature_T,
            "softcap": softcap,
            "logit_scale": logit_scale,
        }
        token_T = torch.where(tokens.weight_T != 0, tokens.token_T, 0)  # one left out may be no token at all: -100
        logprob_T, entropy_T, stats_2T = logprob_entropy_torch(logits_TV, token_T, need_entropy=need_entropy, **scaling)
        columns, g_T, g_entropy_T = policy_terms_torch(logprob_T, entropy_T, *tokens[1:6], clip)
        columns_CT.copy_(columns)
        if dlogits_TV is not None:
            grad_TV = logprob_entropy_grad_torch(
                g_T, g_entropy_T if clip.entropy_coef else None, logits_TV, token_T, entropy_T, stats_2T, **scaling
            )
            dlogits_TV.copy_(grad_TV)
        return
    T, V = logits_TV.shape
    # The soft-cap's arithmetic spills where a thread holds two vectors.
    rows, threads, vector = tile_shape(V, logits_TV.dtype, TILE_ROWS if softcap is None else 1, MOST_THREADS)
    _ppo_loss_kernel[(T,)](
        columns_CT, dlogits_TV, logits_TV, *tokens, columns_CT.stride(0),
        0 if dlogits_TV is None else dlogits_TV.stride(0), logits_TV.stride(0), V,
        temperature, logit_scale, softcap or 1.0,
        clip.low, clip.high, clip.dual or 0.0, clip.kl_coef, clip.entropy_coef,
        ALIGNED=is_aligned(logits_TV) and (dlogits_TV is None or is_aligned(dlogits_TV)), HAS_SOFTCAP=softcap is not None,
        NEED_ENTROPY=need_entropy, HAS_G_ENTROPY=clip.entropy_coef != 0, HAS_DUAL=clip.dual is not None,
        KL_KIND=KL_KINDS.index(clip.kl_kind) + 1,
        ROWS=rows, THREADS=threads, VECTOR=vector, num_warps=threads // 32, **LAUNCH,
    )  # fmt: skip


def empty_columns(T: int, like: Tensor) -> Tensor:
    """A (7, T) buffer for COLUMNS, padded to a multiple of 16 tokens of weight zero."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(len(COLUMNS), triton.cdiv(T, 16) * 16, dtype=dtype, device=like.device)


def reduce(columns_CT: Tensor, triton_: bool) -> tuple[Tensor, Tensor]:
    """The loss, and the metrics in the order of PPOMetrics, (10,) f64, of a buffer from empty_columns."""
    if not triton_:
        return reduce_torch(columns_CT)
    out = torch.empty(11, dtype=torch.float64, device=columns_CT.device)
    _reduce_kernel[(1,)](out, columns_CT, columns_CT.shape[1], BLOCK=1024, num_warps=8, **LAUNCH)
    return out[10].to(columns_CT.dtype), out[:10].clone()


# --- ops --------------------------------------------------------------------------------------


def _run(logits_TV, dlogits_TV, tokens, clip, temperature, softcap, need_entropy, backend):
    triton_ = runs_triton(backend, logits_TV)
    T = len(logits_TV)
    columns_CT = empty_columns(T, logits_TV)
    ppo_rows(logits_TV, dlogits_TV, columns_CT[:, :T], tokens, clip, temperature, softcap, 1.0, need_entropy, triton_)
    return reduce(columns_CT, triton_)


@torch.library.custom_op("rlsp_kernels::ppo_loss", mutates_args=())
def _ppo_loss_op(
    logits_TV: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    temperature_T: Tensor | None,
    temperature: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    need_entropy: bool,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics, and the gradient in logits_TV ((0, V) without need_grad)."""
    tokens = PerToken(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, temperature_T)
    clip = Clip(clip_low, clip_high, dual_clip, kl_coef, kl_kind, entropy_coef)
    dlogits_TV = empty_grad(logits_TV) if need_grad else None
    loss, metrics = _run(logits_TV, dlogits_TV, tokens, clip, temperature, softcap, need_entropy, backend)
    return loss, metrics, logits_TV.new_empty(0, logits_TV.shape[1]) if dlogits_TV is None else dlogits_TV


@_ppo_loss_op.register_fake
def _(logits_TV, *args):
    need_grad = args[-2]
    dlogits_TV = empty_grad(logits_TV) if need_grad else logits_TV.new_empty(0, logits_TV.shape[1])
    return *_fake_loss(logits_TV), dlogits_TV


@torch.library.custom_op("rlsp_kernels::ppo_loss_", mutates_args=("logits_TV",))
def _ppo_loss_inplace_op(
    logits_TV: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    temperature_T: Tensor | None,
    temperature: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    need_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics; the gradient overwrites logits_TV."""
    tokens = PerToken(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, temperature_T)
    clip = Clip(clip_low, clip_high, dual_clip, kl_coef, kl_kind, entropy_coef)
    return _run(logits_TV, logits_TV, tokens, clip, temperature, softcap, need_entropy, backend)


@_ppo_loss_inplace_op.register_fake
def _(logits_TV, *_):
    return _fake_loss(logits_TV)


def _fake_loss(like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((), dtype=dtype), like.new_empty(len(PPOMetrics._fields), dtype=torch.float64)


def _setup_context(ctx, inputs, output):
    _, metrics, dlogits_TV = output
    ctx.backend = inputs[-1]
    ctx.save_for_backward(dlogits_TV)
    ctx.mark_non_differentiable(metrics, dlogits_TV)
    ctx.set_materialize_grads(False)  # of zeros, (T, V) among them, for outputs that have no gradient


def _backward(ctx, dloss, *_):
    if dloss is None:  # nothing came back: not materialized
        return (None,) * 19
    (dlogits_TV,) = ctx.saved_tensors
    return scaled(dlogits_TV, dloss, ctx.backend), *[None] * 18


_ppo_loss_op.register_autograd(_backward, setup_context=_setup_context)


class _PPOLossInPlace(torch.autograd.Function):
    """The op that mutates cannot have a formula of its own: torch.library registers them for functional ops alone."""

    @staticmethod
    def forward(ctx, logits_TV, backend, *args):
        loss, metrics = _ppo_loss_inplace_op(logits_TV, *args, backend)
        ctx.backend = backend
        ctx.save_for_backward(logits_TV)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 18
        (dlogits_TV,) = ctx.saved_tensors
        dlogits_TV = dlogits_TV.detach()
        scale_(dlogits_TV, dloss, ctx.backend)
        return dlogits_TV, *[None] * 17


# --- public -----------------------------------------------------------------------------------


def ppo_loss(
    logits_TV: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
    importance_weight_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    entropy_coef: float = 0.0,
    need_entropy: bool = True,
    inplace: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, PPOMetrics]:
    """sum_t weight_t * (is_t * clipped policy-gradient_t + kl_coef * kl_t - entropy_coef * entropy_t).

    Args:
        logits_TV: (T, V) f32, f16, bf16 or f64, stride 1 along V; differentiable. Overwritten: see inplace.
        token_T: (T,) i64, the sampled tokens.
        old_logprob_T: (T,) f32, nats, before the update.
        advantage_T: (T,) f32.
        weight_T: (T,) f32, 0 leaves a token out (its other inputs may be NaN). 1 / num_tokens gives the token mean,
            1 / (num_sequences * length) the mean over sequences, 1 / (num_sequences * max_length) Dr.GRPO.
        temperature, softcap: as in logprob_entropy.
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: > 1; with a negative advantage the term is at most -dual_clip * advantage. None is off.
        importance_weight_T: (T,) f32, truncated importance weight (old policy over sampler). None is 1.
        ref_logprob_T: (T,) f32, nats; None drops the KL term.
        kl_coef, kl_kind: the KL term, see kl_penalty.
        entropy_coef: entropy bonus.
        need_entropy: False skips the entropy metric where entropy_coef is 0.
        inplace: the gradient overwrites logits_TV, when one is wanted at all: they are gone after the call. False writes it
            to a buffer of its own, another (T, V).
        backend: "auto" is Triton on a GPU and plain torch on a CPU.
    Returns:
        loss: 0-d f32, differentiable in logits, once; metrics: PPOMetrics. No host sync.
    Raises:
        ValueError: on wrong shapes, dtypes, devices or coefficients, and for inplace on a leaf.
        RuntimeError: when the backend asked for cannot run.
    Cost: with a gradient one read and one write of the logits in device memory (the second look at a row comes from L2),
        without one a read. Rows of weight 0 are not read, those without a gradient once. The
        second look finds a row in L2 while those of all SMs fit: bf16 up to a vocabulary of 190,000 in 50 MB.
    Accuracy: no worse than twice torch's own error in the same dtype, against float64; the same bits every run.
    Source: PPO arXiv:1707.06347; dual clip arXiv:1912.09729; separate clips (DAPO) arXiv:2503.14476.
    """
    check_logits(logits_TV, token_T, temperature, softcap)
    check_loss(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T)
    check_clip(clip_ratio_low, clip_ratio_high, dual_clip, kl_coef, kl_kind, ref_logprob_T)
    need_grad = torch.is_grad_enabled() and logits_TV.requires_grad
    if inplace and need_grad:
        check_inplace("inplace", logits_TV)
    per_token = isinstance(temperature, Tensor)
    columns = (old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, temperature if per_token else None)
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    args = (
        token_T.contiguous(),
        *(None if x is None else x.detach().to(dtype).contiguous() for x in columns),
        1.0 if per_token else float(temperature),
        softcap,
        float(clip_ratio_low),
        float(clip_ratio_high),
        dual_clip,
        float(kl_coef),
        kl_kind,
        float(entropy_coef),
        need_entropy,
    )
    if inplace and need_grad:
        loss, metrics = _PPOLossInPlace.apply(logits_TV, backend, *args)
    else:
        loss, metrics, _ = _ppo_loss_op(logits_TV, *args, need_grad, backend)
    return loss, PPOMetrics(*metrics.unbind())


def check_loss(
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
) -> None:
    """The refusals that the PPO losses share."""
    per_token = {
        "old_logprob_T": old_logprob_T,
        "advantage_T": advantage_T,
        "weight_T": weight_T,
        "importance_weight_T": importance_weight_T,
        "ref_logprob_T": ref_logprob_T,
    }
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != token_T.shape:
            raise ValueError(f"want {name} (T,) = {tuple(token_T.shape)}, got {tuple(tensor.shape)}")
        if tensor is not None:
            check_device(name, tensor, token_T)


def check_clip(
    low: float, high: float, dual_clip: float | None, kl_coef: float, kl_kind: str, ref_logprob_T: Tensor | None
) -> None:
    """The loss's numbers are usable."""
    if not 0 <= low <= 1:
        raise ValueError(f"clip_ratio_low must be in [0, 1], got {low}")
    if not high >= 0:
        raise ValueError(f"clip_ratio_high must be >= 0, got {high}")
    if kl_coef != 0 and ref_logprob_T is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprob_T")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    if kl_kind not in KL_KINDS:
        raise ValueError(f"kl_kind must be k1, k2 or k3, got {kl_kind!r}")
