"""Log-probability of one chosen token per row of logits, and the entropy of the row.

Axes: T packed tokens, V vocabulary. Log-probabilities and entropies are in nats.
"""

import torch
from torch import Tensor

# --- definition -------------------------------------------------------------------------------


def logprob_entropy_torch(
    logits_TV: Tensor,
    token_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """What logprob_entropy means, in plain torch. Computes in float32, or in float64 when given float64."""
    x_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    if softcap is not None:
        x_TV = softcap * torch.tanh(x_TV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    x_TV = x_TV / temperature
    log_p_TV = x_TV.log_softmax(-1)
    logprob_T = log_p_TV.gather(-1, token_T[:, None]).sum(-1)  # squeeze would return a view, which FSDP2 warns of
    if not need_entropy:
        return logprob_T, torch.zeros_like(logprob_T)
    p_TV = log_p_TV.exp()
    surprise_TV = torch.where(p_TV > 0, log_p_TV, 0.0)  # a logit of -inf contributes 0, not 0 * inf
    return logprob_T, -(p_TV * surprise_TV).sum(-1)


# --- public -----------------------------------------------------------------------------------


def logprob_entropy(
    logits_TV: Tensor,
    token_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    need_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log softmax(z)[token] and -sum softmax(z) log softmax(z), with z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits_TV: (T, V) f32, f16, bf16 or f64; differentiable.
        token_T: (T,) i64, each in [0, V). Not checked on a GPU: no host sync.
        temperature: > 0, one number or (T,) f32, one per token; what the rollout was sampled with.
        softcap: Gemma's logit cap, > 0; None is off.
        need_entropy: False skips it and returns zeros.
    Returns:
        logprob_T, entropy_T: (T,) f32 (f64 for f64 logits), both differentiable.
    Raises:
        ValueError: on a wrong shape, dtype or temperature.
    """
    check_logits(logits_TV, token_T, temperature, softcap)
    return logprob_entropy_torch(logits_TV, token_T, temperature=temperature, softcap=softcap, need_entropy=need_entropy)


def check_logits(logits_TV: Tensor, token_T: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    """The refusals that every op on logits shares."""
    if logits_TV.ndim != 2 or token_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"want logits (T, V) and token (T,), got {tuple(logits_TV.shape)} and {tuple(token_T.shape)}")
    if token_T.dtype != torch.int64:
        raise ValueError(f"token_T must be int64, got {token_T.dtype}")
    check_scaling(token_T, temperature, softcap)


def check_scaling(token_T: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    """temperature and softcap are usable; a temperature tensor's values are not read (no host sync)."""
    if isinstance(temperature, Tensor):
        if temperature.shape != token_T.shape:
            raise ValueError(f"temperature must be a number or (T,), got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
