"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

Axes: T packed tokens. Log-probabilities are in nats.
"""

from typing import Literal

from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]

LOG_RATIO_BOUND = 20.0  # exp(20) = 4.9e8; past it k3 overflows to inf and 0 * inf gives NaN gradients


def kl_penalty_torch(logprob_T: Tensor, ref_logprob_T: Tensor, kind: KLKind = "k1") -> Tensor:
    """What kl_penalty means, in plain torch. Computes in the dtype it is given."""
    log_ratio_T = (logprob_T - ref_logprob_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if kind == "k1":
        return log_ratio_T
    if kind == "k2":
        return 0.5 * log_ratio_T.square()
    return (-log_ratio_T).expm1() + log_ratio_T  # expm1: exp(-x) - 1 + x cancels to below 0 for small x


def kl_penalty(logprob_T: Tensor, ref_logprob_T: Tensor, kind: KLKind = "k1") -> Tensor:
    """kl_T with E[kl_T] = KL(policy || reference) over tokens sampled from the policy; r = ref_logprob - logprob.

    k1 = -r (unbiased, can be negative), k2 = r**2 / 2 (biased, its gradient is unbiased), k3 = exp(r) - 1 - r (unbiased,
    never negative).

    Args:
        logprob_T: (T,) floating, nats; differentiable.
        ref_logprob_T: (T,) floating, nats; differentiable.
        kind: "k1", "k2" or "k3".
    Returns:
        (T,), the dtype of the difference. |r| is clamped to 20; outside, the gradient is zero.
    Raises:
        ValueError: on another kind or differing shapes.
    Cost: reads 2 T, writes T.
    Source: Schulman, http://joschu.net/blog/kl-approx.html.
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")
    if logprob_T.shape != ref_logprob_T.shape:
        raise ValueError(f"want equal shapes, got {tuple(logprob_T.shape)} and {tuple(ref_logprob_T.shape)}")
    return kl_penalty_torch(logprob_T, ref_logprob_T, kind)
