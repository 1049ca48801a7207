"""Log-probability, entropy and PPO loss straight from hidden states and the output projection, never holding (T, V).

Axes: T packed tokens, D hidden size, V vocabulary. Log-probabilities are in nats.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlsp_kernels.kl import KLKind
from rlsp_kernels.logprob_entropy import check_scaling, logprob_entropy_torch
from rlsp_kernels.ppo_loss import PPOMetrics, check_loss, policy_loss_torch

_LOGITS_BYTES = 1 << 29  # float32 logits held at a time; 512 MiB is 1,046 tokens of a 128,256 vocabulary


def linear_logprob_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    need_entropy: bool = True,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """logprob_entropy(logit_scale * (hidden @ weight.T + bias), token) over chunks of tokens.

    Args:
        hidden_TD: (T, D) f32, f16 or bf16; differentiable.
        weight_VD: (V, D), the output projection; differentiable.
        token_T: (T,) i64, each in [0, V).
        bias_V: (V,) or None.
        temperature, softcap, need_entropy: as in logprob_entropy.
        logit_scale: multiplies the logits before softcap and temperature.
        logits_dtype: dtype of the matrix product; None is the dtype of hidden_TD.
    Returns:
        logprob_T, entropy_T: (T,) f32, differentiable.
    Raises:
        ValueError: on wrong shapes, dtypes or temperature.
    Cost: one matrix product forward; with several chunks and gradients one more to recompute, and two backward. At most
        512 MiB of float32 logits at a time.
    """
    _check_linear(hidden_TD, weight_VD, token_T, temperature, softcap)
    if logits_dtype is not None:
        hidden_TD, weight_VD = hidden_TD.to(logits_dtype), weight_VD.to(logits_dtype)
        bias_V = None if bias_V is None else bias_V.to(logits_dtype)

    def chunk_logprob_entropy(hidden_CD: Tensor, token_C: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = torch.nn.functional.linear(hidden_CD, weight_VD, bias_V)
        if logit_scale != 1.0:
            logits_CV = logits_CV * logit_scale
        return logprob_entropy_torch(logits_CV, token_C, temperature=temperature, softcap=softcap, need_entropy=need_entropy)

    num_chunk = max(1, _LOGITS_BYTES // (4 * weight_VD.shape[0]))
    if len(token_T) <= num_chunk:
        return chunk_logprob_entropy(hidden_TD, token_T, temperature)
    parts = []
    for start in range(0, len(token_T), num_chunk):
        chunk = slice(start, start + num_chunk)
        temperature_C = temperature[chunk] if isinstance(temperature, Tensor) else temperature
        parts.append(checkpoint(chunk_logprob_entropy, hidden_TD[chunk], token_T[chunk], temperature_C, use_reentrant=False))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def linear_ppo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
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
    """ppo_loss(logit_scale * (hidden @ weight.T + bias), ...), never holding (T, V).

    Args: hidden_TD, weight_VD, bias_V, logit_scale and logits_dtype as in linear_logprob_entropy, the rest as in ppo_loss.
    Returns: loss, metrics as ppo_loss; differentiable in hidden_TD, weight_VD and bias_V.
    Raises:
        ValueError: on wrong shapes, dtypes or coefficients.
    Cost: as linear_logprob_entropy.
    """
    check_loss(token_T, old_logprob_T, advantage_T, weight_T, importance_weight_T, ref_logprob_T, dual_clip, kl_kind)
    logprob_T, entropy_T = linear_logprob_entropy(
        hidden_TD,
        weight_VD,
        token_T,
        bias_V=bias_V,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        need_entropy=need_entropy or entropy_coef != 0,
        logits_dtype=logits_dtype,
    )
    return policy_loss_torch(
        logprob_T,
        entropy_T,
        old_logprob_T,
        advantage_T,
        weight_T,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        dual_clip=dual_clip,
        importance_weight_T=importance_weight_T,
        ref_logprob_T=ref_logprob_T,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        entropy_coef=entropy_coef,
    )


def _check_linear(
    hidden_TD: Tensor, weight_VD: Tensor, token_T: Tensor, temperature: float | Tensor, softcap: float | None
) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"want hidden (T, D) and weight (V, D), got {tuple(hidden_TD.shape)}, {tuple(weight_VD.shape)}")
    if token_T.shape != hidden_TD.shape[:1] or token_T.dtype != torch.int64:
        raise ValueError(f"want token (T,) int64, got {tuple(token_T.shape)} {token_T.dtype}")
    check_scaling(token_T, temperature, softcap)
