"""The clipped PPO loss from logits, and from log-probabilities.

Axes: T packed tokens, V vocabulary. Log-probabilities are in nats.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlsp_kernels.kl import LOG_RATIO_BOUND, KLKind, kl_penalty_torch
from rlsp_kernels.logprob_entropy import check_logits, logprob_entropy_torch


class PPOMetrics(NamedTuple):
    """What a policy update logs. 0-d tensors on the inputs' device, detached; sums run over tokens of non-zero weight."""

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


def policy_loss_torch(
    logprob_T: Tensor,
    entropy_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
    importance_weight_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    entropy_coef: float = 0.0,
) -> tuple[Tensor, PPOMetrics]:
    """What ppo_loss means once log-probability and entropy are known. Ignored tokens (weight 0) may hold NaN."""
    keep_T = weight_T != 0
    zero = logprob_T.new_zeros(())

    def kept(x_T: Tensor) -> Tensor:
        return torch.where(keep_T, x_T, zero)

    logprob_T, entropy_T, advantage_T = kept(logprob_T), kept(entropy_T), kept(advantage_T)
    log_ratio_T = logprob_T - kept(old_logprob_T)
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    unclipped_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    pg_T = torch.maximum(unclipped_T, clipped_T)
    is_clipped_T = clipped_T > unclipped_T
    is_dual_T = torch.zeros_like(keep_T)
    if dual_clip is not None:
        bound_T = -advantage_T * dual_clip
        is_dual_T = (advantage_T < 0) & (bound_T < pg_T)
        pg_T = torch.where(is_dual_T, bound_T, pg_T)
    if importance_weight_T is not None:
        pg_T = pg_T * kept(importance_weight_T)
    loss_T = pg_T
    ref_kl_T = torch.zeros_like(logprob_T)
    if ref_logprob_T is not None:
        ref_kl_T = kl_penalty_torch(logprob_T, kept(ref_logprob_T), kl_kind)
        loss_T = loss_T + kl_coef * ref_kl_T
    if entropy_coef:
        loss_T = loss_T - entropy_coef * entropy_T
    loss = (kept(loss_T) * weight_T).sum()

    with torch.no_grad():
        inf = torch.full_like(ratio_T, float("inf"))
        ratio_min = torch.where(keep_T, ratio_T, inf).amin() if len(ratio_T) else zero + float("inf")
        ratio_max = torch.where(keep_T, ratio_T, -inf).amax() if len(ratio_T) else zero - float("inf")
        metrics = PPOMetrics(
            keep_T.sum(),
            (is_clipped_T & (advantage_T < 0)).sum(),
            (is_clipped_T & (advantage_T > 0)).sum(),
            is_dual_T.sum(),
            -log_ratio_T.sum(),
            ref_kl_T.sum(),
            entropy_T.sum(),
            (kept(pg_T) * weight_T).sum(),
            ratio_min,
            ratio_max,
        )
    return loss, PPOMetrics(*(m.detach() for m in metrics))


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
    **loss: object,
) -> tuple[Tensor, PPOMetrics]:
    """What ppo_loss means, in plain torch."""
    logits_TV = logits_TV.masked_fill((weight_T == 0)[:, None], 0.0)  # 0 * NaN would reach the gradient of the logits
    logprob_T, entropy_T = logprob_entropy_torch(
        logits_TV, token_T, temperature=temperature, softcap=softcap, need_entropy=need_entropy
    )
    return policy_loss_torch(logprob_T, entropy_T, old_logprob_T, advantage_T, weight_T, **loss)


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
) -> tuple[Tensor, PPOMetrics]:
    """sum_t weight_t * (is_t * clipped policy-gradient_t + kl_coef * kl_t - entropy_coef * entropy_t).

    Args:
        logits_TV: (T, V) f32, f16 or bf16; differentiable.
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
    Returns:
        loss: 0-d f32, differentiable in logits; metrics: PPOMetrics. No host sync.
    Raises:
        ValueError: on wrong shapes or coefficients.
    Source: PPO arXiv:1707.06347; dual clip arXiv:1912.09729; separate clips (DAPO) arXiv:2503.14476.
    """
    check_logits(logits_TV, token_T, temperature, softcap)
    check_loss(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, dual_clip, kl_kind)
    return ppo_loss_torch(
        logits_TV,
        token_T,
        old_logprob_T,
        advantage_T,
        weight_T,
        temperature=temperature,
        softcap=softcap,
        need_entropy=need_entropy or entropy_coef != 0,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        dual_clip=dual_clip,
        importance_weight_T=importance_weight_T,
        ref_logprob_T=ref_logprob_T,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        entropy_coef=entropy_coef,
    )


def check_loss(
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    importance_weight_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    dual_clip: float | None,
    kl_kind: str,
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
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    if kl_kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_kind must be k1, k2 or k3, got {kl_kind!r}")
